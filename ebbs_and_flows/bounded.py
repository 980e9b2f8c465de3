"""Questions whose cost does not grow with the number of flows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

from django.db import connections
from django.db.models import QuerySet

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

    Each name is found from the one before it by an index: no scan of all rows.
    """
    connection = connections[using]
    if connection.vendor == "mysql":
        # A recursive query reads the whole index there, and so does grouping by an index with a
        # descending column. So each plan is found by a look-up, and its template by another.
        sql = (
            f"SELECT DISTINCT (SELECT f.template_name FROM {FLOW} f"  # noqa: S608 - no values
            f" FORCE INDEX (ebbs_flow_ready) WHERE f.plan_digest = plans.plan_digest LIMIT 1)"
            f" FROM (SELECT plan_digest, MIN(ready_rank) FROM {FLOW}"
            f" FORCE INDEX FOR GROUP BY (ebbs_flow_ready) GROUP BY plan_digest"
            f" LIMIT {MAX_NAMES}) AS plans"
        )
    else:
        least = f"SELECT MIN(template_name) FROM {FLOW}"  # noqa: S608 - a table's name
        sql = (
            f"WITH RECURSIVE seen (name) AS ({least} UNION ALL SELECT"  # noqa: S608 - no values
            f" ({least} WHERE template_name > seen.name) FROM seen WHERE seen.name IS NOT NULL)"
            f" SELECT name FROM seen WHERE name IS NOT NULL LIMIT {MAX_NAMES}"
        )
    with connection.cursor() as cursor:
        cursor.execute(sql)
        return {name for (name,) in cursor.fetchall()}


def oldest_due(template_names: Iterable[str], using: str) -> timedelta | None:
    """Return for how long the oldest due flow of these templates has been due; None if none is.

    A flow whose worker was lost counts from the end of its lease. Due flows lie in an index by
    plan and rank: one query walks over the pairs of these that there are, and looks no row up
    but the first of each.
    """
    names = sorted(template_names)
    if not names:
        return None
    connection = connections[using]
    now, moment = now_sql(connection)
    listed = ", ".join(["%s"] * len(names))
    is_mysql = connection.vendor == "mysql"
    # MariaDB would scan all flows in the status, those that wait for later too.
    hint = "FORCE INDEX (ebbs_flow_status) " if is_mysql else ""
    unranked = " UNION ALL ".join(
        f"SELECT * FROM (SELECT run_at FROM {FLOW} {hint}WHERE status = '{status.value}'"  # noqa: S608
        f" AND ready_rank IS NULL AND run_at <= {now} AND template_name IN ({listed})"
        f" ORDER BY ready_rank, run_at LIMIT 1) AS {status.value.lower()}"
        for status in WAITING
    )
    walk, ranked = _walk_over_ranks(is_mysql=is_mysql, listed=listed)
    sql = f"""{walk} SELECT {seconds_until_sql(connection, "MIN(due.due_at)")} FROM (
            SELECT due_at FROM ({ranked}) AS ranked WHERE due_at <= {now}
            UNION ALL {unranked}
            UNION ALL SELECT MIN(lease_expires_at) FROM {FLOW} WHERE status = 'RUNNING'
                AND ready_rank IS NULL AND lease_expires_at < {now} AND template_name IN ({listed})
        ) AS due"""  # noqa: S608 - its values are parameters
    # In the order of the text, which begins with the walk except on MariaDB.
    parameters: list[Any] = [*moment, *names] if is_mysql else [*names, *moment]
    parameters += moment
    for _ in WAITING:
        parameters += [*moment, *names]
    with connection.cursor() as cursor:
        cursor.execute(sql, [*parameters, *moment, *names])
        (seconds,) = cursor.fetchone()
    return None if seconds is None else timedelta(seconds=-float(seconds))


def _walk_over_ranks(*, is_mysql: bool, listed: str) -> tuple[str, str]:
    """Return a WITH clause, and the query of the first moment of each pair of plan and rank.

    The parameters of both together are the names of the templates.
    """
    if is_mysql:
        # Grouping by the first columns of an index skips from one group to the next.
        ranked = f"""
            SELECT pairs.due_at FROM (
                SELECT plan_digest, ready_rank, MIN(run_at) AS due_at FROM {FLOW}
                FORCE INDEX FOR GROUP BY (ebbs_flow_ready) GROUP BY plan_digest, ready_rank
            ) AS pairs WHERE pairs.ready_rank IS NOT NULL AND (
                SELECT f.template_name FROM {FLOW} f FORCE INDEX (ebbs_flow_ready)
                WHERE f.plan_digest = pairs.plan_digest LIMIT 1
            ) IN ({listed})"""  # noqa: S608 - no values
        return "", ranked
    ready = f"FROM {FLOW} f WHERE f.ready_rank IS NOT NULL AND f.plan_digest"
    first = "ORDER BY f.plan_digest, f.ready_rank, f.run_at LIMIT 1"
    walk = f"""
        WITH RECURSIVE plans (digest) AS (
            SELECT (SELECT f.plan_digest {ready} > '' {first}) UNION ALL
            SELECT (SELECT f.plan_digest {ready} > plans.digest {first})
            FROM plans WHERE plans.digest IS NOT NULL
        ), ranks (digest, ready_rank) AS (
            SELECT plans.digest, (SELECT f.ready_rank {ready} = plans.digest {first})
            FROM plans WHERE plans.digest IS NOT NULL
                AND (SELECT f.template_name {ready} = plans.digest {first}) IN ({listed})
            UNION ALL
            SELECT ranks.digest, (SELECT f.ready_rank {ready} = ranks.digest
                AND f.ready_rank > ranks.ready_rank {first})
            FROM ranks WHERE ranks.ready_rank IS NOT NULL
        )"""  # noqa: S608 - no values
    ranked = f"""
        SELECT (SELECT f.run_at {ready} = ranks.digest AND f.ready_rank = ranks.ready_rank
            {first}) AS due_at FROM ranks WHERE ranks.ready_rank IS NOT NULL"""  # noqa: S608
    return walk, ranked
