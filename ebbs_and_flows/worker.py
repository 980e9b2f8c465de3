"""Runs one claimed flow: task after task, each outcome stored in one transaction."""

from __future__ import annotations

import inspect
import logging
import os
import socket
import threading
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from types import TracebackType

from asgiref.sync import async_to_sync
from django.db import DatabaseError, InterfaceError, OperationalError, connections

from .conf import get_settings
from .context import ExecutionContext
from .exceptions import ClaimLost, FailFlow, InvalidTaskResult, RetryLater
from .flows import FlowTemplate, Task
from .repository import ClaimedRun
from .service import FlowService, storable_text
from .status import TaskStatus

logger = logging.getLogger("ebbs_and_flows")

OnTask = Callable[[ClaimedRun, str, TaskStatus], None]


class _BodyFailed(Exception):
    """What a task's own code raised, told apart from what the records' writing raises."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


def worker_name() -> str:
    """Return the name under which this process claims flows: its host and process id."""
    return f"{socket.gethostname()[:150]}:{os.getpid()}"


def describe(error: BaseException, max_bytes: int) -> str:
    """Return an error's type and message, then its traceback with causes and notes.

    It begins at the task's own code. Over `max_bytes` bytes of UTF-8 it is cut in the middle,
    and says so.
    """
    frame = error.__traceback__
    while frame and frame.tb_next and _is_ours(frame):
        frame = frame.tb_next
    shown = traceback.TracebackException(type(error), error, frame)
    headline = "".join(shown.format_exception_only()).strip()
    headline = headline.removeprefix("ebbs_and_flows.exceptions.")
    text = storable_text(f"{headline}\n\n{''.join(shown.format())}")
    encoded = text.encode()
    if len(encoded) <= max_bytes:
        return text
    cut = f"\n… {len(encoded) - max_bytes} bytes or more cut here …\n"
    half = (max_bytes - len(cut.encode())) // 2
    head, tail = encoded[:half], encoded[-half:]
    return head.decode(errors="ignore") + cut + tail.decode(errors="ignore")


def _is_ours(frame: TracebackType) -> bool:
    return str(frame.tb_frame.f_globals.get("__name__", "")).startswith("ebbs_and_flows.")


def error_name(error: BaseException) -> str:
    """Return the name of an error's type, with its module unless it is a builtin or ours."""
    kind = type(error)
    if kind.__module__ in {"builtins", "ebbs_and_flows.exceptions"}:
        return kind.__qualname__
    return f"{kind.__module__}.{kind.__qualname__}"


class Heartbeat:
    """A thread that renews a flow's lease while one of its tasks runs long.

    The steps renew it themselves; this one wakes three times a lease, and writes, over its own
    connection, only when the same task is still in progress as at its last waking.
    """

    def __init__(self, service: FlowService, run: ClaimedRun) -> None:
        self._service = service
        self._run = run
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Heartbeat:
        self._thread = threading.Thread(target=self._beat, name="flow-heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def _beat(self) -> None:
        lease = timedelta(seconds=get_settings().LEASE_SECONDS)
        repository, seen = self._service.repository, None
        try:
            while not self._stopped.wait(lease.total_seconds() / 3):
                task = self._run.task_execution_id
                if task != seen:
                    seen = task
                    continue
                try:
                    if not repository.renew(self._run.flow.pk, self._run.claim, lease):
                        return
                except DatabaseError:
                    # The next beat tries again; the lease outlives two that fail.
                    logger.warning("A lease could not be renewed.", exc_info=True)
                    connections[repository.using].close()
        finally:
            connections[repository.using].close()


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
        self._stop = stop or (lambda: False)
        self._on_task = on_task or (lambda run, name, status: None)

    def run(self, run: ClaimedRun, template: FlowTemplate) -> None:
        """Run a flow whose first attempt is stored, to its end or until `stop()` is true."""
        tasks = template.tasks
        # In a test's transaction another connection would see neither the flow nor a free row.
        inside = connections[self._service.repository.using].in_atomic_block
        try:
            with nullcontext() if inside else Heartbeat(self._service, run):
                while self._run_task(run, tasks):
                    pass
        except ClaimLost as lost:
            logger.warning("%s", lost, extra={"flow": run.flow.pk, "template": template.name})
        except (KeyboardInterrupt, GeneratorExit):
            self._interrupt(run)
            raise

    def _run_task(self, run: ClaimedRun, tasks: tuple[Task, ...]) -> bool:
        """Make one attempt and store its outcome; return whether the flow goes on here."""
        task, name = tasks[run.task_index], run.task_name
        step = self._service.repository.step
        next_task = tasks[run.task_index + 1].name if run.task_index + 1 < len(tasks) else None
        hand_back = False
        try:
            if task.atomic:
                with step():
                    entries = self._call(task, run)
                    hand_back = self._stop()
                    goes_on = self._service.succeed_step(
                        run, entries, next_task, hand_back=hand_back
                    )
            else:
                entries = self._call(task, run)
                hand_back = self._stop()
                with step():
                    goes_on = self._service.succeed_step(
                        run, entries, next_task, hand_back=hand_back
                    )
        except _BodyFailed as failed:
            self._fail(run, task, failed.error)
            self._on_task(run, name, TaskStatus.FAILED)
            return False
        except (OperationalError, InterfaceError):
            raise
        except DatabaseError as error:
            # What an atomic body wrote can be refused as late as at the commit.
            if not task.atomic:
                raise
            self._fail(run, task, error)
            self._on_task(run, name, TaskStatus.FAILED)
            return False
        self._on_task(run, name, TaskStatus.SUCCEEDED)
        return goes_on

    def _call(self, task: Task, run: ClaimedRun) -> dict[str, str]:
        """Run the task's code and return its new entries in their stored form."""
        context = ExecutionContext.from_stored(
            run.stored,
            flow_execution_id=run.flow.pk,
            task_name=run.task_name,
            attempt=run.attempt,
            idempotency_key=f"{run.flow.pk}-{run.task_index}-{run.task_name}",
        )
        try:
            result: object = task.run(context)
            if inspect.isawaitable(result):
                result = async_to_sync(_wait_for)(result)
            if not isinstance(result, ExecutionContext):
                raise InvalidTaskResult(
                    f"Task {task.name!r} returned {type(result).__name__}: return the context,"
                    f" or context.with_entries(…) with what is new."
                )
            return result.encode_new_entries(run.stored, max_bytes=get_settings().MAX_ENTRY_BYTES)
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:
            # SystemExit and a cancelled coroutine too: the process goes on, the attempt does not.
            raise _BodyFailed(error) from error

    def _fail(self, run: ClaimedRun, task: Task, error: BaseException) -> None:
        retry_after, forgive, reason = None, False, ""
        if isinstance(error, RetryLater):
            retry_after, forgive, reason = error.delay, True, storable_text(str(error))
        elif not isinstance(error, FailFlow) and task.retry is not None:
            made = run.counted_attempts
            if task.retry.covers(error, made):
                retry_after = task.retry.delay_after(made)
        output = describe(error, get_settings().MAX_OUTPUT_BYTES)
        self._service.repository.drop_broken_connection()
        with self._service.repository.step():
            self._service.fail_step(
                run,
                output,
                error_name(error),
                retry_after=retry_after,
                forgive=forgive,
                reason=reason,
            )
        logger.warning(
            "Task %s of flow %s failed: %s",
            run.task_name,
            run.flow.pk,
            error_name(error),
            extra={"flow": run.flow.pk, "template": run.flow.template_name, "task": run.task_name},
        )

    def _interrupt(self, run: ClaimedRun) -> None:
        """Give a flow back whose task was broken off by a keyboard interrupt."""
        service = self._service
        with service.repository.step():
            flow = service.repository.lock(run.flow.pk)
            if flow is not None and flow.claim == run.claim:
                service.interrupt(flow, f"interrupted: worker {worker_name()} was stopped.")


async def _wait_for(awaitable: object) -> object:
    return await awaitable  # type: ignore[misc]
