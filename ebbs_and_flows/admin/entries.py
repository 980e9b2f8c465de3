"""One flow's context on its page: grouped by who wrote it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from django.db.models import QuerySet
from django.db.models.functions import Left, Length
from django.utils.translation import gettext as _

from ..models import ExecutionContextEntry, FlowExecution
from ..service import flow_service
from .queries import bounded_counts
from .values_shown import ShownValue, shown_value

MAX_ENTRIES = 200
MAX_SHOWN = 4_000
MAX_COUNTED = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownEntry:
    """One entry on a page; `pk` leads to all of a value that is cut."""

    pk: int
    name: str
    value: ShownValue
    is_cut: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryGroup:
    """The entries that one task, or the scheduling, wrote."""

    writer: str
    is_task: bool
    entries: list[ShownEntry]


def flow_entries(flow: FlowExecution) -> QuerySet[ExecutionContextEntry]:
    """Return a flow's entries in the order of writing."""
    entries = ExecutionContextEntry.objects.using(flow_service.repository.using)
    return entries.filter(flow_execution=flow.pk).order_by("pk")


def entry_groups(
    found: QuerySet[ExecutionContextEntry],
) -> tuple[list[EntryGroup], int]:
    """Return the first of a flow's entries, grouped, and how many more there are."""
    rows = list(
        found.annotate(shown=Left("value", MAX_SHOWN), size=Length("value")).values_list(
            "pk",
            "name",
            "shown",
            "size",
            "task_execution__task_index",
            "task_execution__task_name",
        )[: MAX_ENTRIES + 1]
    )
    more = 0
    if len(rows) > MAX_ENTRIES:
        more = bounded_counts([found], MAX_COUNTED)[0] - MAX_ENTRIES
    groups = []
    for (index, task_name), of_writer in groupby(rows[:MAX_ENTRIES], key=lambda row: row[4:]):
        is_task = index is not None
        writer = f"{index + 1}. {task_name}" if is_task else _("At scheduling")
        entries = [
            ShownEntry(
                pk=pk, name=name, value=shown_value(name, text, size), is_cut=size > len(text)
            )
            for pk, name, text, size, _index, _name in of_writer
        ]
        groups.append(EntryGroup(writer=writer, is_task=is_task, entries=entries))
    return groups, more
