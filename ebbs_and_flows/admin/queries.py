"""What the pages ask the database: bounded, and in a number of queries that rows do not raise."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from django.db import connections
from django.db.models import QuerySet

from ..models import FlowExecution
from ..runner import flow_runner
from ..service import flow_service

MAX_NAMES = 500


def flows() -> QuerySet[FlowExecution]:
    """All flow executions, on the database they are written to."""
    return flow_service.repository.flows


def bounded_counts(querysets: Sequence[QuerySet[Any]], limit: int) -> list[int]:
    """Return how many rows each has, at most `limit`, in one query for all."""
    if not querysets:
        return []
    using = flow_service.repository.using
    parts, parameters = [], []
    for queryset in querysets:
        sql, values = _compiled(queryset.order_by().values("pk")[:limit], using)
        parts.append(f"(SELECT COUNT(*) FROM ({sql}) AS counted)")  # noqa: S608 - compiled
        parameters += values
    with connections[using].cursor() as cursor:
        cursor.execute("SELECT " + ", ".join(parts), parameters)
        return list(cursor.fetchone())


def rows_of_each(
    querysets: Sequence[QuerySet[FlowExecution]], fields: Sequence[str]
) -> list[FlowExecution]:
    """Return the rows of all, each with its own order and limit, in one query."""
    if not querysets:
        return []
    using = flow_service.repository.using
    parts, parameters = [], []
    for number, queryset in enumerate(querysets):
        sql, values = _compiled(queryset.values(*fields), using)
        parts.append(f"SELECT * FROM ({sql}) AS part{number}")  # noqa: S608 - compiled
        parameters += values
    united = " UNION ALL ".join(parts)
    return list(FlowExecution.objects.raw(united, parameters, using=using))


def _compiled(queryset: QuerySet[Any], using: str) -> tuple[str, list[Any]]:
    sql, values = queryset.query.get_compiler(using).as_sql()
    return sql, list(values)


def template_names() -> list[str]:
    """Return the registered templates' names and those in the table, sorted.

    Each name is found from the one before it by the index: no scan of all rows.
    """
    using = flow_service.repository.using
    table = connections[using].ops.quote_name(FlowExecution._meta.db_table)
    least = f"SELECT MIN(template_name) FROM {table}"  # noqa: S608 - a table's name
    with connections[using].cursor() as cursor:
        cursor.execute(
            f"WITH RECURSIVE seen (name) AS ({least} UNION ALL SELECT"  # noqa: S608
            f" ({least} WHERE template_name > seen.name) FROM seen WHERE seen.name IS NOT NULL)"
            f" SELECT name FROM seen WHERE name IS NOT NULL LIMIT {MAX_NAMES}"
        )
        stored = {name for (name,) in cursor.fetchall()}
    return sorted({*flow_runner.templates, *stored})


def first_id_since(since: datetime) -> int:
    """Return an id below which every flow was made before that moment.

    Ids grow with time, so halving finds it in some twenty look-ups by primary key, and no index
    on the creation, which every claim would have to keep up, is needed.
    """
    rows = flows()
    ids = rows.values_list("pk", flat=True)
    # Not an aggregate of both, for which SQLite reads every row.
    low, last = ids.order_by("pk").first(), ids.order_by("-pk").first()
    if low is None or last is None:
        return 0
    high = last + 1
    while low < high:
        middle = (low + high) // 2
        created_at = (
            rows.filter(pk__gte=middle).order_by("pk").values_list("created_at", flat=True)[0]
        )
        if created_at < since:
            low = middle + 1
        else:
            high = middle
    # A transaction that took its id early and its time late may lie a little before.
    return low - 1000
