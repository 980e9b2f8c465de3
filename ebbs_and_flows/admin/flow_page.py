"""One flow's page: its head, timeline, tasks, context and history."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from django.contrib import admin
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.utils.translation import gettext as _

from .. import clock
from ..durations import duration, time_at_work
from ..exceptions import TemplateDrift
from ..models import FlowExecution, FlowTransition, TaskExecution
from ..monitoring import live_codes, why_it_fits_none
from ..runner import flow_runner
from ..service import flow_service
from ..status import FlowStatus
from .access import refresh_url, values_shown
from .actions import FLOW_ACTIONS
from .attempts import MAX_ATTEMPTS, flow_attempts, running_attempt, task_rows
from .entries import entry_groups
from .pages import page_context, values_deleted
from .pieces import cut, moment, pill, progress, reported_progress, trace_link
from .rights import (
    attempts_of,
    entries_of,
    may_see_outputs,
    may_see_values,
    visible_flows,
)
from .timeline import timeline_rows

MAX_TRANSITIONS = 200
MAX_RERUNS = 20
MAX_REASON = 500
TEMPLATE = "admin/ebbs_and_flows/flowexecution/page.html"


def flow_page(
    model_admin: admin.ModelAdmin[Any],
    request: HttpRequest,
    flow: FlowExecution,
    *,
    may_delete: bool,
    **extra: Any,
) -> HttpResponse:
    """Show one flow."""
    site = model_admin.admin_site
    attempts = flow_attempts(attempts_of(site, request, flow))
    now = clock.now()
    waits = flow.status == FlowStatus.RESCHEDULED
    axis, timeline = timeline_rows(
        flow.task_names,
        attempts,
        now=now,
        waits_at=flow.current_task_index if waits else None,
    )
    sees_values, sees_outputs = may_see_values(site, request), may_see_outputs(site, request)
    groups, more_entries = (
        entry_groups(entries_of(site, request, flow)) if sees_values else ([], 0)
    )
    if groups:
        values_shown(request, flow.pk, "flow page")
    permits: Any = model_admin
    visible = visible_flows(site, request)
    actions = [
        action
        for action in FLOW_ACTIONS
        if action.is_legal(flow) and action.is_permitted(model_admin, request, flow)
    ]
    context = page_context(
        model_admin,
        request,
        str(flow),
        flow=flow,
        pill=pill(flow.status),
        progress=progress(flow),
        reported=reported_progress(flow, running_attempt(attempts)),
        facts=_facts(flow, attempts),
        warnings=_warnings(flow),
        actions=[action for action in actions if not action.is_destructive],
        destructive_actions=[action for action in actions if action.is_destructive],
        may_rerun_from=(
            flow.values_deleted_at is None and permits.has_rerun_from_permission(request, flow)
        ),
        may_finish_by_hand=(
            flow.status == FlowStatus.FAILED
            and flow.values_deleted_at is None
            and permits.has_by_hand_permission(request, flow)
        ),
        may_delete=may_delete,
        axis=axis,
        timeline=timeline,
        tasks=task_rows(flow, attempts, with_texts=sees_outputs),
        has_more_attempts=sees_outputs and len(attempts) == MAX_ATTEMPTS,
        may_see_values=sees_values,
        entry_groups=groups,
        more_entries=more_entries,
        transitions=_transitions(flow),
        reruns=list(visible.filter(rerun_of=flow.pk).order_by("-pk")[:MAX_RERUNS]),
        rerun_of=visible.filter(pk=flow.rerun_of_id).first() if flow.rerun_of_id else None,
        refresh_url="" if flow.is_finished else refresh_url(request, flow),
        **extra,
    )
    return TemplateResponse(request, TEMPLATE, context)


def _facts(flow: FlowExecution, attempts: Sequence[TaskExecution]) -> list[tuple[str, Any]]:
    facts = [
        (_("Key"), flow.key),
        (_("Priority"), str(flow.priority)),
        (_("Scheduled for"), moment(flow.run_at)),
        (_("Started"), moment(flow.started_at)),
        (_("Finished"), moment(flow.finished_at)),
        (_("Took") if flow.is_finished else _("Has taken"), _took(flow, attempts)),
        (_("To be over by"), moment(flow.deadline_at)),
        (_("Scheduled by"), flow.created_by),
        (_("Worker"), flow.claimed_by if flow.status == FlowStatus.RUNNING else ""),
        (_("To be cancelled by"), flow.cancel_requested_by if flow.cancel_requested else ""),
        (_("Trace"), trace_link(flow.trace_id)),
    ]
    return [(name, value) for name, value in facts if value]


def _took(flow: FlowExecution, attempts: Sequence[TaskExecution]) -> str:
    if flow.started_at is None:
        return ""
    now = clock.now()
    whole = (flow.finished_at or now) - flow.started_at
    work = None
    if len(attempts) < MAX_ATTEMPTS:
        work = time_at_work(((a.started_at, a.finished_at or now) for a in attempts), whole)
    if work is None:
        return duration(whole)
    # It lay failed for days, say, which nobody takes for its speed.
    return _("%(whole)s, at work for %(work)s of it") % {
        "whole": duration(whole),
        "work": duration(work),
    }


def _warnings(flow: FlowExecution) -> list[str]:
    if flow.values_deleted_at is not None:
        return [values_deleted(flow)]
    if flow.status in {FlowStatus.SUCCEEDED, FlowStatus.CANCELLED}:
        return []
    template = flow_runner.templates.get(flow.template_name)
    if template is None:
        return [
            _(
                "No template %(name)s is registered here, so nothing can run this flow: put the"
                " template back, or cancel the flow."
            )
            % {"name": repr(flow.template_name)}
        ]
    warnings = []
    paused = flow_service.paused_templates().get(flow.template_name)
    if paused is not None and not flow.is_finished:
        warnings.append(
            _("%(name)s is paused: no flow of it starts until it is resumed.")
            % {"name": repr(flow.template_name)}
        )
    try:
        flow_service.check_drift(template, flow, flow.current_task_index)
    except TemplateDrift as drift:
        warnings.append(str(drift))
    if why := why_it_fits_none(flow, live_codes()):
        warnings.append(why)
    return warnings


def _transitions(flow: FlowExecution) -> list[dict[str, Any]]:
    rows = FlowTransition.objects.using(flow_service.repository.using).filter(
        flow_execution=flow.pk
    )
    return [
        {
            "at": moment(row.at),
            "from": pill(row.from_status) if row.from_status else "",
            "to": pill(row.to_status),
            "actor": row.actor,
            "reason": cut(row.reason, MAX_REASON),
        }
        for row in rows.order_by("-pk")[:MAX_TRANSITIONS]
    ][::-1]
