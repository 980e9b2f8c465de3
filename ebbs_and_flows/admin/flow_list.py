"""The list of flows: its columns, its search, and the rows that refresh themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from django.contrib import admin
from django.db.models import Count, OuterRef, Q, QuerySet, Subquery
from django.http import HttpRequest
from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.utils.translation import gettext_lazy, ngettext, pgettext

from ..durations import duration
from ..models import FlowExecution, TaskExecution
from ..service import flow_service
from ..status import FlowStatus, TaskStatus
from .attempts import LONG_TEXTS
from .pages import is_id
from .pieces import moment, pill, progress, reported_progress
from .queries import flows, template_names

if TYPE_CHECKING:
    _ModelAdmin = admin.ModelAdmin[FlowExecution]
else:
    _ModelAdmin = object

LIVE_COLUMNS = ("status_pill", "progress", "what_went_wrong", "started")
MAX_LIVE = 200
HEADLINE = 120


def live(column: str, flow: FlowExecution, shown: Any) -> SafeString:
    """Return a cell's content, marked so that the page can put a newer one in its place."""
    return format_html('<span data-ebbs-live="{}-{}">{}</span>', column, flow.pk, shown)


def search(queryset: QuerySet[Any], term: str) -> QuerySet[Any]:
    """Search by id, by the beginning of a key, and by a part of a template's name."""
    names = [name for name in template_names() if term.lower() in name.lower()]
    # Not a LIKE, which no index of all databases serves; the columns are compared by code points.
    wanted = Q(key__gte=term, key__lt=term + "\U0010ffff")
    if names:
        wanted |= Q(template_name__in=names)
    if is_id(term):
        wanted |= Q(pk=int(term))
    return queryset.filter(wanted)


def add_attempts(rows: Sequence[FlowExecution], *, with_errors: bool) -> None:
    """Give each flow `attempt_count` and `latest`, the last attempt at its task: two queries.

    Without `with_errors` the list shows of an error its type only.
    """
    attempts = flow_service.repository.attempts
    of_flow = attempts.filter(flow_execution=OuterRef("pk")).order_by()
    counted = of_flow.values("flow_execution").annotate(n=Count("pk")).values("n")
    at_task = of_flow.filter(task_index=OuterRef("current_task_index")).order_by(
        "-started_at", "-pk"
    )
    found = {
        pk: (latest, count or 0)
        for pk, latest, count in flows()
        .filter(pk__in=[flow.pk for flow in rows])
        .annotate(latest=Subquery(at_task.values("pk")[:1]), count=Subquery(counted))
        .values_list("pk", "latest", "count")
    }
    latest = {
        attempt.pk: attempt
        for attempt in attempts.filter(pk__in=[pk for pk, _count in found.values() if pk]).defer(
            *LONG_TEXTS
        )
    }
    flow: Any
    for flow in rows:
        pk, flow.attempt_count = found.get(flow.pk, (None, 0))
        flow.latest = latest.get(pk)
        flow.shows_error = with_errors


def live_query(rows: Sequence[FlowExecution]) -> str:
    """Return the query that asks for the rows that may still change."""
    return urlencode([("id", flow.pk) for flow in rows if not flow.is_finished][:MAX_LIVE])


class FlowColumns(_ModelAdmin):
    """The list's columns; a flow in them went through `add_attempts`."""

    @admin.display(description=gettext_lazy("flow"))
    def name(self, flow: FlowExecution) -> SafeString:
        return format_html(
            '<bdi>{}</bdi> <span class="ebbs-id">#{}</span>', flow.template_name, flow.pk
        )

    @admin.display(description=gettext_lazy("status"))
    def status_pill(self, flow: FlowExecution) -> SafeString:
        return live("status_pill", flow, pill(flow.status))

    @admin.display(description=gettext_lazy("progress"))
    def progress(self, flow: Any) -> SafeString:
        running = flow.latest.pk if self._is_latest(flow, TaskStatus.RUNNING) else None
        attempts = ngettext("%d attempt", "%d attempts", flow.attempt_count) % flow.attempt_count
        shown = format_html(
            '{}{}<span class="ebbs-small-line">{}</span>',
            progress(flow),
            reported_progress(flow, running),
            attempts if flow.attempt_count else "",
        )
        return live("progress", flow, shown)

    @admin.display(description=gettext_lazy("what went wrong"))
    def what_went_wrong(self, flow: Any) -> SafeString:
        shown: SafeString | str = ""
        stopped = flow.status in {FlowStatus.FAILED, FlowStatus.RESCHEDULED}
        if stopped and self._is_latest(flow, TaskStatus.FAILED):
            error = flow.latest
            line = error.headline if flow.shows_error else error.error_type.rpartition(".")[2]
            line = line if len(line) <= HEADLINE else line[: HEADLINE - 1] + "…"
            name = flow.latest.task_name
            shown = format_html("<b><bdi>{}</bdi></b>: <bdi>{}</bdi>", name, line)
            if flow.latest.asked_for_later and flow.status == FlowStatus.RESCHEDULED:
                waits = pgettext("of a task", "waits")
                shown = format_html("<bdi>{}</bdi> {}: <bdi>{}</bdi>", name, waits, line)
        return live("what_went_wrong", flow, shown)

    @admin.display(description=gettext_lazy("scheduled for"))
    def scheduled_for(self, flow: FlowExecution) -> SafeString | str:
        return moment(flow.run_at)

    @admin.display(description=gettext_lazy("started, took"))
    def started(self, flow: FlowExecution) -> SafeString:
        shown = format_html(
            '{}<span class="ebbs-small-line">{}</span>',
            moment(flow.started_at),
            duration(flow.duration),
        )
        return live("started", flow, shown)

    def live_cells(self, rows: Sequence[FlowExecution]) -> list[SafeString]:
        """Return the contents of the cells that may have changed."""
        return [getattr(self, column)(flow) for flow in rows for column in LIVE_COLUMNS]

    @staticmethod
    def _is_latest(flow: Any, status: TaskStatus) -> bool:
        latest: TaskExecution | None = flow.latest
        return latest is not None and latest.status == status


def rows_asked_for(request: HttpRequest, visible: QuerySet[FlowExecution]) -> list[FlowExecution]:
    """Return the flows whose ids the query has."""
    ids = [int(text) for text in request.GET.getlist("id")[:MAX_LIVE] if is_id(text)]
    return list(visible.filter(pk__in=ids))
