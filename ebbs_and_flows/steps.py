"""What a run writes: its claim, each step, a failure, an interruption. A part of `FlowService`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from typing import Any

from . import telemetry
from .actors import RECOVERY, RETRY
from .conf import get_settings
from .exceptions import ClaimLost, DeadlineExceeded, EbbsAndFlowsError, TemplateDrift
from .flows import FlowTemplate
from .models import FlowExecution, FlowTransition, TaskExecution
from .outputs import Failure
from .plans import Fit, Offer, Plan, difference, fit, offer
from .repository import ClaimedRun, DatabaseNow, Due, FlowRepository
from .signals import announce_status, announce_task
from .status import WAITING, FlowStatus, TaskStatus
from .validation import NAME_LENGTH

logger = logging.getLogger("ebbs_and_flows")

CLAIMABLE = (*WAITING, FlowStatus.RUNNING)
"""What a worker may take: what waits, and what was handed back at a task boundary."""


_MOST_PLANS = 1000
"""How many plans of other code a process remembers when their flows are no longer ready."""


def transition(
    from_status: str, to_status: str, *, actor: str = "", reason: str = ""
) -> FlowTransition:
    """Return the unsaved record of a change of status; the database gives its time."""
    return FlowTransition(
        from_status=from_status, to_status=to_status, actor=actor[:NAME_LENGTH], reason=reason
    )


def stored_plan(plan: Plan) -> dict[str, Any]:
    """Return the columns of a flow that hold a plan."""
    return {
        "task_names": list(plan.task_names),
        "template_version": plan.version,
        "plan_digest": plan.digest,
    }


def drifted(flow_id: int, stored: Plan, index: int, code: Plan) -> TemplateDrift:
    """Return the error of a flow whose completed tasks are not the code's first ones."""
    return TemplateDrift(
        f"Flow {flow_id} cannot go on: {difference(stored, index, code)}. Put the tasks back as"
        f" they were and reschedule the flow, or fork it from its first task."
    )


class StepService:
    """Claims flows and records what their runs do, over a `FlowRepository`."""

    def __init__(self, repository: FlowRepository | None = None) -> None:
        self.repository = repository or FlowRepository()
        # The plans that flows had which this process has seen due, besides its own, by digest.
        self._plans: dict[str, Plan] = {}
        self._logged: set[tuple[str, str]] = set()

    @property
    def _lease(self) -> timedelta:
        return timedelta(seconds=get_settings().LEASE_SECONDS)

    def record(self, flow: FlowExecution, path: Sequence[FlowTransition]) -> None:
        """Store transitions of a flow and announce them."""
        self.repository.insert_transitions(flow.pk, path)
        self._announce(flow, path)

    def _announce(self, flow: FlowExecution, path: Sequence[FlowTransition]) -> None:
        for item in path:
            announce_status(
                self.repository.using,
                flow.pk,
                item.from_status,
                item.to_status,
                item.actor,
                item.reason,
            )
        # A failure that is retried is no end.
        for item in path[-1:]:
            telemetry.flow_changed(self.repository.using, flow, item.to_status)

    # Claiming

    def claim(
        self,
        templates: Iterable[FlowTemplate],
        worker: str,
        statuses: Sequence[FlowStatus] = CLAIMABLE,
    ) -> ClaimedRun | None:
        """Take the best ready flow of the templates and start its attempt, in one transaction."""
        return self.look_and_claim(templates, worker, statuses, at_once=True)[0]

    def look_and_claim(
        self,
        templates: Iterable[FlowTemplate],
        worker: str,
        statuses: Sequence[FlowStatus] = CLAIMABLE,
        *,
        at_once: bool = False,
    ) -> tuple[ClaimedRun | None, Due]:
        """Do the same, unless `at_once` if nothing else comes first; say what else is to be done.

        That a flow is ready says nothing of whether its template has reached its `max_running`.
        """
        listed = list(templates)
        limits = {
            template.name: template.max_running
            for template in listed
            if template.max_running is not None
        }
        if not limits:
            while True:
                run, due = self.repository.look_and_claim(
                    statuses, self.offers(listed), worker, self._lease, at_once=at_once
                )
                if not self._learn(due, listed) or run is not None or due.ready:
                    return self._announced(run), due
        due = self.look(listed, statuses)
        if not due.ready or (due.comes_first and not at_once):
            return None, due
        offers = self.offers(listed)
        best = self.repository.best_template(statuses, offers, limits)
        if best is None:
            return None, due
        if best not in limits:
            # No limit has to be looked after: that takes longer than the claim.
            of_best = [item for item in offers if item.plan.template_name == best]
            run = self.repository.claim_due(statuses, of_best, worker, self._lease)
            if run is not None:
                return self._announced(run), due

        def take(free: set[str]) -> ClaimedRun | None:
            may_run = [
                item
                for item in offers
                if item.plan.template_name not in limits or item.plan.template_name in free
            ]
            return self.repository.claim_due(statuses, may_run, worker, self._lease)

        return self._claim(limits, take), due

    # Plans

    def look(
        self,
        templates: Iterable[FlowTemplate],
        statuses: Sequence[FlowStatus] = CLAIMABLE,
        *,
        ahead: timedelta | None = None,
    ) -> Due:
        """Return what there is to be done with the templates; by one query, except for new plans.

        A plan that this process has not met before costs two further queries, once.
        """
        listed = list(templates)
        while True:
            due = self.repository.look(statuses, self.offers(listed), ahead=ahead)
            if not self._learn(due, listed):
                return due

    def offers(self, templates: Iterable[FlowTemplate]) -> list[Offer]:
        """Return which flows may be claimed: of each template's plan, and of plans that fit it."""
        codes = {template.name: template.plan for template in templates}
        found = [Offer(code, code, code.task_names) for code in codes.values()]
        own = {code.digest for code in codes.values()}
        for digest, stored in list(self._plans.items()):
            code = codes.get(stored.template_name)
            if code is not None and digest not in own:
                fitting = offer(stored, code)
                if fitting is not None:
                    found.append(replace(fitting, stored_digest=digest))
        return found

    def _learn(self, due: Due, templates: Iterable[FlowTemplate]) -> bool:
        """Remember the plans that are new to this process; return whether there were some."""
        codes = {template.name: template.plan for template in templates}
        known = self._plans.keys() | {code.digest for code in codes.values()}
        if due.plans <= known:
            return False
        found = self.repository.find_plans(due.plans - known)
        if len(self._plans) + len(found) > _MOST_PLANS:
            # What is ready now is kept, however many plans that are: none is learnt twice.
            self._plans = {
                digest: plan for digest, plan in self._plans.items() if digest in due.plans
            }
        for digest, plan in found.items():
            self._plans[digest] = plan
            code = codes.get(plan.template_name)
            if code is not None and offer(plan, code) is None:
                self._log_left(plan, 0, code)
        return bool(found)

    def _log_left(self, plan: Plan, index: int, code: Plan) -> None:
        key = (plan.digest, code.digest)
        if key in self._logged:
            return
        self._logged.add(key)
        logger.warning(
            "Flows of template %s, version %s, are left to workers with other code: %s.",
            plan.template_name,
            plan.version,
            difference(plan, index, code),
            extra={"template": plan.template_name},
        )

    def claim_flow(
        self, flow: FlowExecution, template: FlowTemplate, worker: str
    ) -> ClaimedRun | None:
        """Take that flow, due or not, and start its attempt; None if it is not free.

        Nor is it where its template is paused or as many of its flows run as may.
        """
        if flow.status not in CLAIMABLE:
            return None
        limits = {} if template.max_running is None else {template.name: template.max_running}

        stored, code = flow.plan, template.plan
        fitting = offer(stored, code)
        if fitting is None or flow.current_task_index > fitting.up_to:
            self._log_left(stored, flow.current_task_index, code)
            return None

        def take(free: set[str]) -> ClaimedRun | None:
            if limits and not free:
                return None
            return self.repository.claim_flow(flow, fitting, worker, self._lease)

        return self._claim(limits, take, wait=True)

    def _claim(
        self,
        limits: Mapping[str, int],
        take: Callable[[set[str]], ClaimedRun | None],
        *,
        wait: bool = False,
    ) -> ClaimedRun | None:
        """Take a flow, told of which of the limited templates another one may run."""
        if not limits:
            return self._announced(take(set()))
        self.repository.in_transaction(lambda: self.repository.have_states(limits))
        # A worker that is frozen in the middle would keep its lock, and hold up the templates.
        idle = self._lease / 3
        with self.repository.idle_limited(idle):
            run = self.repository.in_transaction(
                lambda: take(self.repository.lock_free_places(limits, idle=idle, wait=wait)),
                durable=True,
            )
        return self._announced(run)

    def _announced(self, run: ClaimedRun | None) -> ClaimedRun | None:
        if run is not None and run.claimed_from != FlowStatus.RUNNING:
            announce_status(
                self.repository.using,
                run.flow.pk,
                run.claimed_from,
                FlowStatus.RUNNING,
                run.worker,
            )
        return run

    def begin(self, run: ClaimedRun, template: FlowTemplate) -> bool:
        """Return whether a claimed flow can go on; if not, it is over.

        It is when every task is done, when the template drifted, and after its deadline.
        """
        telemetry.trace_late(
            run, lambda traceparent: self.repository.fenced(run).update(traceparent=traceparent)
        )
        refusal: EbbsAndFlowsError | None = None
        try:
            self._check_plan(run, template)
            self._check_deadline(run)
        except (TemplateDrift, DeadlineExceeded) as error:
            refusal = error
        if refusal is not None:
            with self.repository.step():
                if not run.attempt:
                    planned = (*run.flow.task_names, "?")[: run.task_index + 1][-1]
                    last = self.repository.last_attempt(run.flow.pk, planned)
                    self.repository.start_attempt(run, planned, last + 1)
                with telemetry.attempt(run) as span:
                    failure = Failure.without_traceback(type(refusal).__name__, str(refusal))
                    self.fail_step(run, failure, error=refusal)
                    span.failed(refusal)
            return False
        self._store_plan_at_start(run, template)
        if run.attempt:
            return True
        with self.repository.step():
            self._end(run)
        return False

    @staticmethod
    def _check_plan(run: ClaimedRun, template: FlowTemplate) -> None:
        stored, code = run.flow.plan, template.plan
        if fit(stored, run.task_index, code) is not Fit.TAKES:
            raise drifted(run.flow.pk, stored, run.task_index, code)

    def _store_plan_at_start(self, run: ClaimedRun, template: FlowTemplate) -> None:
        """Store the code's plan if the claimed task, or the end, differs from the stored plan."""
        code = template.plan
        if run.flow.plan == code:
            return
        run.new_plan = code
        index = run.task_index
        if run.flow.plan.task_names[index : index + 1] == code.task_names[index : index + 1]:
            return
        # Attempts at what stood here before do not count for the task that now does.
        forgiven = max(run.attempt - 1, 0)
        self.repository.fenced(run).update(
            forgiven_attempts=forgiven, interruptions=0, **stored_plan(code)
        )
        run.forgiven_attempts, run.interruptions = forgiven, 0
        run.flow.task_names = list(code.task_names)
        run.flow.template_version, run.flow.plan_digest = code.version, code.digest
        run.new_plan = None

    @staticmethod
    def check_drift(template: FlowTemplate, flow: FlowExecution, index: int) -> None:
        """Raise `TemplateDrift` unless the flow's first tasks are the template's first ones."""
        stored, code = flow.plan, template.plan
        if stored.task_names[:index] != code.task_names[:index]:
            raise drifted(flow.pk, stored, index, code)

    def _check_deadline(self, run: ClaimedRun) -> None:
        deadline = run.flow.deadline_at
        if deadline is not None and self.repository.now() >= deadline:
            raise DeadlineExceeded(run.flow.pk, deadline)

    # Attempts

    def create_task_execution(
        self, flow_id: int, task_index: int, task_name: str, *, attempt: int, claim: int
    ) -> TaskExecution:
        """Store a RUNNING attempt."""
        return self.repository.insert_attempt(flow_id, task_index, task_name, attempt, claim)

    def update_task_execution(
        self,
        task_execution_id: int,
        status: TaskStatus,
        failure: Failure | None = None,
        *,
        log: str = "",
    ) -> int:
        """Store how a running attempt ended; return 0 when it was not running."""
        columns = {} if failure is None else asdict(failure)
        return self.repository.finish_attempt(task_execution_id, status=status, log=log, **columns)

    # Steps

    def succeed_step(
        self,
        run: ClaimedRun,
        entries: Mapping[str, str],
        next_task: str | None,
        *,
        hand_back: bool = False,
        was_told: bool = False,
        log: str = "",
    ) -> bool:
        """Record that the run's task succeeded and start the next one, in one transaction.

        `was_told` says that the task has seen that the flow is to be cancelled. Returns whether
        this worker goes on with the flow. Raises `ClaimLost` with nothing written but what the
        caller's transaction then rolls back.
        """
        lease = None if hand_back or next_task is None else self._lease
        started = self.repository.finish_step(run, entries, next_task, lease=lease, log=log)
        if started is None:
            is_done = next_task is None and not was_told
            return self._succeed_otherwise(run, entries, log, is_done=is_done)
        announce_task(self.repository.using, run.task_execution_id)
        if next_task is None:
            announce_status(
                self.repository.using,
                run.flow.pk,
                FlowStatus.RUNNING,
                FlowStatus.SUCCEEDED,
                run.worker,
            )
            telemetry.flow_changed(self.repository.using, run.flow, FlowStatus.SUCCEEDED)
        if not started:
            return False
        assert next_task is not None  # noqa: S101 - for the type checker
        self._move_on(run, entries, next_task, started)
        return True

    @staticmethod
    def _move_on(
        run: ClaimedRun, entries: Mapping[str, str], next_task: str, attempt_id: int
    ) -> None:
        if entries:
            run.stored = {**run.stored, **entries}
        if run.plan_needed(next_task) is not None:
            run.new_plan = None
        run.task_index += 1
        run.forgiven_attempts, run.interruptions = run.earlier_attempts.get(next_task, 0), 0
        run.task_name, run.attempt = next_task, run.forgiven_attempts + 1
        run.task_execution_id = attempt_id

    def _succeed_otherwise(
        self, run: ClaimedRun, entries: Mapping[str, str], log: str, *, is_done: bool
    ) -> bool:
        """Do what is left to do where the fence did not hold: the flow was cancelled, or lost.

        `is_done` says that it was the last task, which was not cut short: the flow has succeeded.
        """
        settled = self.settle(run)
        if settled is not None:
            return settled
        with self.repository.transaction():
            end = self._end_too_late_to_cancel if is_done else self._cancel
            end(run, current_task_index=run.task_index + 1)
            self.update_task_execution(run.task_execution_id, TaskStatus.SUCCEEDED, log=log)
            self.repository.insert_entries(run.flow.pk, entries, run.task_execution_id)
            announce_task(self.repository.using, run.task_execution_id)
        return False

    def fail_step(
        self,
        run: ClaimedRun,
        failure: Failure,
        *,
        retry_after: float | None = None,
        forgive: bool = False,
        interrupted: bool = False,
        reason: str = "",
        log: str = "",
        error: BaseException | None = None,
    ) -> bool:
        """Record that the run's task failed, in the caller's transaction.

        With `retry_after` seconds, the flow waits for its next attempt; `forgive` and
        `interrupted` say that this one does not count against the retry allowance. Returns False,
        or what `settle` does where the attempt had been recorded before.
        """
        values: dict[str, object] = {"lease_expires_at": None}
        if retry_after is None:
            values |= {"status": FlowStatus.FAILED, "finished_at": DatabaseNow()}
        else:
            values |= {
                "status": FlowStatus.RESCHEDULED,
                "run_at": DatabaseNow(timedelta(seconds=retry_after)),
                "forgiven_attempts": run.forgiven_attempts + forgive,
                "interruptions": run.interruptions + interrupted,
            }
        if self.repository.fenced(run).update(**values) != 1:
            settled = self.settle(run)
            if settled is not None:
                return settled
            self._cancel(run)
            path = []
        else:
            is_later = forgive and retry_after is not None
            why = "asked to be called again" if is_later else f"failed: {failure.error_type}"
            path = [
                transition(
                    FlowStatus.RUNNING,
                    FlowStatus.FAILED,
                    actor=run.worker,
                    reason=f"{run.task_name} {why}",
                )
            ]
            if retry_after is not None:
                path.append(
                    transition(
                        FlowStatus.FAILED,
                        FlowStatus.RESCHEDULED,
                        actor=RECOVERY if interrupted else RETRY,
                        reason=reason or f"Attempt {run.attempt + 1} in {retry_after:.1f} s",
                    )
                )
        self.update_task_execution(run.task_execution_id, TaskStatus.FAILED, failure, log=log)
        self.record(run.flow, path)
        announce_task(self.repository.using, run.task_execution_id, error)
        return False

    def renew_lease(
        self, run: ClaimedRun, task_execution_id: int, progress: str | None = None
    ) -> None:
        """Renew the lease of a run that makes that attempt; store what the attempt reports.

        Raises `ClaimLost`, but not where the run has ended, or has gone on to its next task.
        """
        if progress is None:
            renewed = self.repository.renew(run.flow.pk, run.claim, self._lease)
        else:
            renewed = self.repository.report_progress(run, progress, self._lease)
        if renewed:
            return
        attempt = self.repository.attempts.filter(pk=task_execution_id).first()
        if attempt is None or attempt.status == TaskStatus.RUNNING or _is_interrupted(attempt):
            self._recorded(run, task_execution_id)

    def mark_idempotency_key_used(self, run: ClaimedRun) -> None:
        """Store that the run's attempt has read its idempotency key; raises `ClaimLost`."""
        if not self.repository.mark_idempotency_key_used(run):
            raise self._claim_lost(run)

    def _recorded(self, run: ClaimedRun, task_execution_id: int) -> TaskExecution:
        """Return a run's attempt as it is stored; raises `ClaimLost` if the claim is lost."""
        flow = self.repository.find(run.flow.pk)
        attempt = self.repository.attempts.filter(pk=task_execution_id).first()
        if flow is None:
            raise self._claim_lost(run, "was deleted while it ran")
        if attempt is None or flow.claim != run.claim or _is_interrupted(attempt):
            raise self._claim_lost(run)
        is_held = flow.status == FlowStatus.RUNNING and flow.lease_expires_at is not None
        if attempt.status == TaskStatus.RUNNING and not is_held:
            raise self._claim_lost(run)
        return attempt

    def settle(self, run: ClaimedRun) -> bool | None:
        """Ask the database whether the run's attempt is recorded as ended.

        None when it is not, and the flow is still held: the record can be made. Else whether this
        worker goes on with the flow, its next attempt taken over from the record. Raises
        `ClaimLost`.
        """
        if self._recorded(run, run.task_execution_id).status == TaskStatus.RUNNING:
            return None
        self._announce_since_claim(run)
        following = self.repository.attempts.filter(
            flow_execution=run.flow.pk, claim=run.claim, status=TaskStatus.RUNNING
        ).first()
        if following is None:
            return False
        stored = self.repository.stored_entries(run.flow.pk)
        self._move_on(run, stored, following.task_name, following.pk)
        return True

    def _announce_since_claim(self, run: ClaimedRun) -> None:
        """Announce what a write recorded whose commit was not reported."""
        announce_task(self.repository.using, run.task_execution_id)
        self._announce(run.flow, self.repository.transitions_since_claim(run.flow.pk))

    @staticmethod
    def _claim_lost(run: ClaimedRun, why: str = "") -> ClaimLost:
        why = why or f"is no longer held under claim {run.claim}"
        return ClaimLost(f"Flow {run.flow.pk} {why}: this worker writes nothing more to it.")

    def _cancel(self, run: ClaimedRun, **values: object) -> None:
        """End a flow that is to be cancelled at a task boundary; raises `ClaimLost`."""
        flow = self.repository.lock(run.flow.pk)
        held = self.repository.held(run.flow.pk, run.claim).filter(cancel_requested=True)
        cancelled = held.update(
            status=FlowStatus.CANCELLED,
            cancel_requested=False,
            finished_at=DatabaseNow(),
            lease_expires_at=None,
            **values,
        )
        if flow is None or cancelled != 1:
            raise self._claim_lost(run)
        self.record(
            run.flow,
            [
                transition(
                    FlowStatus.RUNNING,
                    FlowStatus.CANCELLED,
                    actor=flow.cancel_requested_by or run.worker,
                    reason=flow.cancel_reason or "Cancelled at the end of a task",
                )
            ],
        )

    def _end_too_late_to_cancel(self, run: ClaimedRun, **values: object) -> None:
        """End a flow that was to be cancelled when its last task succeeded; raises `ClaimLost`."""
        flow = self.repository.lock(run.flow.pk)
        held = self.repository.held(run.flow.pk, run.claim).filter(cancel_requested=True)
        ended = held.update(
            status=FlowStatus.SUCCEEDED,
            cancel_requested=False,
            finished_at=DatabaseNow(),
            lease_expires_at=None,
            **values,
        )
        if flow is None or ended != 1:
            raise self._claim_lost(run)
        by = f" by {flow.cancel_requested_by}" if flow.cancel_requested_by else ""
        reason = f"The cancellation{by} came too late: during the last task, which succeeded."
        path = [
            transition(FlowStatus.RUNNING, FlowStatus.SUCCEEDED, actor=run.worker, reason=reason)
        ]
        self.record(run.flow, path)

    def _end(self, run: ClaimedRun) -> None:
        """End a claimed flow that has no task left."""
        ended = self.repository.fenced(run).update(
            status=FlowStatus.SUCCEEDED, finished_at=DatabaseNow(), lease_expires_at=None
        )
        if ended != 1:
            self._cancel(run)
            return
        self.record(
            run.flow,
            [transition(FlowStatus.RUNNING, FlowStatus.SUCCEEDED, actor=run.worker)],
        )

    # Interruptions

    def interrupt(self, flow: FlowExecution, output: str) -> bool:
        """Take a flow back from the worker that held it when `flow` was read.

        The attempt is FAILED; the flow is RESCHEDULED at that task, or stays FAILED when the task
        has lost its worker `MAX_INTERRUPTIONS` times before. Returns False, with nothing written,
        when the worker has shown a sign of life since.
        """
        exhausted = flow.interruptions >= get_settings().MAX_INTERRUPTIONS
        over = exhausted or flow.cancel_requested
        to_status = FlowStatus.RESCHEDULED
        if over:
            to_status = FlowStatus.CANCELLED if flow.cancel_requested else FlowStatus.FAILED
        values: dict[str, object] = {
            "status": to_status,
            "lease_expires_at": None,
            "cancel_requested": False,
            "interruptions": flow.interruptions + 1,
            "finished_at": DatabaseNow() if over else None,
        }
        if not over:
            values |= {"run_at": DatabaseNow(), "ready_rank": -flow.priority}
        held = self.repository.held(flow.pk, flow.claim).filter(
            lease_expires_at=flow.lease_expires_at, cancel_requested=flow.cancel_requested
        )
        if held.update(**values) != 1:
            return False
        if exhausted:
            output += (
                f" It has now lost its worker {flow.interruptions + 1} times, so the flow is not"
                f" continued by itself: find out what ends the worker, then reschedule it."
            )
        self.end_attempts(flow, output)
        path = [transition(FlowStatus.RUNNING, FlowStatus.FAILED, actor=RECOVERY, reason=output)]
        if to_status is not FlowStatus.FAILED:
            by, why = "", ""
            if flow.cancel_requested:
                by, why = flow.cancel_requested_by, flow.cancel_reason
            path.append(transition(FlowStatus.FAILED, to_status, actor=by or RECOVERY, reason=why))
        self.record(flow, path)
        return True

    def end_attempts(self, flow: FlowExecution, output: str) -> None:
        """Record that the attempts of a flow were interrupted, as nobody holds it any more."""
        running = self.repository.attempts.filter(
            flow_execution=flow.pk, status=TaskStatus.RUNNING
        )
        attempts = list(running.values_list("pk", flat=True))
        failure = Failure.without_traceback("TaskInterrupted", output)
        self.repository.finish_running_attempts(
            flow.pk, status=TaskStatus.FAILED, **asdict(failure)
        )
        for attempt in attempts:
            announce_task(self.repository.using, attempt)

    def recover_expired(self, limit: int = 100) -> int:
        """Take back flows whose lease has expired; return how many."""
        recovered = 0
        for flow in list(self.repository.expired()[:limit]):
            seen = flow.lease_expires_at - self._lease if flow.lease_expires_at else None
            with self.repository.atomic():
                # One that is being written to just now is left for the next look.
                mine = self.repository.unlocked(self.repository.flows.filter(pk=flow.pk))
                if mine.exists() and self.interrupt(flow, _lost(flow, seen)):
                    recovered += 1
                    self._trace_lost_attempt(flow)
                    logger.warning(
                        "Flow %s was taken back from worker %s, whose lease had expired.",
                        flow.pk,
                        flow.claimed_by,
                        extra={"flow": flow.pk, "template": flow.template_name},
                    )
        return recovered

    def _trace_lost_attempt(self, flow: FlowExecution) -> None:
        if telemetry.is_installed:
            attempts = self.repository.attempts.filter(flow_execution=flow.pk, claim=flow.claim)
            lost = attempts.order_by("pk").last()
            if lost is not None:
                telemetry.attempt_lost(self.repository.using, flow, lost)


def _is_interrupted(attempt: TaskExecution) -> bool:
    """Whether the attempt was ended by whoever took the flow back."""
    return bool(attempt.error_type == "TaskInterrupted")


def _lost(flow: FlowExecution, seen: datetime | None) -> str:
    when = f"; it was last seen at {seen:%Y-%m-%d %H:%M:%S} UTC" if seen else ""
    return f"interrupted: worker {flow.claimed_by or 'unknown'} was lost{when}."
