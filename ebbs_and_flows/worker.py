"""Runs one claimed flow: task after task, each outcome stored in one transaction."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, TypeVar

from django.db import DatabaseError, InterfaceError

from . import telemetry
from .body import AttemptInProgress, BodyFailed, Outcome, drop_connections, run_body
from .child_processes import SameProcess
from .conf import get_settings
from .context import is_number
from .error_chain import single_errors
from .exceptions import (
    ClaimLost,
    DeadlineExceeded,
    FailFlow,
    RetryLater,
)
from .flows import FlowTemplate, Task
from .heartbeat import WatchedRun, heartbeat, report_claim_lost
from .outputs import describe, error_message, for_log
from .repository import ClaimedRun, is_contention, is_outage, is_refusal
from .service import FlowService
from .session_state import close_changed_sessions
from .status import TaskStatus
from .tasklog import keeping
from .transactions import kept_usable

logger = logging.getLogger("ebbs_and_flows")

T = TypeVar("T")
OnTask = Callable[[ClaimedRun, str, TaskStatus], None]


def worker_name() -> str:
    """Return the name under which this process claims flows: its host and process id."""
    return f"{socket.gethostname()[:150]}:{os.getpid()}"


class Worker:
    """Runs the tasks of claimed flows over a `FlowService`."""

    def __init__(
        self,
        service: FlowService,
        *,
        stop: Callable[[], bool] | None = None,
        on_task: OnTask | None = None,
    ) -> None:
        self._service = service
        self._repository = service.repository
        self._stop = stop or (lambda: False)
        self._on_task = on_task or (lambda run, name, status: None)

    def run(self, run: ClaimedRun, template: FlowTemplate) -> None:
        """Run a claimed flow to its end, or until `stop()` is true at a task boundary."""
        # In a test's transaction another connection would see neither the flow nor a free row.
        inside = self._repository.connection.in_atomic_block
        watch = nullcontext(None) if inside else heartbeat.watch(self._service, run)
        watched: WatchedRun | None = None
        try:
            before = replace(run)
            if not self._retry_on_outage(
                run,
                lambda: self._service.begin(run, template),
                lambda: run.go_back_to(before),
            ):
                return
            with watch as watched, keeping() as keeper:
                attempt = AttemptInProgress(self._service, run, watched, keeper)
                while self._run_task(run, template, attempt):
                    pass
        except ClaimLost as lost:
            if watched is None or watched.lost is None:
                report_claim_lost(run, lost)
            else:
                logger.info(
                    "The task in progress of flow %s has ended, and what it returned is thrown"
                    " away, as its claim was lost.",
                    run.flow.pk,
                    extra={"flow": run.flow.pk, "template": template.name},
                )
        except (KeyboardInterrupt, GeneratorExit):
            self._interrupt(run)
            raise

    def _run_task(
        self, run: ClaimedRun, template: FlowTemplate, attempt: AttemptInProgress
    ) -> bool:
        """Make one attempt and store its outcome; return whether the flow goes on here."""
        with telemetry.attempt(run) as span:
            return self._run_traced(run, template, attempt, span)

    def _run_traced(
        self,
        run: ClaimedRun,
        template: FlowTemplate,
        attempt: AttemptInProgress,
        span: telemetry.Attempt,
    ) -> bool:
        index, name = run.task_index, run.task_name
        task = template.tasks[index]
        next_task = template.tasks[index + 1].name if index + 1 < len(template.tasks) else None
        ends_at = self._deadline(run)
        log = ""
        try:
            if task.atomic:
                goes_on = self._run_atomic(run, task, attempt, ends_at, next_task)
            else:
                with kept_usable(self._repository.connection):
                    outcome = run_body(task, run, attempt, ends_at)
                    log = outcome.log
                # Asked once: the same answer for each try to store it.
                hand_back = self._stop()
                goes_on = self._retry_on_outage(
                    run,
                    lambda: self._succeed(run, outcome, next_task, hand_back=hand_back),
                    lambda: self._service.settle(run),
                )
        except BodyFailed as failed:
            return self._fail(run, task, failed, span)
        except (DatabaseError, InterfaceError) as error:
            if is_outage(error):
                # The database refused for a whole lease: the flow is recovered.
                raise
            # What was written is refused.
            return self._fail(run, task, BodyFailed(error, log), span)
        self._on_task(run, name, TaskStatus.SUCCEEDED)
        return goes_on

    def _run_atomic(
        self,
        run: ClaimedRun,
        task: Task,
        attempt: AttemptInProgress,
        ends_at: float | None,
        next_task: str | None,
    ) -> bool:
        """Run the task and store its outcome in one transaction.

        Whatever is raised, by the body, by the commit or by a hook of the task's own after it, is
        a `BodyFailed`; and the run is where it was, for what was not committed has not been.
        """
        before, raw, log, has_refused = replace(run), None, "", False
        connection = self._repository.connection
        try:
            step = self._repository.step()
            # Nothing is done yet, so that a writer in the way costs the task nothing.
            self._retry_on_outage(run, step.__enter__)
            # Hooks of the task's own run after the commit.
            with SameProcess(), _Entered(step):
                raw = connection.connection
                try:
                    outcome = run_body(task, run, attempt, ends_at)
                    log = outcome.log
                    return self._succeed(run, outcome, next_task, hand_back=self._stop())
                except BaseException:
                    # The rollback forgets it.
                    has_refused = connection.errors_occurred
                    raise
        except (KeyboardInterrupt, GeneratorExit, ClaimLost):
            run.go_back_to(before)
            raise
        except BodyFailed as failed:
            failed.was_undone = self._was_undone(failed.error, raw, has_refused)
            raise
        except BaseException as error:
            if raw is None:
                # It could not begin.
                raise
            run.go_back_to(before)
            was_undone = self._was_undone(error, raw, has_refused)
            raise BodyFailed(error, log, at_commit=True, was_undone=was_undone) from error
        finally:
            close_changed_sessions()

    def _was_undone(self, error: BaseException, raw: object, has_refused: bool) -> bool:
        """Whether the database undid a transaction for another one's sake, lost or refused it."""
        if not is_outage(error):
            return False
        # Django has opened another connection, or none, where this one was lost.
        is_lost = self._repository.connection.connection is not raw
        # A read-only database of the task's own is the task's affair.
        return is_lost or is_contention(error) or (has_refused and is_refusal(error))

    def _succeed(
        self, run: ClaimedRun, outcome: Outcome, next_task: str | None, *, hand_back: bool
    ) -> bool:
        return self._service.succeed_step(
            run,
            outcome.entries,
            next_task,
            hand_back=hand_back,
            was_told=outcome.was_told,
            log=outcome.log,
        )

    # Failures

    def _fail(
        self, run: ClaimedRun, task: Task, failed: BodyFailed, span: telemetry.Attempt
    ) -> bool:
        """Store that the attempt failed; return whether the flow goes on here after all."""
        name, before = run.task_name, replace(run)
        self._repository.drop_broken_connections()
        again = _Again.of(run, task, failed)
        error = again.error
        after, ends_at = again.after, self._deadline(run)
        if after is not None and ends_at is not None and time.monotonic() + after >= ends_at:
            after = None
        later = after if _wanted_delay(error) is not None else None
        failure = describe(error, get_settings().MAX_OUTPUT_BYTES, message_only=later is not None)

        def write() -> bool:
            with self._repository.step():
                return self._service.fail_step(
                    run,
                    failure,
                    retry_after=after,
                    forgive=again.forgive,
                    interrupted=again.interrupted,
                    reason=again.reason,
                    log=failed.log,
                    error=error,
                )

        def ask() -> bool | None:
            # What a write had settled, whose commit is in doubt, is forgotten.
            run.go_back_to(before)
            return self._service.settle(run)

        extra = {"flow": run.flow.pk, "template": run.flow.template_name, "task": name}
        goes_on = self._retry_on_outage(run, write, ask)
        if failed.at_commit and self._has_succeeded(run, before.task_execution_id):
            logger.warning(
                "Task %s of flow %s has succeeded; what came after its commit has not: %s",
                name,
                run.flow.pk,
                for_log(error),
                extra=extra,
            )
            self._on_task(run, name, TaskStatus.SUCCEEDED)
            return goes_on
        span.failed(error)
        if later is not None:
            logger.info(
                "Task %s of flow %s asked to be called again in %g s.",
                name,
                run.flow.pk,
                later,
                extra=extra,
            )
        else:
            logger.warning(
                "Task %s of flow %s failed: %s", name, run.flow.pk, failure.error_type, extra=extra
            )
        self._on_task(run, name, TaskStatus.FAILED)
        return False

    def _has_succeeded(self, run: ClaimedRun, task_execution_id: int) -> bool:
        attempts = self._repository.attempts.filter(pk=task_execution_id)
        return self._retry_on_outage(run, attempts.filter(status=TaskStatus.SUCCEEDED).exists)

    def _deadline(self, run: ClaimedRun) -> float | None:
        """Return the flow's deadline on the monotonic clock; None where there is none."""
        deadline = run.flow.deadline_at
        if deadline is None:
            return None
        now = self._retry_on_outage(run, self._repository.now)
        return time.monotonic() + (deadline - now).total_seconds()

    def _retry_on_outage(
        self,
        run: ClaimedRun,
        action: Callable[[], T],
        ask: Callable[[], T | None] = lambda: None,
    ) -> T:
        """Do what needs the database until it answers, for as long as a lease would last."""
        seconds = get_settings().LEASE_SECONDS
        return self._repository.retry_on_outage(run.flow, action, ask, seconds=seconds)

    def _interrupt(self, run: ClaimedRun) -> None:
        """Give a flow back whose task was broken off by a keyboard interrupt."""
        drop_connections()
        with self._repository.step():
            flow = self._repository.lock(run.flow.pk)
            if flow is not None and flow.claim == run.claim:
                self._service.interrupt(flow, f"interrupted: worker {worker_name()} was stopped.")


class _Entered:
    """A block that has been entered. An `ExitStack` would set attributes of a task's error."""

    def __init__(self, block: AbstractContextManager[None]) -> None:
        self._block = block

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        frames: TracebackType | None,
    ) -> None:
        self._block.__exit__(kind, error, frames)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Again:
    """Whether, when and why a task that failed is to be made again."""

    # What is recorded: for a group that asks for later as one, the error that asks for most.
    error: BaseException
    # Seconds; None is never.
    after: float | None = None
    forgive: bool = False
    interrupted: bool = False
    reason: str = ""

    @classmethod
    def of(cls, run: ClaimedRun, task: Task, failed: BodyFailed) -> _Again:
        """Return what the error, the database and the task's retry rule say."""
        error = failed.error
        singles = list(single_errors(error))
        asked = [single for single in singles if _wanted_delay(single) is not None]
        latest = max(asked, key=lambda single: _wanted_delay(single) or 0, default=None)
        later = 0.0 if latest is None else _wanted_delay(latest) or 0.0
        if latest is not None and len(asked) == len(singles):
            return cls(error=latest, after=later, forgive=True, reason=error_message(latest))
        if failed.was_undone and run.interruptions < get_settings().MAX_INTERRUPTIONS:
            return cls(error=error, after=0.0, interrupted=True, reason="The database undid it")
        if any(issubclass(type(single), (FailFlow, DeadlineExceeded)) for single in singles):
            return cls(error=error)
        if task.retry is not None and task.retry.covers(error, run.counted_attempts):
            return cls(error=error, after=max(later, task.retry.delay_after(run.counted_attempts)))
        return cls(error=error)


def _wanted_delay(error: BaseException) -> float | None:
    """Return the seconds that a task asked for with `RetryLater`; None for any other error."""
    # The type, as an error may lie about its class; a subclass may lack the delay.
    if not issubclass(type(error), RetryLater):
        return None
    delay: Any = vars(error).get("delay")
    return delay if is_number(delay) else None
