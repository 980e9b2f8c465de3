"""Operators at random: each act is one that the admin or a command offers."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta

from django.db import IntegrityError
from django.db.models import QuerySet

from ebbs_and_flows import EbbsAndFlowsError, FlowStatus, flow_runner
from ebbs_and_flows.models import FlowExecution
from ebbs_and_flows.status import FINISHED

TEMPLATE = "storm"
OVER = (FlowStatus.SUCCEEDED, FlowStatus.CANCELLED)
PAUSE_SECONDS = 1.0


class Operators:
    """People who reschedule, cancel, fork, pause and delete while workers die."""

    def __init__(self) -> None:
        # How each flow may end, by its primary key.
        self.expected: dict[int, tuple[FlowStatus, ...]] = {}
        # Those whose cancellation was accepted.
        self._cancelled: set[int] = set()
        # What was to be deleted; some of it may still be there.
        self._doomed: set[int] = set()
        self.done: Counter[str] = Counter()
        self._paused_until: float | None = None
        self._acts: dict[Callable[[], bool], int] = {
            self.reschedule: 15,
            self.bulk_reschedule: 15,
            self.complete_by_hand: 10,
            self.cancel: 10,
            self.bulk_cancel: 5,
            self.fork: 15,
            self.pause_template: 5,
            self.prune: 5,
            self.delete: 5,
        }

    def act(self) -> None:
        """Do one thing, or find that it cannot be done."""
        act = random.choices(list(self._acts), list(self._acts.values()))[0]
        try:
            if act():
                self.done[act.__name__.replace("_", " ")] += 1
        except (EbbsAndFlowsError, IntegrityError):
            # The flow has changed since it was looked at; a delete met a worker's write.
            self.done["refused"] += 1

    def resume(self) -> None:
        """Resume the template when it was paused for long enough."""
        if self._paused_until is not None and time.monotonic() > self._paused_until:
            flow_runner.resume_flow_template(TEMPLATE)
            self._paused_until = None

    def is_all_over(self) -> bool:
        """Reschedule what failed; return whether every flow is over."""
        left = FlowExecution.objects.exclude(status__in=[str(status) for status in OVER])
        if left.exclude(status=FlowStatus.FAILED).exists():
            return False
        flow_runner.reschedule_flow_executions(list(left.values_list("pk", flat=True)[:100]))
        return not left.exists()

    def _some(self, *statuses: FlowStatus, most: int = 1) -> list[int]:
        flows: QuerySet[FlowExecution] = FlowExecution.objects.all()
        if statuses:
            flows = flows.filter(status__in=[str(status) for status in statuses])
        # The newest ones, of which some are under way.
        recent = list(flows.order_by("-pk").values_list("pk", flat=True)[:60])
        return random.sample(recent, min(most, len(recent)))

    def reschedule(self) -> bool:
        for pk in self._some(FlowStatus.FAILED):
            flow_runner.reschedule_flow_execution(pk, reason="The bank is back.")
            return True
        return False

    def bulk_reschedule(self) -> bool:
        return bool(flow_runner.reschedule_flow_executions(self._some(FlowStatus.FAILED, most=10)))

    def complete_by_hand(self) -> bool:
        for pk in self._some(FlowStatus.FAILED):
            flow_runner.complete_failed_task(pk, reason="Paid in cash.")
            return True
        return False

    def _may_be_cancelled(self, pks: list[int]) -> None:
        for pk in pks:
            self.expected[pk] = OVER

    def cancel(self) -> bool:
        pks = self._some()
        self._may_be_cancelled(pks)
        for pk in pks:
            flow_runner.cancel_flow_execution(pk, reason="Not wanted any more.")
            self._cancelled.add(pk)
        return bool(pks)

    def bulk_cancel(self) -> bool:
        pks = self._some(most=3)
        self._may_be_cancelled(pks)
        cancelled = flow_runner.cancel_flow_executions(pks)
        self._cancelled |= set(cancelled)
        return bool(cancelled)

    def fork(self) -> bool:
        for pk in self._some():
            fork = flow_runner.fork_flow_execution(pk, from_task=random.choice((0, 0, 1, 2)))
            self.expected[fork.pk] = (FlowStatus.SUCCEEDED,)
            return True
        return False

    def pause_template(self) -> bool:
        flow_runner.pause_flow_template(TEMPLATE)
        self._paused_until = time.monotonic() + PAUSE_SECONDS
        return True

    def prune(self) -> bool:
        over = FlowExecution.objects.filter(status__in=[str(status) for status in FINISHED])
        oldest = over.order_by("finished_at").values_list("pk", flat=True)
        self._doomed |= set(oldest[:20])
        return flow_runner.service.prune_finished(timedelta(0), statuses=OVER, limit=3) > 0

    def delete(self) -> bool:
        """Delete a flow as code of a project may, even while a worker runs it."""
        pks = self._some(FlowStatus.RUNNING)
        self._doomed |= set(pks)
        return FlowExecution.objects.filter(pk__in=pks).delete()[0] > 0

    def forgotten_cancellations(self) -> list[str]:
        """Return a sentence for each accepted cancellation that came to nothing."""
        others = FlowExecution.objects.filter(pk__in=self._cancelled).exclude(
            status=FlowStatus.CANCELLED
        )
        # During the last task, which succeeded.
        too_late = others.filter(transitions__reason__contains="came too late")
        return [
            f"Flow {pk} was cancelled, and is {status}."
            for pk, status in others.exclude(pk__in=too_late).values_list("pk", "status")
        ]

    def reconcile(self) -> set[int]:
        """Compare with the tables, as an answer may be lost; return the deleted flows."""
        stored = set(FlowExecution.objects.values_list("pk", flat=True))
        gone = self._doomed - stored
        for pk in gone:
            self.expected.pop(pk, None)
        for pk in stored - self.expected.keys():
            # Only forks get their keys from the answer alone.
            self.expected[pk] = OVER
        return gone
