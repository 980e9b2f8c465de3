"""What operators may do with flows: each verb once, for the list and for a flow's page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from django.contrib import admin, messages
from django.contrib.admin.models import CHANGE
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils.translation import gettext_lazy as _
from django.utils.translation import ngettext, ngettext_lazy

from ..exceptions import EbbsAndFlowsError, FlowExecutionNotFound, IllegalTransition
from ..models import FlowExecution
from ..runner import flow_runner
from ..status import ALLOWED_TRANSITIONS, FINISHED, FlowStatus
from ..validation import MAX_PRIORITY
from .pages import actor, log, may

_BATCH = 500
_SHOWN_ERRORS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowAction:
    """One verb: whom it is permitted, for which statuses, what it does and what it says."""

    name: str
    label: Any
    permission: str
    statuses: frozenset[FlowStatus]
    act: Callable[[FlowExecution, str], Any]
    done: Any
    left: Any
    is_destructive: bool = False

    def is_permitted(self, request: HttpRequest) -> bool:
        """Whether the user has the verb's permission."""
        return may(request, self.permission)


FLOW_ACTIONS = (
    FlowAction(
        name="reschedule",
        label=_("Reschedule"),
        permission="reschedule_flowexecution",
        statuses=frozenset({FlowStatus.FAILED}),
        act=lambda flow, actor: flow_runner.reschedule_flow_execution(flow, actor=actor),
        done=ngettext_lazy("%d flow rescheduled.", "%d flows rescheduled."),
        left=ngettext_lazy(
            "%d left alone: it has not failed.", "%d left alone: they have not failed."
        ),
    ),
    FlowAction(
        name="rerun_now",
        label=_("Rerun now"),
        permission="rerun_flowexecution",
        statuses=frozenset({FlowStatus.FAILED}),
        act=lambda flow, actor: flow_runner.reschedule_flow_execution(
            flow, priority=MAX_PRIORITY, actor=actor
        ),
        done=ngettext_lazy("%d flow will run next.", "%d flows will run next."),
        left=ngettext_lazy(
            "%d left alone: it has not failed.", "%d left alone: they have not failed."
        ),
    ),
    FlowAction(
        name="rerun_from_start",
        label=_("Rerun from the start"),
        permission="rerun_flowexecution",
        statuses=frozenset(FINISHED),
        act=lambda flow, actor: flow_runner.fork_flow_execution(flow, actor=actor),
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
        statuses=frozenset(
            status for status, to in ALLOWED_TRANSITIONS.items() if FlowStatus.CANCELLED in to
        ),
        act=lambda flow, actor: flow_runner.cancel_flow_execution(flow, actor=actor),
        done=ngettext_lazy(
            "%d flow cancelled, after its task in progress if it was running.",
            "%d flows cancelled, after the task in progress where one was running.",
        ),
        left=ngettext_lazy(
            "%d left alone: it is over already.", "%d left alone: they are over already."
        ),
        is_destructive=True,
    ),
)


def apply(action: FlowAction, request: HttpRequest, flows: QuerySet[FlowExecution]) -> None:
    """Do it to each flow where that is legal, each in a transaction of its own; say what came out.

    The flows are read in batches, so that memory does not grow with their number.
    """
    by = actor(request)
    done = left = more = 0
    errors: set[str] = set()
    for flow in chain.from_iterable(in_batches(flows)):
        if flow.status not in action.statuses:
            left += 1
            continue
        try:
            action.act(flow, by)
        except (IllegalTransition, FlowExecutionNotFound):
            # Changed since it was read.
            left += 1
        except EbbsAndFlowsError as error:
            # Each may name its flow, so that they are not all kept.
            if len(errors) < _SHOWN_ERRORS:
                errors.add(str(error))
            else:
                more += str(error) not in errors
        else:
            done += 1
            log(request, flow, CHANGE, str(action.label))
    if done:
        messages.success(request, action.done % done)
    if left:
        messages.warning(request, action.left % left)
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
    ) -> None:
        apply(action, request, flows)

    on_selected.__name__ = action.name
    return on_selected
