"""Runs one claimed flow: task after task, each outcome stored in one transaction."""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

from asgiref.sync import async_to_sync
from django.db import DatabaseError, InterfaceError, OperationalError, connections

from . import telemetry
from .conf import get_settings
from .context import ExecutionContext
from .exceptions import (
    ClaimLost,
    DeadlineExceeded,
    FailFlow,
    InvalidTaskResult,
    RetryLater,
    TaskTimeout,
)
from .flows import FlowTemplate, Task
from .heartbeat import WatchedRun, heartbeat
from .outputs import describe, error_name
from .repository import ClaimedRun, is_contention
from .service import FlowService
from .status import TaskStatus
from .tasklog import Keeper, keep, keeping
from .timeouts import Limit, Overdue, interrupt_after
from .validation import storable_text

logger = logging.getLogger("ebbs_and_flows")

OnTask = Callable[[ClaimedRun, str, TaskStatus], None]

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0
"""Seconds between two tries to reach a database that went away."""


class _BodyFailed(Exception):
    """What a task's own code raised, told apart from what the records' writing raises."""

    def __init__(self, error: BaseException, log: str = "") -> None:
        self.error = error
        self.log = log


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What a task's code returned, in its stored form."""

    entries: dict[str, str]
    log: str


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
        watch = nullcontext(None) if inside else heartbeat.watch(self._repository, run)
        try:
            with watch as watched, keeping() as keeper:
                attempt = _Attempt(self._service, run, watched, keeper)
                while self._run_task(run, template, attempt):
                    pass
        except ClaimLost as lost:
            logger.warning(
                "ClaimLost: %s", lost, extra={"flow": run.flow.pk, "template": template.name}
            )
        except (KeyboardInterrupt, GeneratorExit):
            self._interrupt(run)
            raise

    def _run_task(self, run: ClaimedRun, template: FlowTemplate, attempt: _Attempt) -> bool:
        """Make one attempt and store its outcome; return whether the flow goes on here."""
        with telemetry.attempt(run) as span:
            return self._run_traced(run, template, attempt, span)

    def _run_traced(
        self,
        run: ClaimedRun,
        template: FlowTemplate,
        attempt: _Attempt,
        span: telemetry.Attempt,
    ) -> bool:
        index, name = run.task_index, run.task_name
        task = template.tasks[index]
        next_task = template.tasks[index + 1].name if index + 1 < len(template.tasks) else None
        try:
            if task.atomic:
                with self._repository.step():
                    outcome = self._call(task, run, attempt)
                    goes_on = self._succeed(run, outcome, next_task, hand_back=self._stop())
            else:
                outcome = self._call(task, run, attempt)
                # Asked once: the same answer for each try to store it.
                hand_back = self._stop()
                goes_on = self._persist(
                    run, lambda: self._succeed(run, outcome, next_task, hand_back=hand_back)
                )
        except _BodyFailed as failed:
            return self._fail(run, task, failed.error, failed.log, span)
        except (DatabaseError, InterfaceError) as error:
            if not task.atomic and isinstance(error, (OperationalError, InterfaceError)):
                # The database stayed away for a whole lease: the flow is recovered.
                raise
            # What was written is refused: as late as at the commit of an atomic body.
            return self._fail(run, task, error, "", span)
        self._on_task(run, name, TaskStatus.SUCCEEDED)
        return goes_on

    def _succeed(
        self, run: ClaimedRun, outcome: _Outcome, next_task: str | None, *, hand_back: bool
    ) -> bool:
        return self._service.succeed_step(
            run, outcome.entries, next_task, hand_back=hand_back, log=outcome.log
        )

    # The task's own code

    def _call(self, task: Task, run: ClaimedRun, attempt: _Attempt) -> _Outcome:
        """Run the task's code and return its new entries in their stored form."""
        settings = get_settings()
        context = ExecutionContext.from_stored(
            run.stored,
            flow_execution_id=run.flow.pk,
            task_name=run.task_name,
            attempt=run.attempt,
            idempotency_key=f"{run.flow.pk}-{run.task_index}-{run.task_name}",
            attempt_in_progress=attempt,
        )
        with attempt.keeper.kept(settings.MAX_LOG_BYTES) as log:
            try:
                result = self._limited(task, run, context)
                if not isinstance(result, ExecutionContext):
                    raise InvalidTaskResult(
                        f"Task {task.name!r} returned {type(result).__name__}: return the"
                        f" context, or context.with_entries(…) with what is new."
                    )
                entries = result.encode_new_entries(run.stored, max_bytes=settings.MAX_ENTRY_BYTES)
            except (KeyboardInterrupt, GeneratorExit):
                raise
            except BaseException as error:
                # SystemExit and a cancelled coroutine too: the process goes on, the attempt not.
                raise _BodyFailed(error, str(log)) from error
        return _Outcome(entries, str(log))

    def _limited(self, task: Task, run: ClaimedRun, context: ExecutionContext) -> object:
        """Run the code for as long as the task's time-out and the flow's deadline allow."""
        left = None
        if run.flow.deadline_at is not None:
            left = (run.flow.deadline_at - self._repository.now()).total_seconds()
            if left <= 0:
                raise DeadlineExceeded(run.flow.pk, run.flow.deadline_at)
        if task.timeout is None and left is None:
            return self._result(task, context, Limit(None))
        ends_by_deadline = task.timeout is None or (left is not None and left < task.timeout)
        overdue: BaseException = TaskTimeout(
            f"Task {task.name!r} took longer than its timeout of {task.timeout} s."
        )
        if ends_by_deadline:
            overdue = DeadlineExceeded(run.flow.pk, run.flow.deadline_at)
        limit = Limit(left if ends_by_deadline else task.timeout)
        try:
            result = self._result(task, context, limit)
        except (Overdue, TimeoutError) as error:
            if not limit.is_over:
                raise
            raise overdue from error
        finally:
            if limit.is_over:
                self._drop_connections()
        if limit.is_over:
            # It could not be interrupted, or swallowed the interruption.
            raise overdue
        return result

    @staticmethod
    def _result(task: Task, context: ExecutionContext, limit: Limit) -> object:
        result: object
        if limit.left is None:
            result = task.run(context)
        else:
            with interrupt_after(limit, _end_queries):
                result = task.run(context)
        if not isinstance(result, ExecutionContext) and inspect.isawaitable(result):
            # Not by the alarm: what is awaited would go on in its own thread.
            result = async_to_sync(_wait_for)(result, limit.left)
        return result

    @staticmethod
    def _drop_connections() -> None:
        """Throw away what may have been interrupted in the middle of a query."""
        for connection in connections.all(initialized_only=True):
            if not connection.in_atomic_block:
                connection.close()

    # Failures

    def _fail(
        self,
        run: ClaimedRun,
        task: Task,
        error: BaseException,
        log: str,
        span: telemetry.Attempt,
    ) -> bool:
        """Store that the attempt failed; return whether the flow goes on here after all."""
        # An atomic task's commit may have failed after its step.
        run.ended = None
        retry_after, forgive, interrupted, reason = None, False, False, ""
        settings = get_settings()
        if isinstance(error, RetryLater):
            retry_after, forgive, reason = error.delay, True, storable_text(str(error))
        elif (
            task.atomic
            and run.interruptions < settings.MAX_INTERRUPTIONS
            and self._was_in_the_way(error)
        ):
            # All that the body did to the database was undone, so it is safe to make it again.
            retry_after, interrupted, reason = 0.0, True, "The database undid it"
        elif (
            not isinstance(error, (FailFlow, DeadlineExceeded))
            and task.retry is not None
            and task.retry.covers(error, run.counted_attempts)
        ):
            retry_after = task.retry.delay_after(run.counted_attempts)
        if retry_after is not None and self._ends_before(run, retry_after):
            retry_after = None
        later = error.delay if isinstance(error, RetryLater) and retry_after is not None else None
        output = describe(error, settings.MAX_OUTPUT_BYTES, message_only=later is not None)

        def write() -> bool:
            with self._repository.step():
                return self._service.fail_step(
                    run,
                    output,
                    error_name(error),
                    retry_after=retry_after,
                    forgive=forgive,
                    interrupted=interrupted,
                    reason=reason,
                    log=log,
                    error=error,
                )

        self._repository.drop_broken_connections()
        name = run.task_name
        if self._persist(run, write):
            # An atomic body had been committed, although its commit raised.
            self._on_task(run, name, TaskStatus.SUCCEEDED)
            return True
        span.failed(error)
        extra = {"flow": run.flow.pk, "template": run.flow.template_name, "task": name}
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
                "Task %s of flow %s failed: %s", name, run.flow.pk, error_name(error), extra=extra
            )
        self._on_task(run, name, TaskStatus.FAILED)
        return False

    def _ends_before(self, run: ClaimedRun, retry_after: float) -> bool:
        deadline = run.flow.deadline_at
        if deadline is None:
            return False
        return (deadline - self._repository.now()).total_seconds() <= retry_after

    def _was_in_the_way(self, error: BaseException) -> bool:
        """Whether the database undid a transaction for another one's sake, or was lost."""
        if not isinstance(error, (OperationalError, InterfaceError)):
            return False
        return is_contention(error) or not self._repository.connection.is_usable()

    def _persist(self, run: ClaimedRun, write: Callable[[], bool]) -> bool:
        """Make a write that is a transaction of its own, through a database that comes and goes.

        Where its outcome is unknown, the database is asked, and what was not committed is written
        again, for as long as the lease would last. Returns whether the flow goes on here.
        """
        until = time.monotonic() + get_settings().LEASE_SECONDS
        pause = _FIRST_PAUSE
        unsettled = False
        while True:
            try:
                if unsettled:
                    settled = self._service.settle(run)
                    if settled is not None:
                        return settled
                return write()
            except (OperationalError, InterfaceError):
                connection = self._repository.connection
                if connection.in_atomic_block or time.monotonic() >= until:
                    raise
                logger.warning(
                    "A write of flow %s is tried again.",
                    run.flow.pk,
                    exc_info=not unsettled,
                    extra={"flow": run.flow.pk, "template": run.flow.template_name},
                )
                connection.close()
                unsettled = True
                time.sleep(pause)
                pause = min(pause * 2, _LONGEST_PAUSE)

    def _interrupt(self, run: ClaimedRun) -> None:
        """Give a flow back whose task was broken off by a keyboard interrupt."""
        self._drop_connections()
        with self._repository.step():
            flow = self._repository.lock(run.flow.pk)
            if flow is not None and flow.claim == run.claim:
                self._service.interrupt(flow, f"interrupted: worker {worker_name()} was stopped.")


def _end_queries() -> None:
    """Have PostgreSQL end this thread's queries, which would go on and hold their locks.

    On other databases they do.
    """
    for connection in connections.all(initialized_only=True):
        raw = connection.connection
        # Of psycopg 3.2 and later.
        if hasattr(raw, "cancel_safe") and raw.info.transaction_status.name == "ACTIVE":
            with suppress(Exception):
                raw.cancel_safe(timeout=2)


class _Attempt:
    """What a task's context can ask and say; see `context.Attempt`."""

    def __init__(
        self,
        service: FlowService,
        run: ClaimedRun,
        watched: WatchedRun | None,
        keeper: Keeper,
    ) -> None:
        self.keeper = keeper
        self._service = service
        self._run = run
        self._watched = watched
        self._is_cancelled = False
        self._asked_at = 0.0

    def is_cancel_requested(self) -> bool:
        """Ask the database, at most once a second."""
        if not self._is_cancelled and time.monotonic() >= self._asked_at + 1:
            self._asked_at = time.monotonic()
            try:
                asyncio.get_running_loop()
            except RuntimeError:
                self._ask()
            else:
                # Django allows no query in the thread of an event loop.
                thread = threading.Thread(target=self._ask_and_close)
                thread.start()
                thread.join()
        return self._is_cancelled

    def _ask(self) -> None:
        flow = self._service.repository.flows.filter(pk=self._run.flow.pk, cancel_requested=True)
        self._is_cancelled = flow.exists()

    def _ask_and_close(self) -> None:
        try:
            self._ask()
        finally:
            connections.close_all()

    def report_progress(self, done: float, total: float | None, message: str) -> None:
        """Hand it to the heartbeat, which writes it at most once a second."""
        if self._watched is not None:
            self._watched.report(done, total, storable_text(message))
            heartbeat.wake()

    def keep_record(self, record: logging.LogRecord) -> None:
        """Keep it with all else that the task logs."""
        keep(record)


async def _wait_for(awaitable: Any, seconds: float | None) -> object:
    async with asyncio.timeout(seconds):
        return await awaitable
