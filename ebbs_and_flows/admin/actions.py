"""What operators may do with flows: each verb once, for the list and for a flow's page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from django.contrib import admin, messages
from django.contrib.admin.models import CHANGE
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.utils.translation import gettext_lazy as _
from django.utils.translation import ngettext, ngettext_lazy

from ..exceptions import EbbsAndFlowsError, FlowExecutionNotFound
from ..models import FlowExecution
from ..runner import flow_runner
from ..status import ALLOWED_TRANSITIONS, FINISHED, FlowStatus
from ..validation import MAX_PRIORITY
from .confirm import ask_first
from .pages import actor, log_all
from .rights import may, may_by_template

_BATCH = 500
_SHOWN_ERRORS = 5
_GONE = ngettext_lazy(
    "%d skipped: its values were deleted.", "%d skipped: their values were deleted."
)
_DENIED = ngettext_lazy(
    "%d skipped: you have no permission for it.", "%d skipped: you have no permission for them."
)


Acted = tuple[list[FlowExecution], list[str]]


def _all_at_once(change: Callable[..., list[int]], **options: Any) -> Callable[..., Acted]:
    def act(flows: list[FlowExecution], by: str) -> Acted:
        done = set(change([flow.pk for flow in flows], actor=by, **options))
        return [flow for flow in flows if flow.pk in done], []

    return act


def _fork_each(flows: list[FlowExecution], by: str) -> Acted:
    done, errors = [], []
    for flow in flows:
        try:
            flow_runner.fork_flow_execution(flow, actor=by)
            done.append(flow)
        except FlowExecutionNotFound:
            # Deleted since it was read.
            continue
        except EbbsAndFlowsError as error:
            errors.append(str(error))
    return done, errors


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowAction:
    """One verb: whom it is permitted, for which statuses, what it does and what it says.

    `right` is the name that a template's `permissions` have for it.
    """

    name: str
    label: Any
    permission: str
    right: str
    statuses: frozenset[FlowStatus]
    # Takes flows in a legal status and who acts; returns those that were changed, and what went
    # wrong with others.
    act: Callable[[list[FlowExecution], str], Acted]
    done: Any
    left: Any
    is_destructive: bool = False
    # Whether a flow whose values were deleted is left as it is.
    needs_values: bool = True

    def is_legal(self, flow: FlowExecution) -> bool:
        """Whether the flow may be changed so as it is now."""
        has_what_it_needs = flow.values_deleted_at is None or not self.needs_values
        return flow.status in self.statuses and has_what_it_needs

    def is_permitted(
        self, model_admin: Any, request: HttpRequest, flow: FlowExecution | None = None
    ) -> bool:
        """Whether the model admin permits the verb to the user, for this flow or in general."""
        return bool(getattr(model_admin, f"has_{self.name}_permission")(request, flow))

    def is_granted(self, request: HttpRequest, flow: FlowExecution | None) -> bool:
        """Whether the user has the verb's permission, and the one that the template asks for."""
        return may(request, self.permission, flow) and (
            flow is None or may_by_template(request, self.right, flow.template_name, flow)
        )


FLOW_ACTIONS = (
    FlowAction(
        name="reschedule",
        label=_("Reschedule"),
        permission="reschedule_flowexecution",
        right="reschedule",
        statuses=frozenset({FlowStatus.FAILED}),
        act=_all_at_once(flow_runner.reschedule_flow_executions),
        done=ngettext_lazy("%d flow rescheduled.", "%d flows rescheduled."),
        left=ngettext_lazy(
            "%d left alone: it has not failed.", "%d left alone: they have not failed."
        ),
    ),
    FlowAction(
        name="rerun_now",
        label=_("Rerun now"),
        permission="rerun_flowexecution",
        right="reschedule",
        statuses=frozenset({FlowStatus.FAILED}),
        act=_all_at_once(flow_runner.reschedule_flow_executions, priority=MAX_PRIORITY),
        done=ngettext_lazy("%d flow will run next.", "%d flows will run next."),
        left=ngettext_lazy(
            "%d left alone: it has not failed.", "%d left alone: they have not failed."
        ),
    ),
    FlowAction(
        name="rerun_from_start",
        label=_("Rerun from the start"),
        permission="rerun_flowexecution",
        right="rerun",
        statuses=frozenset(FINISHED),
        act=_fork_each,
        done=ngettext_lazy(
            "%d new flow scheduled from the start.", "%d new flows scheduled from the start."
        ),
        left=ngettext_lazy(
            "%d left alone: it is not over yet.", "%d left alone: they are not over yet."
        ),
    ),
    FlowAction(
        name="cancel",
        label=_("Cancel"),
        permission="cancel_flowexecution",
        right="cancel",
        statuses=frozenset(
            status for status, to in ALLOWED_TRANSITIONS.items() if FlowStatus.CANCELLED in to
        ),
        act=_all_at_once(flow_runner.cancel_flow_executions),
        done=ngettext_lazy(
            "%d flow cancelled, after its task in progress if it was running.",
            "%d flows cancelled, after the task in progress where one was running.",
        ),
        left=ngettext_lazy(
            "%d left alone: it is over already.", "%d left alone: they are over already."
        ),
        is_destructive=True,
        needs_values=False,
    ),
)


def apply(
    action: FlowAction, model_admin: Any, request: HttpRequest, flows: QuerySet[FlowExecution]
) -> None:
    """Do it to each flow where that is legal; say what came out.

    The flows are read and changed in batches, so that memory does not grow with their number.
    """
    by = actor(request)
    done = left = gone = denied = more = 0
    errors: set[str] = set()
    for batch in in_batches(flows):
        possible = [flow for flow in batch if action.is_legal(flow)]
        legal = [flow for flow in possible if action.is_permitted(model_admin, request, flow)]
        denied += len(possible) - len(legal)
        left -= len(possible) - len(legal)
        without = sum(flow.values_deleted_at is not None for flow in batch)
        gone += without if action.needs_values else 0
        changed, problems = action.act(legal, by) if legal else ([], [])
        if changed:
            log_all(request, changed, CHANGE, str(action.label))
        done += len(changed)
        # Also what has changed since it was read.
        left += len(batch) - len(changed) - len(problems)
        left -= without if action.needs_values else 0
        for problem in problems:
            # Each may name its flow, so that they are not all kept.
            if len(errors) < _SHOWN_ERRORS:
                errors.add(problem)
            else:
                more += problem not in errors
    if done:
        messages.success(request, action.done % done)
    if left:
        messages.warning(request, action.left % left)
    if gone:
        messages.warning(request, _GONE % gone)
    if denied:
        messages.warning(request, _DENIED % denied)
    for text in sorted(errors):
        messages.error(request, text)
    if more:
        messages.error(request, ngettext("%d more error.", "%d more errors.", more) % more)


def in_batches(flows: QuerySet[FlowExecution]) -> Iterator[list[FlowExecution]]:
    """Yield all flows in short lists, the newest first."""
    # Downwards, so that what is forked meanwhile is not met.
    ordered = flows.order_by("-pk")
    batch = list(ordered[:_BATCH])
    while batch:
        yield batch
        batch = list(ordered.filter(pk__lt=batch[-1].pk)[:_BATCH])


def list_action(action: FlowAction) -> Any:
    """Return the verb as an action of the list."""

    @admin.action(description=action.label, permissions=[action.name])
    def on_selected(
        model_admin: Any, request: HttpRequest, flows: QuerySet[FlowExecution]
    ) -> HttpResponse | None:
        flows, question = ask_first(model_admin, request, action, flows)
        if question is None:
            apply(action, model_admin, request, flows)
        return question

    on_selected.__name__ = action.name
    return on_selected
