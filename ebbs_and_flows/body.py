"""Runs a task's own code, within its limits, and takes in what it returns, raises and leaves."""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

from asgiref.current_thread_executor import CurrentThreadExecutor
from asgiref.sync import SyncToAsync, async_to_sync
from django.db import connections

from .child_processes import SameProcess
from .conf import get_settings
from .context import ExecutionContext
from .exceptions import (
    ConnectionClosed,
    DeadlineExceeded,
    InvalidTaskResult,
    TaskTimeout,
    TransactionLeftOpen,
)
from .flows import Task
from .heartbeat import WatchedRun, heartbeat
from .process_state import ProcessState, call_apart
from .redaction import redact_text
from .repository import ClaimedRun
from .service import FlowService
from .session_state import WatchedSessions, close_changed_sessions
from .tasklog import Keeper, keep
from .timeouts import Limit, Overdue, interrupt_after
from .transactions import (
    State,
    closed_by_task,
    end_left_open,
    state_of_transactions,
)
from .validation import storable_text

logger = logging.getLogger("ebbs_and_flows")


class BodyFailed(Exception):
    """What a task's own code raised, told apart from what the records' writing raises."""

    def __init__(
        self,
        error: BaseException,
        log: str = "",
        *,
        at_commit: bool = False,
        was_undone: bool = False,
    ) -> None:
        self.error = error
        self.log = log
        # Raised by the commit, or by a hook of the task's own after it: the step may be committed.
        self.at_commit = at_commit
        # The database undid all that the body had done there, so that it can be made again.
        self.was_undone = was_undone


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a task's code returned, in its stored form."""

    entries: dict[str, str]
    log: str
    # It has seen that its flow is to be cancelled, and may be half done.
    was_told: bool


class AttemptInProgress:
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
        self._connection = service.repository.connection
        self._thread = threading.get_ident()
        self._is_over = False
        self._is_key_marked = False

    def next(self) -> AttemptInProgress:
        """Return the next attempt of the run."""
        attempt = AttemptInProgress(self._service, self._run, self._watched, self.keeper)
        attempt._is_cancelled = self._is_cancelled
        return attempt

    def end(self) -> None:
        """Take in that the task has returned or raised: a later look at its key is no use."""
        self._is_over = True

    def is_cancel_requested(self) -> bool:
        """Whether the task should stop, as the flow is to be cancelled or the claim is lost.

        The database is asked at most once a second. While it does not answer, the last answer
        holds: a question fails no task.
        """
        if self._watched is not None and self._watched.lost is not None:
            return True
        if not self._is_cancelled and time.monotonic() >= self._asked_at + 1:
            self._asked_at = time.monotonic()
            if self._needs_another_connection():
                _do_in_another_thread(self._ask)
            else:
                self._ask()
        return self._is_cancelled

    @property
    def has_seen_cancel(self) -> bool:
        """Whether the task was told that its flow is to be cancelled."""
        return self._is_cancelled

    def _needs_another_connection(self) -> bool:
        """Whether this thread's own connection cannot be asked."""
        # Django allows no query in the thread of an event loop.
        if _in_event_loop():
            return True
        # A query that fails would abort the transaction of an atomic task. In a test's
        # transaction, another connection would not see the flow.
        is_atomic = self._service.repository.connection.in_atomic_block
        return is_atomic and self._watched is not None

    def _ask(self) -> None:
        repository = self._service.repository
        try:
            flow = repository.flows.filter(pk=self._run.flow.pk, cancel_requested=True)
            self._is_cancelled = flow.exists()
        except Exception:
            logger.warning(
                "The database does not tell whether flow %s is to be cancelled; it is asked again"
                " later.",
                self._run.flow.pk,
                exc_info=True,
                extra={"flow": self._run.flow.pk, "template": self._run.flow.template_name},
            )
            repository.close_if_lost()

    def mark_idempotency_key_used(self) -> None:
        """Store once that the attempt has read its key; wait while the database is away.

        The mark survives the rollback of the task's transaction. On SQLite, where only one
        transaction can write, it is a part of that. Raises `ClaimLost`.
        """
        if self._watched is not None and self._watched.lost is not None:
            raise self._watched.lost
        if self._is_key_marked or self._is_over:
            return
        own = self._connection
        in_transaction = own.in_atomic_block or (own.connection is not None and not own.autocommit)
        # Django allows no query in the thread of an event loop.
        is_away = _in_event_loop() or threading.get_ident() != self._thread
        # In a test's transaction, another connection would not see the flow.
        is_part = in_transaction and (self._watched is None or own.vendor == "sqlite")
        if is_away and is_part:
            _do_in_another_thread(self._mark, own)
        elif is_away or (in_transaction and not is_part):
            _do_in_another_thread(self._mark)
        else:
            self._mark()
        self._is_key_marked = True

    def _mark(self) -> None:
        self._service.repository.retry_on_outage(
            self._run.flow,
            lambda: self._service.mark_idempotency_key_used(self._run),
            seconds=get_settings().LEASE_SECONDS,
        )

    def report_progress(self, done: float, total: float | None, message: str) -> None:
        """Hand it to the heartbeat, which writes it at most once a second."""
        if self._watched is not None:
            self._watched.report(done, total, redact_text(storable_text(message)))
            heartbeat.wake()

    def keep_record(self, record: logging.LogRecord) -> None:
        """Keep it with all else that the task logs."""
        keep(record)


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _do_in_another_thread(action: Callable[[], None], shared: Any = None) -> None:
    """Do it in a thread of its own, over a new connection or a `shared` one; raise its error."""
    done: Future[None] = Future()

    def act() -> None:
        try:
            if shared is not None:
                connections[shared.alias] = shared
            action()
        except BaseException as error:  # noqa: BLE001 - raised where it was asked for
            done.set_exception(error)
        else:
            done.set_result(None)
        finally:
            if shared is not None:
                del connections[shared.alias]
            connections.close_all()

    if shared is not None:
        shared.inc_thread_sharing()
    try:
        threading.Thread(target=act, daemon=True).start()
        done.result()
    finally:
        if shared is not None:
            shared.dec_thread_sharing()


def run_body(
    task: Task, run: ClaimedRun, attempt: AttemptInProgress, ends_at: float | None
) -> Outcome:
    """Run the task's code and return its new entries in their stored form.

    `ends_at` is the flow's deadline on the monotonic clock, None where there is none.
    """
    settings, attempt = get_settings(), attempt.next()
    context = ExecutionContext.from_stored(
        run.stored,
        flow_execution_id=run.flow.pk,
        task_name=run.task_name,
        attempt=run.attempt,
        token=run.flow.token,
        attempt_in_progress=attempt,
    )
    before, process = state_of_transactions(), ProcessState.now()
    with attempt.keeper.kept(settings.MAX_LOG_BYTES) as log:
        try:
            left = None if ends_at is None else ends_at - time.monotonic()
            with WatchedSessions():
                result = call_apart(_limited, task, run, context, left)
            _check_connections(task, before)
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
        except BaseException as raised:  # noqa: BLE001 - a task may raise anything
            error: BaseException = raised
            try:
                _check_connections(task, before)
            except ConnectionClosed as closed:
                # What was raised came of it.
                closed.__cause__, error = raised, closed
            end_left_open(before, raised)
            # SystemExit and a cancelled coroutine too: the process goes on, the attempt not.
            raise BodyFailed(error, str(log)) from error
        finally:
            attempt.end()
            if process is not None:
                process.restore()
            close_changed_sessions()
    return Outcome(entries, str(log), attempt.has_seen_cancel)


def _check_connections(task: Task, before: State) -> None:
    """Raise `ConnectionClosed` where the task has closed a connection that is still needed."""
    alias = closed_by_task(before)
    if alias is not None:
        raise ConnectionClosed(
            f"Task {task.name!r} closed the connection to the database {alias!r}, so what it wrote"
            f" there in a transaction is lost: take connection.close(), connections.close_all() or"
            f" the driver's own close() out of the task."
        )


def _limited(task: Task, run: ClaimedRun, context: ExecutionContext, left: float | None) -> object:
    """Run the code for as long as the task's time-out and the flow's deadline allow."""
    if left is not None and left <= 0:
        raise DeadlineExceeded(run.flow.pk, run.flow.deadline_at)
    if task.timeout is None and left is None:
        return _result(task, context, Limit(None))
    ends_by_deadline = task.timeout is None or (left is not None and left < task.timeout)
    overdue: BaseException = TaskTimeout(
        f"Task {task.name!r} took longer than its timeout of {task.timeout} s."
    )
    if ends_by_deadline:
        overdue = DeadlineExceeded(run.flow.pk, run.flow.deadline_at)
    limit = Limit(left if ends_by_deadline else task.timeout)
    try:
        result = _result(task, context, limit)
    except (Overdue, TimeoutError) as error:
        if not limit.is_over:
            raise
        raise overdue from error
    finally:
        if limit.is_over:
            drop_connections()
    if limit.is_over:
        # It could not be interrupted, or swallowed the interruption.
        raise overdue
    return result


def _result(task: Task, context: ExecutionContext, limit: Limit) -> object:
    result: object
    if limit.left is None:
        with SameProcess():
            result = task.run(context)
    else:
        with interrupt_after(limit, _end_queries), SameProcess():
            result = task.run(context)
    if not isinstance(result, ExecutionContext) and inspect.isawaitable(result):
        # The event loop, which has a thread of its own, cancels what is awaited. The alarm ends
        # what `sync_to_async` has this thread do meanwhile.
        with interrupt_after(limit, _end_queries, _is_called_by_a_coroutine):
            result = async_to_sync(_wait_for)(result, limit.left)
    return result


def _is_called_by_a_coroutine(frame: FrameType | None) -> bool:
    """Whether a thread runs a function for `sync_to_async`, and does not wait for a coroutine."""
    while frame is not None:
        if frame.f_code is CurrentThreadExecutor.run_until_future.__code__:
            return False
        if frame.f_code is SyncToAsync.thread_handler.__code__:
            return True
        frame = frame.f_back
    return False


def drop_connections() -> None:
    """Throw away what may have been interrupted in the middle of a query."""
    for connection in connections.all(initialized_only=True):
        if not connection.in_atomic_block:
            connection.close()


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


async def _wait_for(awaitable: Any, seconds: float | None) -> object:
    async with asyncio.timeout(seconds):
        with SameProcess():
            return await awaitable
