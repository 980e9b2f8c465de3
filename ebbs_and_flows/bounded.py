"""Questions whose cost does not grow with the number of flows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

from django.db import connections
from django.db.models import QuerySet

from .models import FlowExecution
from .repository.database import FLOW, now_sql, seconds_until_sql
from .status import WAITING

MAX_NAMES = 500


def compiled(queryset: QuerySet[Any], using: str) -> tuple[str, list[Any]]:
    """Return a queryset's SQL and its parameters."""
    sql, values = queryset.query.get_compiler(using).as_sql()
    return sql, list(values)


def bounded_counts(querysets: Sequence[QuerySet[Any]], limit: int, using: str) -> list[int]:
    """Return how many rows each has, at most `limit`, in one query for all."""
    if not querysets:
        return []
    parts, parameters = [], []
    for queryset in querysets:
        sql, values = compiled(queryset.order_by().values("pk")[:limit], using)
        parts.append(f"(SELECT COUNT(*) FROM ({sql}) AS counted)")  # noqa: S608 - compiled
        parameters += values
    with connections[using].cursor() as cursor:
        cursor.execute("SELECT " + ", ".join(parts), parameters)
        return list(cursor.fetchone())


def stored_template_names(using: str) -> set[str]:
    """Return the names of the templates that flows are stored of.

    Each name is found from the one before it by the index: no scan of all rows.
    """
    table = connections[using].ops.quote_name(FlowExecution._meta.db_table)
    least = f"SELECT MIN(template_name) FROM {table}"  # noqa: S608 - a table's name
    with connections[using].cursor() as cursor:
        cursor.execute(
            f"WITH RECURSIVE seen (name) AS ({least} UNION ALL SELECT"  # noqa: S608
            f" ({least} WHERE template_name > seen.name) FROM seen WHERE seen.name IS NOT NULL)"
            f" SELECT name FROM seen WHERE name IS NOT NULL LIMIT {MAX_NAMES}"
        )
        return {name for (name,) in cursor.fetchall()}


def oldest_due(template_names: Iterable[str], using: str) -> timedelta | None:
    """Return for how long the oldest due flow of these templates has been due; None if none is.

    A flow whose worker was lost counts from the end of its lease. Due flows lie in an index by
    template and rank: one query walks over the pairs of these that there are, and looks no row up
    but the first of each.
    """
    names = sorted(template_names)
    if not names:
        return None
    connection = connections[using]
    now, moment = now_sql(connection)
    listed = ", ".join(["%s"] * len(names))
    unranked = " UNION ALL ".join(
        f"SELECT * FROM (SELECT run_at FROM {FLOW} WHERE status = '{status.value}'"  # noqa: S608
        f" AND ready_rank IS NULL AND run_at <= {now} AND template_name IN ({listed})"
        f" ORDER BY ready_rank, run_at LIMIT 1) AS {status.value.lower()}"
        for status in WAITING
    )
    sql = f"""
        WITH RECURSIVE names (name) AS (
            SELECT MIN(template_name) FROM {FLOW} UNION ALL
            SELECT (SELECT MIN(template_name) FROM {FLOW} WHERE template_name > names.name)
            FROM names WHERE names.name IS NOT NULL
        ), ranks (name, ready_rank) AS (
            SELECT names.name, (SELECT MIN(f.ready_rank) FROM {FLOW} f
                WHERE f.template_name = names.name AND f.ready_rank IS NOT NULL)
            FROM names WHERE names.name IN ({listed}) UNION ALL
            SELECT ranks.name, (SELECT MIN(f.ready_rank) FROM {FLOW} f
                WHERE f.template_name = ranks.name AND f.ready_rank > ranks.ready_rank)
            FROM ranks WHERE ranks.ready_rank IS NOT NULL
        )
        SELECT {seconds_until_sql(connection, "MIN(due.due_at)")} FROM (
            SELECT (SELECT MIN(f.run_at) FROM {FLOW} f WHERE f.template_name = ranks.name
                AND f.ready_rank = ranks.ready_rank AND f.run_at <= {now}) AS due_at
            FROM ranks WHERE ranks.ready_rank IS NOT NULL
            UNION ALL {unranked}
            UNION ALL SELECT MIN(lease_expires_at) FROM {FLOW} WHERE status = 'RUNNING'
                AND ready_rank IS NULL AND lease_expires_at < {now} AND template_name IN ({listed})
        ) AS due"""  # noqa: S608 - its values are parameters
    parameters: list[Any] = [*names, *moment, *moment]
    for _ in WAITING:
        parameters += [*moment, *names]
    with connection.cursor() as cursor:
        cursor.execute(sql, [*parameters, *moment, *names])
        (seconds,) = cursor.fetchone()
    return None if seconds is None else timedelta(seconds=-float(seconds))
