"""What the pages ask the database: bounded, and in a number of queries that rows do not raise."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from django.db.models import QuerySet

from .. import bounded
from ..models import FlowExecution
from ..runner import flow_runner
from ..service import flow_service


def flows() -> QuerySet[FlowExecution]:
    """All flow executions, on the database they are written to."""
    return flow_service.repository.flows


def bounded_counts(querysets: Sequence[QuerySet[Any]], limit: int) -> list[int]:
    """Return how many rows each has, at most `limit`, in one query for all."""
    return bounded.bounded_counts(querysets, limit, flow_service.repository.using)


def rows_of_each(
    querysets: Sequence[QuerySet[FlowExecution]], fields: Sequence[str]
) -> list[FlowExecution]:
    """Return the rows of all, each with its own order and limit, in one query."""
    if not querysets:
        return []
    using = flow_service.repository.using
    parts, parameters = [], []
    for number, queryset in enumerate(querysets):
        sql, values = bounded.compiled(queryset.values(*fields), using)
        parts.append(f"SELECT * FROM ({sql}) AS part{number}")  # noqa: S608 - compiled
        parameters += values
    united = " UNION ALL ".join(parts)
    return list(FlowExecution.objects.raw(united, parameters, using=using))


def is_narrowed(queryset: QuerySet[Any]) -> bool:
    """Whether a queryset leaves rows out; one that does not needs no look at each row."""
    return bool(queryset.query.has_filters())


def template_names(visible: QuerySet[FlowExecution] | None = None) -> list[str]:
    """Return the registered templates' names and those in the table, sorted.

    Of the latter only those that `visible` has a flow of, where it is given.
    """
    registered = set(flow_runner.templates)
    stored = bounded.stored_template_names(flow_service.repository.using) - registered
    if visible is not None and is_narrowed(visible):
        names = sorted(stored)
        found = bounded_counts([visible.filter(template_name=name) for name in names], 1)
        stored = {name for name, count in zip(names, found, strict=True) if count}
    return sorted(registered | stored)


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
