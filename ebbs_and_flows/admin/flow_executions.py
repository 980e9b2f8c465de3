"""The list of flows and one flow's page."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar

from django.contrib import admin, messages
from django.contrib.admin.utils import unquote
from django.contrib.admin.views.main import ChangeList
from django.core.exceptions import PermissionDenied
from django.db.models import Count, Q, QuerySet
from django.db.models.functions import Left, Length
from django.http import (
    HttpRequest,
    HttpResponse,
    HttpResponseNotAllowed,
    HttpResponseRedirect,
)
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse
from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

from ..exceptions import TemplateDrift
from ..models import ExecutionContextEntry, FlowExecution, FlowTransition, TaskExecution
from ..runner import flow_runner
from ..service import flow_service
from ..status import FINISHED, FlowStatus, TaskStatus
from .actions import FLOW_ACTIONS, FlowAction, apply, list_action
from .paginator import BoundedPaginator
from .pieces import MAX_SHOWN, ShownValue, duration, pill, progress, shown_value

if TYPE_CHECKING:
    _ModelAdmin = admin.ModelAdmin[FlowExecution]
else:
    _ModelAdmin = admin.ModelAdmin

MAX_ENTRIES = 200
MAX_ATTEMPTS = 2_000
MAX_OUTPUTS = 20


class TemplateFilter(admin.SimpleListFilter):
    """By template: the registered ones and those that the table knows."""

    title = gettext_lazy("template")
    parameter_name = "template"

    def lookups(
        self, request: HttpRequest, model_admin: admin.ModelAdmin[Any]
    ) -> list[tuple[str, str]]:
        """Return the names: a look-up in the index for each, not a scan of all rows."""
        names = set(flow_runner.templates)
        seen = flow_service.repository.flows.order_by("template_name")
        last = ""
        while found := seen.filter(template_name__gt=last).values_list("template_name", flat=True)[
            :1
        ]:
            last = found[0]
            names.add(last)
        return [(name, name) for name in sorted(names)]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        """Narrow the list to the chosen name."""
        return queryset.filter(template_name=self.value()) if self.value() else queryset


@dataclass(slots=True, kw_only=True)
class TaskRow:
    """One task on a flow's page."""

    name: str
    description: str
    status: SafeString | str
    attempts: list[TaskExecution] = field(default_factory=list)

    @property
    def failures(self) -> list[TaskExecution]:
        """The attempts with an output to read, the last first."""
        return [attempt for attempt in reversed(self.attempts) if attempt.output][:MAX_OUTPUTS]

    @property
    def started_at(self) -> Any:
        """When its first attempt started."""
        return self.attempts[0].started_at if self.attempts else None

    @property
    def took(self) -> str:
        """How long its last attempt took."""
        if not self.attempts or self.attempts[-1].finished_at is None:
            return ""
        return duration(self.attempts[-1].finished_at - self.attempts[-1].started_at)


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryGroup:
    """The entries that one attempt, or the scheduling, wrote."""

    writer: str
    entries: list[tuple[str, ShownValue]]


@admin.register(FlowExecution)
class FlowExecutionAdmin(_ModelAdmin):
    """Flows: to look at, to continue, to rerun, to cancel."""

    list_display = (
        "name",
        "status_pill",
        "progress",
        "what_went_wrong",
        "run_at",
        "started_at",
        "took",
        "attempts",
    )
    list_display_links = ("name",)
    list_filter = ("status", TemplateFilter, "created_at")
    ordering = ("-id",)
    search_fields = ("id",)
    search_help_text = gettext_lazy("An id, or the beginning of a key or of a template's name")
    show_full_result_count = False
    paginator = BoundedPaginator
    actions = tuple(list_action(action) for action in FLOW_ACTIONS)
    change_form_template = "admin/ebbs_and_flows/flowexecution/page.html"

    class Media:
        css: ClassVar = {"all": ("ebbs_and_flows/admin.css",)}

    # Permissions

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return super().has_delete_permission(request, obj) and (obj is None or obj.is_finished)

    def has_reschedule_permission(self, request: HttpRequest) -> bool:
        return self._is_permitted("reschedule", request)

    def has_rerun_now_permission(self, request: HttpRequest) -> bool:
        return self._is_permitted("rerun_now", request)

    def has_rerun_from_start_permission(self, request: HttpRequest) -> bool:
        return self._is_permitted("rerun_from_start", request)

    def has_cancel_permission(self, request: HttpRequest) -> bool:
        return self._is_permitted("cancel", request)

    @staticmethod
    def _is_permitted(name: str, request: HttpRequest) -> bool:
        return any(item.is_permitted(request) for item in FLOW_ACTIONS if item.name == name)

    # The list

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Any], search_term: str
    ) -> tuple[QuerySet[Any], bool]:
        """Search by id, and by the beginning of a key or a template's name."""
        term = search_term.strip()
        if not term:
            return queryset, False
        wanted = Q(key__startswith=term) | Q(template_name__startswith=term)
        if term.isascii() and term.isdigit() and len(term) < 19:
            wanted |= Q(pk=int(term))
        return queryset.filter(wanted), False

    def get_changelist_instance(self, request: HttpRequest) -> ChangeList:
        """Look up what the rows of this page need, in two queries for all."""
        changes = super().get_changelist_instance(request)
        flows = list(changes.result_list)
        failures = flow_service.get_failures(flows)
        counts = dict(
            flow_service.repository.attempts.filter(flow_execution__in=[f.pk for f in flows])
            .values_list("flow_execution")
            .annotate(Count("pk"))
        )
        for flow in flows:
            flow.failure = failures.get(flow.pk)
            flow.attempt_count = counts.get(flow.pk, 0)
        changes.result_list = flows
        return changes

    def changelist_view(
        self, request: HttpRequest, extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        """Show the list; refuse a hand-made POST of an action that the user may not take."""
        chosen = request.POST.getlist("action")
        for action in FLOW_ACTIONS:
            if action.name in chosen and not action.is_permitted(request):
                raise PermissionDenied
        return super().changelist_view(request, extra_context)

    @admin.display(description=gettext_lazy("flow"), ordering="template_name")
    def name(self, flow: FlowExecution) -> SafeString:
        return format_html("<bdi>{}</bdi> #{}", flow.template_name, flow.pk)

    @admin.display(description=gettext_lazy("status"), ordering="status")
    def status_pill(self, flow: FlowExecution) -> SafeString:
        return pill(flow.status)

    @admin.display(description=gettext_lazy("progress"))
    def progress(self, flow: FlowExecution) -> SafeString:
        return progress(flow)

    @admin.display(description=gettext_lazy("what went wrong"))
    def what_went_wrong(self, flow: Any) -> SafeString | str:
        if flow.failure is None:
            return ""
        first_line = flow.failure.output.partition("\n")[0]
        shown = first_line if len(first_line) <= 120 else first_line[:119] + "…"
        return format_html("<bdi>{}</bdi>: <bdi>{}</bdi>", flow.failure.task_name, shown)

    @admin.display(description=gettext_lazy("took"))
    def took(self, flow: FlowExecution) -> str:
        return duration(flow.duration)

    @admin.display(description=gettext_lazy("attempts"))
    def attempts(self, flow: Any) -> int:
        return int(flow.attempt_count)

    # One flow

    def get_urls(self) -> list[URLPattern]:
        """Add a URL for each verb."""
        ours = [
            path(
                f"<path:object_id>/{action.name}/",
                self.admin_site.admin_view(self._act_view(action)),
                name=f"ebbs_and_flows_flowexecution_{action.name}",
            )
            for action in FLOW_ACTIONS
        ]
        return [*ours, *super().get_urls()]

    def _act_view(self, action: FlowAction) -> Callable[..., HttpResponse]:
        def view(request: HttpRequest, object_id: str) -> HttpResponse:
            if request.method != "POST":
                return HttpResponseNotAllowed(["POST"])
            if not (self.has_view_permission(request) and action.is_permitted(request)):
                raise PermissionDenied
            flow = self.get_object(request, unquote(object_id))
            if flow is None:
                return self._not_found(request, object_id)
            apply(action, request, flow_service.repository.flows.filter(pk=flow.pk))
            page = reverse(
                f"{self.admin_site.name}:ebbs_and_flows_flowexecution_change", args=[flow.pk]
            )
            return HttpResponseRedirect(page)

        return view

    def change_view(
        self,
        request: HttpRequest,
        object_id: str,
        form_url: str = "",
        extra_context: dict[str, Any] | None = None,
    ) -> HttpResponse:
        """Show one flow."""
        if request.method != "GET":
            return HttpResponseNotAllowed(["GET"])
        flow = self.get_object(request, unquote(object_id))
        if not self.has_view_permission(request, flow):
            raise PermissionDenied
        if flow is None:
            return self._not_found(request, object_id)
        user: Any = request.user
        may_see_values = user.has_perm("ebbs_and_flows.view_executioncontextentry")
        groups, more_entries = _entry_groups(flow) if may_see_values else ([], 0)
        context = {
            **self.admin_site.each_context(request),
            "opts": self.opts,
            "media": self.media,
            "title": str(flow),
            "subtitle": None,
            "flow": flow,
            "pill": pill(flow.status),
            "progress": progress(flow),
            "took": duration(flow.duration),
            "warnings": _warnings(flow),
            "actions": [
                action
                for action in FLOW_ACTIONS
                if action.is_permitted(request) and flow.status in action.statuses
            ],
            "may_delete": self.has_delete_permission(request, flow),
            "tasks": _task_rows(flow),
            "may_see_values": may_see_values,
            "entry_groups": groups,
            "more_entries": more_entries,
            "transitions": _transitions(flow),
            "reruns": list(flow.reruns.order_by("pk")[:20]),
            **(extra_context or {}),
        }
        return TemplateResponse(request, self.change_form_template, context)

    def _not_found(self, request: HttpRequest, object_id: str) -> HttpResponse:
        text = _("There is no flow execution %(id)s.") % {"id": repr(unquote(object_id)[:40])}
        messages.warning(request, text)
        return HttpResponseRedirect(
            reverse(f"{self.admin_site.name}:ebbs_and_flows_flowexecution_changelist")
        )

    # Deleting: finished flows, with all their records

    def get_deleted_objects(
        self, objs: Iterable[Any], request: HttpRequest
    ) -> tuple[list[Any], dict[str, int], set[str], list[Any]]:
        """Say what a deletion takes along; flows that are not over are protected from it."""
        flows = list(objs)
        running = [str(flow) for flow in flows if not flow.is_finished]
        may = super().has_delete_permission(request)
        needed = set() if may else {str(self.opts.verbose_name)}
        names = [str(flow) for flow in flows]
        return names, {str(self.opts.verbose_name_plural): len(flows)}, needed, running

    def delete_queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        """Delete what is still over at this moment."""
        queryset.filter(status__in=FINISHED).delete()


def _warnings(flow: FlowExecution) -> list[str]:
    template = flow_runner.templates.get(flow.template_name)
    if template is None:
        return [
            _(
                "No template %(name)s is registered here, so nothing can run this flow: put the"
                " template back, or cancel the flow."
            )
            % {"name": repr(flow.template_name)}
        ]
    try:
        flow_service.check_drift(template, flow.task_names[: flow.current_task_index], flow.pk)
    except TemplateDrift as drift:
        return [] if flow.status in {FlowStatus.SUCCEEDED, FlowStatus.CANCELLED} else [str(drift)]
    return []


def _task_rows(flow: FlowExecution) -> list[TaskRow]:
    template = flow_runner.templates.get(flow.template_name)
    described = {task.name: task.description for task in template.tasks} if template else {}
    rows = []
    for index, name in enumerate(flow.task_names):
        before = index < flow.first_task_index
        state = _("Done in the flow that this is a rerun of") if before else _("To come")
        summary = described.get(name, "").partition("\n")[0]
        rows.append(TaskRow(name=name, description=summary, status=state))
    attempts = flow_service.repository.attempts.filter(flow_execution=flow.pk)
    for attempt in attempts.order_by("task_index", "attempt")[:MAX_ATTEMPTS]:
        if attempt.task_index == len(rows):
            rows.append(TaskRow(name=attempt.task_name, description="", status=""))
        row = rows[attempt.task_index]
        row.attempts.append(attempt)
        row.status = pill(TaskStatus(attempt.status))
    return rows


def _entry_groups(flow: FlowExecution) -> tuple[list[EntryGroup], int]:
    found = ExecutionContextEntry.objects.using(flow_service.repository.using).filter(
        flow_execution=flow.pk
    )
    rows = (
        found.annotate(shown=Left("value", MAX_SHOWN), size=Length("value"))
        .order_by("pk")
        .values_list("name", "shown", "size", "task_execution__task_name")[: MAX_ENTRIES + 1]
    )
    shown = list(rows)
    more = max(0, found.count() - MAX_ENTRIES) if len(shown) > MAX_ENTRIES else 0
    return [
        EntryGroup(
            writer=writer or _("At scheduling"),
            entries=[(name, shown_value(name, text, size)) for name, text, size, _by in group],
        )
        for writer, group in groupby(shown[:MAX_ENTRIES], key=lambda row: row[3])
    ], more


def _transitions(flow: FlowExecution) -> list[dict[str, Any]]:
    rows = FlowTransition.objects.using(flow_service.repository.using).filter(
        flow_execution=flow.pk
    )
    return [
        {
            "at": row.at,
            "from": pill(row.from_status) if row.from_status else "",
            "to": pill(row.to_status),
            "actor": row.actor,
            "reason": row.reason,
        }
        for row in rows.order_by("-pk")[:200]
    ][::-1]
