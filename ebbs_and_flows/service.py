"""FlowService: which status may follow which, and what must stay consistent with it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from django.db import IntegrityError
from django.utils import timezone

from .conf import get_settings
from .context import ExecutionContext
from .exceptions import (
    ClaimLost,
    DuplicateEntry,
    FlowExecutionNotFound,
    IllegalTransition,
    InvalidArgument,
    InvalidFlowTemplate,
    TaskNotFound,
    TemplateDrift,
)
from .flows import FlowTemplate
from .models import (
    MAX_PRIORITY,
    MIN_PRIORITY,
    NAME_LENGTH,
    FlowExecution,
    FlowTransition,
    TaskExecution,
)
from .repository import ClaimedRun, DatabaseNow, FlowRepository
from .status import ALLOWED_TRANSITIONS, FINISHED, WAITING, FlowStatus, TaskStatus

logger = logging.getLogger("ebbs_and_flows")

FlowOrPk = FlowExecution | int

CLAIMABLE = (*WAITING, FlowStatus.RUNNING)
"""What a worker may take: what waits, and what was handed back at a task boundary."""

_WAY_OUT = {
    FlowStatus.SUCCEEDED: "to run it again, fork it",
    FlowStatus.CANCELLED: "to run it again, fork it",
    FlowStatus.FAILED: "reschedule it first",
    FlowStatus.RUNNING: "wait for its end, or cancel it",
    FlowStatus.SCHEDULED: "it waits for a worker already",
    FlowStatus.RESCHEDULED: "it waits for a worker already",
    FlowStatus.CREATED: "schedule it first",
}


def check_transition(flow: FlowExecution, to_status: FlowStatus) -> None:
    """Raise `IllegalTransition` unless the flow may go to that status from the one it has."""
    from_status = FlowStatus(flow.status)
    if to_status not in ALLOWED_TRANSITIONS[from_status]:
        raise IllegalTransition(
            f"Flow {flow.pk} cannot go from {from_status.value} to {to_status.value}:"
            f" {_WAY_OUT[from_status]}."
        )


def transition(
    from_status: str, to_status: str, *, actor: str = "", reason: str = ""
) -> FlowTransition:
    """Return the unsaved record of a change of status; the database gives its time."""
    return FlowTransition(
        from_status=from_status, to_status=to_status, actor=actor[:NAME_LENGTH], reason=reason
    )


def check_text(what: str, value: Any) -> str:
    """Return a text that every database can store; raises `InvalidArgument`."""
    if not isinstance(value, str):
        raise InvalidArgument(f"The {what} is {value!r}: give a text.")
    if len(value) > NAME_LENGTH:
        raise InvalidArgument(
            f"The {what} has {len(value)} characters: give at most {NAME_LENGTH}."
        )
    if not value.isprintable():
        raise InvalidArgument(f"The {what} is {value!r}: give printable characters only.")
    return value


def check_key(key: Any) -> str | None:
    """Return an idempotency key that is the same text on every database."""
    if key is None:
        return None
    text = check_text("key", key)
    if not text or text != text.strip():
        raise InvalidArgument(f"The key is {key!r}: give a text without spaces at its ends.")
    return text


def check_priority(priority: Any) -> int:
    """Return a priority from -100 to 100; raises `InvalidArgument`."""
    if (
        not isinstance(priority, int)
        or isinstance(priority, bool)
        or not MIN_PRIORITY <= priority <= MAX_PRIORITY
    ):
        raise InvalidArgument(
            f"The priority is {priority!r}: give a whole number from {MIN_PRIORITY} to"
            f" {MAX_PRIORITY}."
        )
    return priority


def check_run_at(run_at: Any) -> datetime | None:
    """Return an aware moment, or None for now; raises `InvalidArgument`."""
    if run_at is None:
        return None
    if not isinstance(run_at, datetime):
        raise InvalidArgument(f"run_at is {run_at!r}: give an aware datetime, or None for now.")
    if timezone.is_naive(run_at):
        raise InvalidArgument(
            f"run_at is {run_at.isoformat()}, without a time zone: make it aware, for instance"
            f" with django.utils.timezone.make_aware."
        )
    # MariaDB holds years from 1000, and a time zone may not push a moment over the calendar.
    if not 1000 < run_at.year < 9999:
        raise InvalidArgument(f"run_at is {run_at.isoformat()}: give a year from 1001 to 9998.")
    return run_at


class FlowService:
    """Keeps flows, attempts, entries and transitions consistent, over a `FlowRepository`."""

    def __init__(self, repository: FlowRepository | None = None) -> None:
        self.repository = repository or FlowRepository()

    # Reading

    def get_flow_execution(self, flow: FlowOrPk) -> FlowExecution:
        """Return the flow as it is stored now; raises `FlowExecutionNotFound`."""
        pk: Any = flow.pk if isinstance(flow, FlowExecution) else flow
        if isinstance(pk, str) and pk.isascii() and pk.isdigit():
            pk = int(pk)
        if isinstance(pk, int) and not isinstance(pk, bool) and 0 < pk < 2**63:
            found = self.repository.find(pk)
            if found is not None:
                return found
        raise FlowExecutionNotFound(
            f"There is no flow execution {pk!r}: give a FlowExecution or the id of one."
        )

    def get_runnable_flow(
        self,
        strategy: FlowStatus = FlowStatus.SCHEDULED,
        *,
        template_names: Iterable[str] | None = None,
    ) -> FlowExecution | None:
        """Return the best due flow in a status, unclaimed; None if none is due."""
        return self.repository.due([self.check_strategy(strategy)], template_names).first()

    def get_flow_task_execution_history(self, flow: FlowOrPk) -> list[TaskExecution]:
        """Return every attempt of a flow, in order."""
        pk = self.get_flow_execution(flow).pk
        attempts = self.repository.attempts.filter(flow_execution=pk)
        return list(attempts.order_by("task_index", "attempt"))

    def get_failures(self, flows: Iterable[FlowExecution]) -> dict[int, TaskExecution]:
        """Return what went wrong last in each flow that waits for its failed task, by its id."""
        stopped = {
            flow.pk: flow.current_task_index
            for flow in flows
            if flow.status in {FlowStatus.FAILED, FlowStatus.RESCHEDULED}
        }
        if not stopped:
            return {}
        failed = self.repository.failed_attempts(stopped)
        return {
            attempt.flow_execution_id: attempt
            for attempt in failed
            if attempt.task_index == stopped[attempt.flow_execution_id]
        }

    def count_due(
        self, template_names: Iterable[str], statuses: Sequence[FlowStatus] = CLAIMABLE
    ) -> int:
        """Return how many flows could be claimed now."""
        return self.repository.due(statuses, template_names).count()

    def count_waiting_for_later(self, template_names: Iterable[str]) -> int:
        """Return how many flows wait for a moment that has not come."""
        return self.repository.waiting_for_later(template_names).count()

    @staticmethod
    def check_strategy(strategy: Any) -> FlowStatus:
        """Return a status that flows wait in; raises `InvalidArgument` for any other."""
        if strategy not in WAITING:
            raise InvalidArgument(
                f"The strategy is {strategy!r}: give FlowStatus.SCHEDULED or"
                f" FlowStatus.RESCHEDULED."
            )
        return FlowStatus(strategy)

    # Making flows

    def create_flow_execution(
        self, template: FlowTemplate, context: Mapping[str, Any] | None = None, **options: Any
    ) -> FlowExecution:
        """Store a new run of a template, or return the first one with its key.

        Takes the options, and raises the errors, of `get_or_create_flow_execution`.
        """
        return self.get_or_create_flow_execution(template, context, **options)[0]

    def get_or_create_flow_execution(
        self,
        template: FlowTemplate,
        context: Mapping[str, Any] | None = None,
        *,
        status: FlowStatus = FlowStatus.CREATED,
        run_at: datetime | None = None,
        key: str | None = None,
        priority: int = 0,
        actor: str = "",
        first_task_index: int = 0,
        stored: Mapping[str, str] | None = None,
        rerun_of: FlowExecution | None = None,
    ) -> tuple[FlowExecution, bool]:
        """Store a new run of a template, CREATED or already SCHEDULED.

        Returns the flow and True, or the first flow with that template and key and False.
        `stored` are entries in their stored form, taken over from another flow. Raises
        `InvalidArgument` and the errors of the context's values.
        """
        key, priority, run_at = check_key(key), check_priority(priority), check_run_at(run_at)
        actor = check_text("actor", actor)
        if not template.tasks:
            raise InvalidFlowTemplate(
                f"Template {template.name!r} has no tasks: add one before scheduling it."
            )
        known = dict(stored or {})
        added = self._encode(context, known)
        if key is not None and (first := self.repository.find_by_key(template.name, key)):
            return first, False
        path = [transition("", FlowStatus.CREATED, actor=actor)]
        if status is FlowStatus.SCHEDULED:
            path.append(transition(FlowStatus.CREATED, FlowStatus.SCHEDULED, actor=actor))
        now = self.repository.now()
        for record in path:
            record.at = now
        flow = FlowExecution(
            template_name=template.name,
            task_names=template.task_names,
            first_task_index=first_task_index,
            current_task_index=first_task_index,
            status=status,
            key=key,
            priority=priority,
            run_at=run_at or now,
            created_at=now,
            created_by=actor,
            rerun_of=rerun_of,
        )
        try:
            with self.repository.atomic():
                self.repository.insert_flow(flow, {**known, **added}, path)
        except IntegrityError:
            # Somebody else was first with the key, at the same instant.
            if key is None:
                raise
            first = self.repository.find_by_key_as_committed(template.name, key)
            if first is None:
                raise
            return first, False
        return flow, True

    def _encode(
        self, context: Mapping[str, Any] | None, stored: Mapping[str, str]
    ) -> dict[str, str]:
        if context is None:
            return {}
        if not isinstance(context, ExecutionContext):
            context = ExecutionContext(context)
        return context.encode_new_entries(stored, max_bytes=get_settings().MAX_ENTRY_BYTES)

    def fork(
        self,
        template: FlowTemplate,
        source: FlowExecution,
        *,
        from_task: int | str = 0,
        changes: Mapping[str, Any] | None = None,
        run_at: datetime | None = None,
        priority: int | None = None,
        actor: str = "",
    ) -> FlowExecution:
        """Store a new flow that starts at a task with the context as that task first saw it."""
        index = template.task_index(from_task)
        if index < source.first_task_index:
            raise TaskNotFound(
                f"Flow {source.pk} began at task {source.first_task_index}, so the context that"
                f" task {from_task!r} saw is not in it: fork the flow it is a rerun of."
            )
        if index > source.current_task_index:
            raise TaskNotFound(
                f"Flow {source.pk} has not reached task {from_task!r}: fork it from task"
                f" {source.current_task_index} or an earlier one."
            )
        self.check_drift(template, source.task_names[:index], source.pk)
        stored = self.repository.stored_entries_before(source.pk, index)
        changed = dict(ExecutionContext(changes or {}))
        kept = {name: text for name, text in stored.items() if name not in changed}
        return self.create_flow_execution(
            template,
            changed,
            status=FlowStatus.SCHEDULED,
            run_at=run_at,
            priority=source.priority if priority is None else priority,
            actor=actor,
            first_task_index=index,
            stored=kept,
            rerun_of=source,
        )

    # Changing a status by hand

    def update_flow_status(
        self,
        flow: FlowOrPk,
        to_status: FlowStatus,
        *,
        actor: str = "",
        reason: str = "",
        **values: Any,
    ) -> FlowExecution:
        """Change a flow's status and record the transition; `values` are further columns.

        Raises `IllegalTransition`, `FlowExecutionNotFound`.
        """
        with self.repository.atomic():
            current = self._locked(flow)
            self._change(current, FlowStatus(to_status), actor=actor, reason=reason, **values)
        return self.get_flow_execution(current)

    def _locked(self, flow: FlowOrPk) -> FlowExecution:
        pk = flow.pk if isinstance(flow, FlowExecution) else self.get_flow_execution(flow).pk
        return self.repository.lock(pk) or self.get_flow_execution(pk)

    def _change(
        self,
        flow: FlowExecution,
        to_status: FlowStatus,
        *,
        actor: str = "",
        reason: str = "",
        **values: Any,
    ) -> None:
        """Change the status of a flow that was read (and locked) in this transaction."""
        check_transition(flow, to_status)
        values |= {"status": to_status}
        if to_status is not FlowStatus.RUNNING:
            values |= {"lease_expires_at": None}
            values |= {"finished_at": DatabaseNow() if to_status in FINISHED else None}
        else:
            values |= {"claim": flow.claim + 1, "claimed_by": "", "lease_expires_at": None}
        unchanged = self.repository.flows.filter(pk=flow.pk, status=flow.status, claim=flow.claim)
        if unchanged.update(**values) != 1:
            raise IllegalTransition(
                f"Flow {flow.pk} has just been changed by somebody else: look at it again."
            )
        self.repository.insert_transitions(
            flow.pk, [transition(flow.status, to_status, actor=actor, reason=reason)]
        )
        flow.status = to_status

    def reschedule(
        self,
        flow: FlowOrPk,
        *,
        run_at: datetime | None = None,
        priority: int | None = None,
        actor: str = "",
        reason: str = "",
    ) -> FlowExecution:
        """FAILED -> RESCHEDULED: the failed task is due again, with its whole allowance."""
        run_at, actor = check_run_at(run_at), check_text("actor", actor)
        values: dict[str, Any] = {} if priority is None else {"priority": check_priority(priority)}
        with self.repository.atomic():
            current = self._locked(flow)
            check_transition(current, FlowStatus.RESCHEDULED)
            self._change(
                current,
                FlowStatus.RESCHEDULED,
                actor=actor,
                reason=reason,
                run_at=run_at or DatabaseNow(),
                forgiven_attempts=self.repository.last_attempt(
                    current.pk, current.current_task_index
                ),
                interruptions=0,
                **values,
            )
        return self.get_flow_execution(current)

    def complete_failed_task(
        self,
        flow: FlowOrPk,
        entries: Mapping[str, Any] | None = None,
        *,
        reason: str,
        actor: str = "",
    ) -> FlowExecution:
        """Record the failed task as done by hand; the flow is RESCHEDULED at the next one."""
        actor = check_text("actor", actor)
        if not isinstance(reason, str) or not reason.strip():
            raise InvalidArgument(
                f"The reason is {reason!r}: say in a sentence how the task was done by hand."
            )
        with self.repository.atomic():
            current = self._locked(flow)
            check_transition(current, FlowStatus.RESCHEDULED)
            stored = self.repository.stored_entries(current.pk)
            given = ExecutionContext(entries or {})
            for name in given:
                if name in stored:
                    raise DuplicateEntry(
                        f"Flow {current.pk} already has an entry {name!r}: give only what the"
                        f" task would have added, or fork the flow with changes."
                    )
            added = self._encode(given, stored)
            index = current.current_task_index
            attempt = self.repository.insert_attempt(
                current.pk,
                index,
                (*current.task_names, "?")[min(index, len(current.task_names))],
                self.repository.last_attempt(current.pk, index) + 1,
                current.claim,
                status=TaskStatus.SUCCEEDED,
                finished_at=DatabaseNow(),
                output=f"Done by hand by {actor or 'unknown'}: {storable_text(reason)}",
            )
            self.repository.insert_entries(current.pk, added, attempt.pk)
            self._change(
                current,
                FlowStatus.RESCHEDULED,
                actor=actor,
                reason=f"Done by hand: {storable_text(reason)}",
                run_at=DatabaseNow(),
                current_task_index=index + 1,
                forgiven_attempts=0,
                interruptions=0,
            )
        return self.get_flow_execution(current)

    def cancel(self, flow: FlowOrPk, *, actor: str = "", reason: str = "") -> FlowExecution:
        """Cancel at once when no worker holds the flow, else after the task in progress."""
        actor = check_text("actor", actor)
        with self.repository.atomic():
            current = self._locked(flow)
            check_transition(current, FlowStatus.CANCELLED)
            if current.status == FlowStatus.RUNNING and current.lease_expires_at is not None:
                if not current.cancel_requested:
                    self.repository.held(current.pk, current.claim).update(
                        cancel_requested=True, cancel_requested_by=actor
                    )
            else:
                self._change(current, FlowStatus.CANCELLED, actor=actor, reason=reason)
        return self.get_flow_execution(current)

    # Running: what a worker calls

    def claim(
        self,
        template_names: Iterable[str],
        worker: str,
        statuses: Sequence[FlowStatus] = CLAIMABLE,
    ) -> ClaimedRun | None:
        """Take the best due flow, in the caller's transaction."""
        flow = self.repository.claim_due(statuses, template_names, worker, self._lease)
        return None if flow is None else self._claimed(flow, worker)

    def claim_flow(self, flow: FlowExecution, worker: str) -> ClaimedRun | None:
        """Take that flow, due or not, in the caller's transaction; None if it is not free."""
        if flow.status not in CLAIMABLE or not self.repository.claim(flow, worker, self._lease):
            return None
        return self._claimed(flow, worker)

    def _claimed(self, flow: FlowExecution, worker: str) -> ClaimedRun:
        # RUNNING -> RUNNING is recorded by the attempts themselves.
        if flow.status != FlowStatus.RUNNING:
            self.repository.insert_transitions(
                flow.pk, [transition(flow.status, FlowStatus.RUNNING, actor=worker)]
            )
        return ClaimedRun(
            flow=flow,
            claim=flow.claim + 1,
            task_index=flow.current_task_index,
            stored=self.repository.stored_entries(flow.pk),
            forgiven_attempts=flow.forgiven_attempts,
            interruptions=flow.interruptions,
        )

    @staticmethod
    def check_drift(template: FlowTemplate, completed: Sequence[str], flow_id: int) -> None:
        """Raise `TemplateDrift` unless the completed tasks are the template's first ones."""
        names = [*template.task_names, *([None] * len(completed))]
        for index, (was, now) in enumerate(zip(completed, names, strict=False)):
            if was != now:
                is_now = "has no task" if now is None else f"has {now!r}"
                raise TemplateDrift(
                    f"Flow {flow_id} completed {was!r} as task {index}, where template"
                    f" {template.name!r} now {is_now}: put the tasks back as they were, or run"
                    f" the flow anew."
                )

    def start_first_attempt(self, run: ClaimedRun, template: FlowTemplate) -> bool:
        """Store the RUNNING attempt that a claim begins with, in the claim's transaction.

        Returns False when there is nothing to run: every task is done, or the template drifted,
        and the flow is over.
        """
        names = template.task_names
        try:
            self.check_drift(template, run.flow.task_names[: run.task_index], run.flow.pk)
        except TemplateDrift as drift:
            planned = run.flow.task_names
            self._start_attempt(
                run,
                planned[run.task_index] if run.task_index < len(planned) else "?",
                self.repository.last_attempt(run.flow.pk, run.task_index) + 1,
            )
            self.fail_step(run, str(drift), type(drift).__name__)
            return False
        if run.flow.task_names != names:
            self.repository.fenced(run).update(task_names=names)
            run.flow.task_names = names
        if run.task_index == len(names):
            self._end(run, FlowStatus.SUCCEEDED)
            return False
        self._start_attempt(
            run,
            names[run.task_index],
            self.repository.last_attempt(run.flow.pk, run.task_index) + 1,
        )
        return True

    def _start_attempt(self, run: ClaimedRun, task_name: str, attempt: int) -> None:
        row = self.create_task_execution(
            run.flow.pk, run.task_index, task_name, attempt=attempt, claim=run.claim
        )
        run.task_name, run.attempt, run.task_execution_id = task_name, attempt, row.pk

    def create_task_execution(
        self, flow_id: int, task_index: int, task_name: str, *, attempt: int, claim: int
    ) -> TaskExecution:
        """Store a RUNNING attempt."""
        return self.repository.insert_attempt(flow_id, task_index, task_name, attempt, claim)

    def update_task_execution(
        self,
        task_execution_id: int,
        status: TaskStatus,
        *,
        output: str = "",
        error_type: str = "",
    ) -> None:
        """Store how a running attempt ended."""
        self.repository.finish_attempt(
            task_execution_id,
            status=status,
            output=output,
            error_type=error_type[:NAME_LENGTH],
        )

    def succeed_step(
        self,
        run: ClaimedRun,
        entries: Mapping[str, str],
        next_task: str | None,
        *,
        hand_back: bool = False,
    ) -> bool:
        """Record that the run's task succeeded and start the next one, in one transaction.

        Returns whether this worker goes on with the flow. Raises `ClaimLost` with nothing written
        but what the caller's transaction then rolls back.
        """
        ends = next_task is None
        values: dict[str, Any] = {
            "current_task_index": run.task_index + 1,
            "forgiven_attempts": 0,
            "interruptions": 0,
        }
        if ends:
            values |= {
                "status": FlowStatus.SUCCEEDED,
                "finished_at": DatabaseNow(),
                "lease_expires_at": None,
            }
        elif hand_back:
            values |= {"claimed_by": "", "lease_expires_at": None}
        else:
            values |= {"lease_expires_at": DatabaseNow(self._lease)}
        goes_on = self._advance(run, values)
        self.update_task_execution(run.task_execution_id, TaskStatus.SUCCEEDED)
        self.repository.insert_entries(run.flow.pk, entries, run.task_execution_id)
        run.stored.update(entries)
        run.task_index += 1
        run.forgiven_attempts = run.interruptions = 0
        if ends and goes_on:
            self._record(run, FlowStatus.SUCCEEDED)
        if ends or hand_back or not goes_on:
            return False
        assert next_task is not None  # noqa: S101 - for the type checker
        self._start_attempt(run, next_task, 1)
        return True

    def fail_step(
        self,
        run: ClaimedRun,
        output: str,
        error_type: str,
        *,
        retry_after: float | None = None,
        forgive: bool = False,
        reason: str = "",
    ) -> None:
        """Record that the run's task failed, with its retry in `retry_after` seconds if given."""
        values: dict[str, Any] = {"lease_expires_at": None}
        if retry_after is None:
            values |= {"status": FlowStatus.FAILED, "finished_at": DatabaseNow()}
        else:
            values |= {
                "status": FlowStatus.RESCHEDULED,
                "run_at": DatabaseNow(timedelta(seconds=retry_after)),
                "forgiven_attempts": run.forgiven_attempts + forgive,
            }
        goes_on = self._advance(run, values)
        self.update_task_execution(
            run.task_execution_id, TaskStatus.FAILED, output=output, error_type=error_type
        )
        if not goes_on:
            return
        path = [
            transition(
                FlowStatus.RUNNING,
                FlowStatus.FAILED,
                actor=run.flow.claimed_by,
                reason=f"{run.task_name} failed: {error_type}",
            )
        ]
        if retry_after is not None:
            path.append(
                transition(
                    FlowStatus.FAILED,
                    FlowStatus.RESCHEDULED,
                    actor="retry",
                    reason=reason or f"Attempt {run.attempt + 1} in {retry_after:.1f} s",
                )
            )
        self.repository.insert_transitions(run.flow.pk, path)

    def _advance(self, run: ClaimedRun, values: dict[str, Any]) -> bool:
        """Write the flow's row through the fence; return False when it was cancelled instead."""
        if self.repository.fenced(run).update(**values) == 1:
            return True
        flow = self.repository.lock(run.flow.pk)
        cancelled = {
            "status": FlowStatus.CANCELLED,
            "cancel_requested": False,
            "finished_at": DatabaseNow(),
            "lease_expires_at": None,
            "current_task_index": values.get("current_task_index", run.task_index),
        }
        held = self.repository.held(run.flow.pk, run.claim).filter(cancel_requested=True)
        if flow is None or held.update(**cancelled) != 1:
            raise ClaimLost(
                f"Flow {run.flow.pk} is no longer held under claim {run.claim}: this worker"
                f" stops and writes nothing more."
            )
        self._record(
            run,
            FlowStatus.CANCELLED,
            actor=flow.cancel_requested_by,
            reason="Cancelled at the end of a task",
        )
        return False

    def _end(self, run: ClaimedRun, status: FlowStatus) -> None:
        values = {"status": status, "finished_at": DatabaseNow(), "lease_expires_at": None}
        if self._advance(run, values):
            self._record(run, status)

    def _record(
        self, run: ClaimedRun, to_status: FlowStatus, actor: str = "", reason: str = ""
    ) -> None:
        actor = actor or run.flow.claimed_by
        self.repository.insert_transitions(
            run.flow.pk, [transition(FlowStatus.RUNNING, to_status, actor=actor, reason=reason)]
        )

    # Recovery and pruning

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
        values: dict[str, Any] = {
            "status": to_status,
            "lease_expires_at": None,
            "cancel_requested": False,
            "interruptions": flow.interruptions + 1,
            "finished_at": DatabaseNow() if over else None,
        }
        if not over:
            values["run_at"] = DatabaseNow()
        held = self.repository.held(flow.pk, flow.claim).filter(
            lease_expires_at=flow.lease_expires_at
        )
        if held.update(**values) != 1:
            return False
        if exhausted:
            output += (
                f" It has now lost its worker {flow.interruptions + 1} times, so the flow is not"
                f" continued by itself: find out what ends the worker, then reschedule it."
            )
        self.repository.finish_running_attempts(
            flow.pk, status=TaskStatus.FAILED, output=output, error_type="TaskInterrupted"
        )
        path = [transition(FlowStatus.RUNNING, FlowStatus.FAILED, actor="recovery", reason=output)]
        if to_status is not FlowStatus.FAILED:
            by = flow.cancel_requested_by if flow.cancel_requested else ""
            path.append(transition(FlowStatus.FAILED, to_status, actor=by or "recovery"))
        self.repository.insert_transitions(flow.pk, path)
        return True

    def recover_expired(self, limit: int = 100) -> int:
        """Take back flows whose lease has expired; return how many."""
        recovered = 0
        for flow in list(self.repository.expired()[:limit]):
            seen = flow.lease_expires_at - self._lease if flow.lease_expires_at else None
            with self.repository.atomic():
                if self.interrupt(
                    flow,
                    f"interrupted: worker {flow.claimed_by or 'unknown'} was lost; it was last"
                    f" seen at {seen:%Y-%m-%d %H:%M:%S} UTC.",
                ):
                    recovered += 1
                    logger.warning(
                        "Flow %s was taken back from worker %s, whose lease had expired.",
                        flow.pk,
                        flow.claimed_by,
                        extra={"flow": flow.pk, "template": flow.template_name},
                    )
        return recovered

    def prune_finished(
        self,
        older_than: timedelta,
        *,
        template_name: str | None = None,
        statuses: Iterable[FlowStatus] = FINISHED,
        batch_size: int = 500,
        dry_run: bool = False,
    ) -> int:
        """Delete flows that ended longer ago than that, a transaction a batch; return how many.

        With `dry_run` only count them.
        """
        try:
            before = self.repository.now() - older_than
        except OverflowError:
            return 0
        flows = self.repository.finished_before(before, statuses)
        if template_name is not None:
            flows = flows.filter(template_name=template_name)
        if dry_run:
            return flows.count()
        deleted = 0
        while batch := list(
            flows.order_by("finished_at").values_list("pk", flat=True)[:batch_size]
        ):
            with self.repository.atomic():
                # Asked again: one that was rescheduled meanwhile is kept.
                doomed = flows.filter(pk__in=batch).select_for_update()
                locked = list(doomed.values_list("pk", flat=True))
                self.repository.flows.filter(pk__in=locked).delete()
                deleted += len(locked)
        return deleted

    @property
    def _lease(self) -> timedelta:
        return timedelta(seconds=get_settings().LEASE_SECONDS)


def storable_text(text: str) -> str:
    """Return the text with what a database cannot hold (NUL, lone surrogates) written out."""
    return text.replace("\x00", "\\x00").encode("utf-8", "backslashreplace").decode()


flow_service = FlowService()
