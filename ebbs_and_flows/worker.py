"""Runs one claimed flow: task after task, each outcome stored in one transaction."""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

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
    TransactionLeftOpen,
)
from .flows import FlowTemplate, Task
from .heartbeat import WatchedRun, heartbeat
from .outputs import describe, error_name
from .repository import ClaimedRun, is_contention
from .service import FlowService
from .status import TaskStatus
from .tasklog import Keeper, keep, keeping
from .timeouts import Limit, Overdue, interrupt_after
from .transactions import end_left_open, state_of_transactions
from .validation import storable_text

logger = logging.getLogger("ebbs_and_flows")

T = TypeVar("T")
OnTask = Callable[[ClaimedRun, str, TaskStatus], None]

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0
"""Seconds between two tries to reach a database that went away."""


class _BodyFailed(Exception):
    """What a task's own code raised, told apart from what the records' writing raises."""

    def __init__(self, error: BaseException, log: str = "", *, at_commit: bool = False) -> None:
        self.error = error
        self.log = log
        # Or after it, by a hook of the task's own: the step may have been committed.
        self.at_commit = at_commit
        # By the database, with all that the body had done there: it can be made again.
        self.was_undone = False


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
            if not self._service.begin(run, template):
                return
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
        left: float | None = None
        if run.flow.deadline_at is not None:
            left = self._patiently(run, lambda: self._time_left(run))
        log = ""
        try:
            if task.atomic:
                goes_on = self._run_atomic(run, task, attempt, left, next_task)
            else:
                with self._kept_usable():
                    outcome = self._call(task, run, attempt, left)
                log = outcome.log
                # Asked once: the same answer for each try to store it.
                hand_back = self._stop()
                goes_on = self._persist(
                    run, lambda: self._succeed(run, outcome, next_task, hand_back=hand_back)
                )
        except _BodyFailed as failed:
            return self._fail(run, task, failed, span)
        except (DatabaseError, InterfaceError) as error:
            if isinstance(error, (OperationalError, InterfaceError)):
                # The database stayed away for a whole lease: the flow is recovered.
                raise
            # What was written is refused.
            return self._fail(run, task, _BodyFailed(error, log), span)
        self._on_task(run, name, TaskStatus.SUCCEEDED)
        return goes_on

    def _run_atomic(
        self,
        run: ClaimedRun,
        task: Task,
        attempt: _Attempt,
        left: float | None,
        next_task: str | None,
    ) -> bool:
        """Run the task and store its outcome in one transaction.

        Whatever is raised, by the body, by the commit or by a hook of the task's own after it, is
        a `_BodyFailed`; and the run is where it was, for what was not committed has not been.
        """
        before, log = replace(run), ""
        with ExitStack() as begun:
            # Nothing is done yet, so that a writer in the way costs the task nothing.
            self._patiently(run, lambda: begun.enter_context(self._repository.step()))
            step = begun.pop_all()
        raw = self._repository.connection.connection
        try:
            with step:
                outcome = self._call(task, run, attempt, left)
                log = outcome.log
                return self._succeed(run, outcome, next_task, hand_back=self._stop())
        except (KeyboardInterrupt, GeneratorExit, ClaimLost):
            run.go_back_to(before)
            raise
        except _BodyFailed as failed:
            failed.was_undone = self._was_undone(failed.error, raw)
            raise
        except BaseException as error:
            run.go_back_to(before)
            at_commit = _BodyFailed(error, log, at_commit=True)
            at_commit.was_undone = self._was_undone(error, raw)
            raise at_commit from error

    def _was_undone(self, error: BaseException, raw: object) -> bool:
        """Whether the database undid a transaction for another one's sake, or lost it."""
        if not isinstance(error, (OperationalError, InterfaceError)):
            return False
        # Django has opened another connection, or none, where this one was lost.
        return is_contention(error) or self._repository.connection.connection is not raw

    @contextmanager
    def _kept_usable(self) -> Iterator[None]:
        """In a test's transaction, undo what a query of the body's has broken.

        So that its failure can be stored, as it can where there is no transaction around it.
        """
        connection = self._repository.connection
        if not connection.in_atomic_block:
            yield
            return
        savepoint = connection.savepoint()
        try:
            yield
        except BaseException:
            try:
                if connection.needs_rollback:
                    raise DatabaseError
                connection.savepoint_commit(savepoint)
            except DatabaseError:
                connection.needs_rollback = False
                with suppress(DatabaseError):
                    connection.savepoint_rollback(savepoint)
            raise
        if not connection.needs_rollback:
            connection.savepoint_commit(savepoint)

    def _succeed(
        self, run: ClaimedRun, outcome: _Outcome, next_task: str | None, *, hand_back: bool
    ) -> bool:
        return self._service.succeed_step(
            run, outcome.entries, next_task, hand_back=hand_back, log=outcome.log
        )

    # The task's own code

    def _call(
        self, task: Task, run: ClaimedRun, attempt: _Attempt, left: float | None
    ) -> _Outcome:
        """Run the task's code and return its new entries in their stored form.

        `left` are the seconds until the flow's deadline, None where there is none.
        """
        settings = get_settings()
        context = ExecutionContext.from_stored(
            run.stored,
            flow_execution_id=run.flow.pk,
            task_name=run.task_name,
            attempt=run.attempt,
            idempotency_key=f"{run.flow.pk}-{run.task_index}-{run.task_name}",
            attempt_in_progress=attempt,
        )
        before = state_of_transactions()
        with attempt.keeper.kept(settings.MAX_LOG_BYTES) as log:
            try:
                result = self._limited(task, run, context, left)
                if (left_open := end_left_open(before)) is not None:
                    raise TransactionLeftOpen(
                        f"Task {task.name!r} left a transaction open on the database"
                        f" {left_open!r}, so it was undone: end each atomic() block, and turn"
                        f" autocommit on again, before the task returns."
                    )
                if not isinstance(result, ExecutionContext):
                    raise InvalidTaskResult(
                        f"Task {task.name!r} returned {type(result).__name__}: return the"
                        f" context, or context.with_entries(…) with what is new."
                    )
                entries = result.encode_new_entries(run.stored, max_bytes=settings.MAX_ENTRY_BYTES)
            except (KeyboardInterrupt, GeneratorExit) as interruption:
                end_left_open(before, interruption)
                raise
            except BaseException as error:
                end_left_open(before, error)
                # SystemExit and a cancelled coroutine too: the process goes on, the attempt not.
                raise _BodyFailed(error, str(log)) from error
        return _Outcome(entries, str(log))

    def _limited(
        self, task: Task, run: ClaimedRun, context: ExecutionContext, left: float | None
    ) -> object:
        """Run the code for as long as the task's time-out and the flow's deadline allow."""
        if left is not None and left <= 0:
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
        self, run: ClaimedRun, task: Task, failed: _BodyFailed, span: telemetry.Attempt
    ) -> bool:
        """Store that the attempt failed; return whether the flow goes on here after all."""
        error, name, before = failed.error, run.task_name, replace(run)
        self._repository.drop_broken_connections()
        again = _Again.of(run, task, failed)
        after = again.after
        if after is not None and run.flow.deadline_at is not None:
            left = self._patiently(run, lambda: self._time_left(run))
            after = None if left is not None and left <= after else after
        later = after if isinstance(error, RetryLater) else None
        output = describe(error, get_settings().MAX_OUTPUT_BYTES, message_only=later is not None)

        def write() -> bool:
            with self._repository.step():
                return self._service.fail_step(
                    run,
                    output,
                    error_name(error),
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
        goes_on = self._patiently(run, write, ask)
        if failed.at_commit and self._has_succeeded(before.task_execution_id):
            logger.warning(
                "Task %s of flow %s has succeeded; what came after its commit has not: %s",
                name,
                run.flow.pk,
                error_name(error),
                exc_info=error,
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
                "Task %s of flow %s failed: %s", name, run.flow.pk, error_name(error), extra=extra
            )
        self._on_task(run, name, TaskStatus.FAILED)
        return False

    def _has_succeeded(self, task_execution_id: int) -> bool:
        attempts = self._repository.attempts.filter(pk=task_execution_id)
        return attempts.filter(status=TaskStatus.SUCCEEDED).exists()

    def _time_left(self, run: ClaimedRun) -> float | None:
        """Return the seconds until the flow's deadline; None where there is none."""
        deadline = run.flow.deadline_at
        return None if deadline is None else (deadline - self._repository.now()).total_seconds()

    def _persist(self, run: ClaimedRun, write: Callable[[], bool]) -> bool:
        """Make a write that is a transaction of its own, through a database that comes and goes.

        Where its outcome is unknown, the database is asked, and what was not committed is written
        again, for as long as the lease would last. Returns whether the flow goes on here.
        """
        return self._patiently(run, write, lambda: self._service.settle(run))

    def _patiently(
        self,
        run: ClaimedRun,
        action: Callable[[], T],
        ask: Callable[[], T | None] = lambda: None,
    ) -> T:
        """Do what needs the database until it answers, for a lease.

        After a failure `ask()` tells what the action has done after all; None is nothing.
        """
        until = time.monotonic() + get_settings().LEASE_SECONDS
        pause = _FIRST_PAUSE
        unsettled = False
        while True:
            try:
                if unsettled:
                    settled = ask()
                    if settled is not None:
                        return settled
                return action()
            except (OperationalError, InterfaceError):
                connection = self._repository.connection
                if connection.in_atomic_block or time.monotonic() >= until:
                    raise
                logger.warning(
                    "Flow %s: the database does not answer; it is asked again.",
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Again:
    """Whether, when and why a task that failed is to be made again."""

    # Seconds; None is never.
    after: float | None = None
    forgive: bool = False
    interrupted: bool = False
    reason: str = ""

    @classmethod
    def of(cls, run: ClaimedRun, task: Task, failed: _BodyFailed) -> _Again:
        """Return what the error, the database and the task's retry rule say."""
        error = failed.error
        if isinstance(error, RetryLater):
            return cls(after=error.delay, forgive=True, reason=storable_text(str(error)))
        if failed.was_undone and run.interruptions < get_settings().MAX_INTERRUPTIONS:
            return cls(after=0.0, interrupted=True, reason="The database undid it")
        if (
            not isinstance(error, (FailFlow, DeadlineExceeded))
            and task.retry is not None
            and task.retry.covers(error, run.counted_attempts)
        ):
            return cls(after=task.retry.delay_after(run.counted_attempts))
        return cls()


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
