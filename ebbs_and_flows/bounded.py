"""Questions whose cost does not grow with the number of flows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from django.db import connections
from django.db.models import QuerySet

from .models import FlowExecution

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
