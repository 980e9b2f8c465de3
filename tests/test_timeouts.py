"""Time-outs and deadlines: what takes too long is interrupted and fails, and harms nobody else."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.db import connections, transaction
from django.utils import timezone

from ebbs_and_flows import (
    ExecutionContext,
    FlowRunner,
    FlowStatus,
    FlowTemplate,
    Retry,
    RetryLater,
    Task,
    TaskTimeout,
    task,
)
from ebbs_and_flows.integrity import IntegrityCheck
from ebbs_and_flows.models import FlowExecution, TaskExecution
from ebbs_and_flows.testing import freeze_clock, move_clock
from ebbs_and_flows.timeouts import Limit, Overdue, interrupt_after
from tests.shop.models import Order

from .databases import FLOWS, atomic, connection

pytestmark = pytest.mark.django_db(transaction=True)

LONG = 20.0
"""Seconds that nothing here ever takes."""


def outcome(runner: FlowRunner, *tasks: Task, **options: Any) -> tuple[FlowExecution, str, str]:
    """Run a flow of the tasks; return it with the last attempt's error and output."""
    runner.register_flow_template(FlowTemplate("limited", tasks=tasks, **options))
    flow = runner.run_flow_execution(runner.schedule_flow("limited"))
    last = runner.service.get_flow_task_execution_history(flow)[-1]
    return flow, last.error_type, last.output


def limited(seconds: float, body: Callable[..., Any], **options: Any) -> Task:
    return task(name="slow", timeout=seconds, **options)(body)


def sleep(context: ExecutionContext) -> ExecutionContext:
    time.sleep(LONG)
    return context


@task(name="quick")
def quick(context: ExecutionContext) -> ExecutionContext:
    return context


@pytest.fixture
def alarm() -> Iterator[list[float]]:
    """Somebody else's alarm handler, as a queue has one; the list holds when it was called."""
    called: list[float] = []
    before = signal.signal(signal.SIGALRM, lambda *_: called.append(time.monotonic()))
    yield called
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_a_task_that_takes_too_long_is_interrupted_and_fails(runner: FlowRunner) -> None:
    began = time.monotonic()
    flow, error, output = outcome(runner, limited(0.1, sleep))
    assert time.monotonic() - began < LONG
    assert (flow.status, error) == (FlowStatus.FAILED, "TaskTimeout")
    assert output.startswith("TaskTimeout: Task 'slow' took longer than its timeout of 0.1 s.")
    # Where it was, for whoever wonders what took so long.
    assert "time.sleep(LONG)" in output


def test_a_time_out_is_retried_as_the_rule_says(runner: FlowRunner) -> None:
    retry = Retry(attempts=2, delay=0, jitter=False, on=(TimeoutError,))
    flow, error, _ = outcome(runner, limited(0.1, sleep, retry=retry))
    assert (flow.status, error) == (FlowStatus.RESCHEDULED, "TaskTimeout")


def test_a_task_in_time_is_left_alone(runner: FlowRunner) -> None:
    def quick(context: ExecutionContext) -> ExecutionContext:
        return context.with_entries(left=signal.getitimer(signal.ITIMER_REAL)[0] > 0)

    flow, _, _ = outcome(runner, limited(LONG, quick))
    assert dict(flow.execution_context) == {"left": True}
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL


def test_an_interruption_that_is_swallowed_fails_all_the_same(runner: FlowRunner) -> None:
    def swallow(context: ExecutionContext) -> ExecutionContext:
        with suppress(BaseException):
            time.sleep(LONG)
        return context.with_entries(done=True)

    flow, error, _ = outcome(runner, limited(0.1, swallow))
    assert (flow.status, error) == (FlowStatus.FAILED, "TaskTimeout")
    assert dict(flow.execution_context) == {}


def test_no_except_exception_swallows_the_interruption(runner: FlowRunner) -> None:
    def stubborn(context: ExecutionContext) -> ExecutionContext:
        for _ in range(100):
            with suppress(Exception):
                time.sleep(LONG / 100)
        return context

    began = time.monotonic()
    _, error, _ = outcome(runner, limited(0.1, stubborn))
    assert error == "TaskTimeout"
    assert time.monotonic() - began < LONG


def test_a_time_out_of_the_tasks_own_is_not_taken_for_ours(runner: FlowRunner) -> None:
    def own(context: ExecutionContext) -> ExecutionContext:
        raise TimeoutError("the bank did not answer")

    _, error, output = outcome(runner, limited(LONG, own))
    assert (error, output.splitlines()[0]) == (
        "TimeoutError",
        "TimeoutError: the bank did not answer",
    )


def test_in_another_thread_a_task_is_not_interrupted_but_fails(runner: FlowRunner) -> None:
    def late(context: ExecutionContext) -> ExecutionContext:
        time.sleep(0.2)
        return context.with_entries(slept=True)

    def work() -> None:
        try:
            found.append(outcome(runner, limited(0.1, late)))
        finally:
            connections.close_all()

    found: list[tuple[FlowExecution, str, str]] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    (flow, error, _), *_ = found
    assert (flow.status, error) == (FlowStatus.FAILED, "TaskTimeout")
    assert dict(flow.execution_context) == {}


# async


def test_an_async_task_is_cancelled_and_ends_before_its_attempt_does(runner: FlowRunner) -> None:
    ended: list[bool] = []

    async def slow(context: ExecutionContext) -> ExecutionContext:
        try:
            await asyncio.sleep(LONG)
        finally:
            # Tidies up: the next attempt must not begin meanwhile.
            await asyncio.sleep(0.2)
            ended.append(True)
        return context

    flow, error, output = outcome(runner, limited(0.1, slow))
    assert ended == [True]
    assert (flow.status, error) == (FlowStatus.FAILED, "TaskTimeout")
    assert "asyncio.sleep(LONG)" in output


def test_an_async_task_that_swallows_its_cancellation_fails_all_the_same(
    runner: FlowRunner,
) -> None:
    async def swallow(context: ExecutionContext) -> ExecutionContext:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(LONG)
        return context.with_entries(done=True)

    flow, error, _ = outcome(runner, limited(0.1, swallow))
    assert (flow.status, error) == (FlowStatus.FAILED, "TaskTimeout")
    assert dict(flow.execution_context) == {}


def test_a_function_that_blocks_a_coroutine_is_interrupted(runner: FlowRunner) -> None:
    """The function runs in the main thread, which is where queries of a coroutine run too."""

    async def blocked(context: ExecutionContext) -> ExecutionContext:
        await sync_to_async(time.sleep)(LONG)
        return context

    began = time.monotonic()
    flow, error, output = outcome(runner, limited(0.1, blocked))
    assert time.monotonic() - began < LONG
    assert (flow.status, error) == (FlowStatus.FAILED, "TaskTimeout")
    assert output.startswith("TaskTimeout: Task 'slow' took longer than its timeout of 0.1 s.")
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_coroutine_within_a_function_within_a_coroutine_is_cancelled(
    runner: FlowRunner,
) -> None:
    """The alarm does not end the wait for a coroutine, which would go on in its loop."""
    ended: list[bool] = []

    async def inner() -> None:
        try:
            await asyncio.sleep(LONG)
        finally:
            await asyncio.sleep(0.2)
            ended.append(True)

    async def outer(context: ExecutionContext) -> ExecutionContext:
        await sync_to_async(async_to_sync(inner))()
        return context

    flow, error, _ = outcome(runner, limited(0.1, outer))
    assert ended == [True]
    assert (flow.status, error) == (FlowStatus.FAILED, "TaskTimeout")


def test_i3_the_next_attempt_waits_for_a_thread_that_the_last_one_has_started(
    runner: FlowRunner,
) -> None:
    """A thread cannot be interrupted, so its attempt ends when the thread does."""
    ended: list[bool] = []

    def block() -> None:
        time.sleep(0.5)
        ended.append(True)

    async def start_thread(context: ExecutionContext) -> ExecutionContext:
        if context.attempt == 1:
            await sync_to_async(block, thread_sensitive=False)()
        return context.with_entries(ended=list(ended))

    retry = Retry(attempts=2, delay=0, jitter=False, on=(TimeoutError,))
    flow, error, _ = outcome(runner, limited(0.1, start_thread, retry=retry))
    assert (flow.status, error) == (FlowStatus.RESCHEDULED, "TaskTimeout")
    assert ended == [True]
    flow = runner.run_flow_execution(flow)
    assert dict(flow.execution_context) == {"ended": [True]}


# Another alarm


def test_another_alarm_is_due_again_afterwards(runner: FlowRunner, alarm: list[float]) -> None:
    theirs = signal.getsignal(signal.SIGALRM)
    signal.setitimer(signal.ITIMER_REAL, 1000, 500)
    _, error, _ = outcome(runner, limited(0.1, sleep))
    assert error == "TaskTimeout"
    assert signal.getsignal(signal.SIGALRM) is theirs
    left, interval = signal.getitimer(signal.ITIMER_REAL)
    assert 0 < left <= 1000 - 0.1
    assert interval == 500
    assert alarm == []


def test_another_alarm_goes_off_in_its_time_in_the_middle_of_a_task(
    runner: FlowRunner, alarm: list[float]
) -> None:
    def wait(context: ExecutionContext) -> ExecutionContext:
        until = time.monotonic() + LONG
        while not alarm and time.monotonic() < until:
            time.sleep(0.01)
        return context.with_entries(called=len(alarm))

    signal.setitimer(signal.ITIMER_REAL, 0.2)
    flow, _, _ = outcome(runner, limited(LONG + 1, wait))
    assert dict(flow.execution_context) == {"called": 1}


def test_after_another_alarm_the_time_out_still_comes(
    runner: FlowRunner, alarm: list[float]
) -> None:
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    _, error, _ = outcome(runner, limited(0.3, sleep))
    assert error == "TaskTimeout"
    assert len(alarm) == 1


def test_another_alarm_that_raises_is_not_lost() -> None:
    def give_up(*_: object) -> None:
        raise SystemExit("the queue's own time-out")

    before = signal.signal(signal.SIGALRM, give_up)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(SystemExit, match="own time-out"), interrupt_after(Limit(LONG)):
            time.sleep(LONG)
        assert signal.getsignal(signal.SIGALRM) is give_up
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_an_alarm_at_the_very_end_of_a_body_is_put_back_all_the_same(alarm: list[float]) -> None:
    def body(until: float) -> None:
        while time.monotonic() < until:
            pass

    theirs = signal.getsignal(signal.SIGALRM)
    for turn in range(200):
        limit = Limit(0.002)
        # A call, as a task's body is: Python 3.13 has the jump back of a loop that stands directly
        # in a with-block outside of what the block catches.
        with suppress(Overdue), interrupt_after(limit):
            body(time.monotonic() + 0.0025 + turn * 5e-6)
        assert signal.getsignal(signal.SIGALRM) is theirs
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert alarm == []


# Connections


# PostgreSQL is told to end it; MariaDB goes on to its end.
SLEEPS = {"postgresql": "SELECT pg_sleep(30)", "mysql": "SELECT SLEEP(1.5)"}


def session() -> Any:
    with connection.cursor() as cursor:
        name = "pg_backend_pid()" if connection.vendor == "postgresql" else "CONNECTION_ID()"
        cursor.execute(f"SELECT {name}")
        return cursor.fetchone()[0]


def hang(context: ExecutionContext) -> ExecutionContext:
    Order.objects.create(number="42")
    with connection.cursor() as cursor:
        cursor.execute(SLEEPS[connection.vendor])
    return context


def hang_and_swallow(context: ExecutionContext) -> ExecutionContext:
    with suppress(BaseException):
        hang(context)
    return context


def hang_in_a_transaction(context: ExecutionContext) -> ExecutionContext:
    with atomic():
        return hang(context)


def hang_and_translate(context: ExecutionContext) -> ExecutionContext:
    try:
        return hang(context)
    except BaseException as error:
        raise ValueError("no luck") from error


async def hang_in_a_coroutine(context: ExecutionContext) -> ExecutionContext:
    return await sync_to_async(hang)(context)


@pytest.mark.skipif(connection.vendor == "sqlite", reason="SQLite's queries are not interrupted")
@pytest.mark.parametrize("atomic", [False, True])
@pytest.mark.parametrize(
    "body",
    [hang, hang_and_swallow, hang_in_a_transaction, hang_and_translate, hang_in_a_coroutine],
)
def test_a_connection_that_was_interrupted_in_a_query_is_thrown_away(
    runner: FlowRunner, body: Callable[..., Any], atomic: bool
) -> None:
    before = session()
    flow, error, _ = outcome(runner, limited(0.3, body, atomic=atomic))
    assert flow.status == FlowStatus.FAILED
    assert error == ("ValueError" if body is hang_and_translate else "TaskTimeout")
    assert session() != before
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE pid = %s AND state = 'active'",
                [before],
            )
            assert cursor.fetchone() == (0,)
    assert dict(flow.execution_context) == {}
    rolled_back = atomic or body is hang_in_a_transaction
    assert Order.objects.count() == (0 if rolled_back else 1)
    # The next flow of this process is none the worse for it.
    flow, _, _ = outcome(FlowRunner(), task(name="next")(lambda context: context))
    assert flow.status == FlowStatus.SUCCEEDED


# Deadlines


def test_a_flow_fails_at_its_deadline_in_the_middle_of_a_task(runner: FlowRunner) -> None:
    retry = Retry(attempts=5, delay=0)
    # However long it takes to get there, the task has that much time left.
    with freeze_clock(runner=runner):
        flow, error, output = outcome(runner, limited(LONG, sleep, retry=retry), deadline=0.5)
    assert (flow.status, error) == (FlowStatus.FAILED, "DeadlineExceeded")
    assert output.startswith(f"DeadlineExceeded: Flow {flow.pk} was not over by its deadline at ")
    assert flow.deadline_at == flow.run_at + timedelta(seconds=0.5)


def test_a_flow_that_is_late_already_fails_before_its_task_begins(runner: FlowRunner) -> None:
    ran = []
    note = task(name="note")(lambda context: ran.append(1) or context)
    runner.register_flow_template(FlowTemplate("late", tasks=[note], deadline=60))
    flow = runner.schedule_flow("late", run_at=timezone.now() - timedelta(seconds=61))
    failed = runner.run_flow()
    assert failed is not None
    assert (failed.pk, failed.status, ran) == (flow.pk, FlowStatus.FAILED, [])
    assert TaskExecution.objects.get().error_type == "DeadlineExceeded"
    # Who reschedules it wants it to go on, without a deadline.
    assert runner.reschedule_flow_execution(flow).deadline_at is None
    assert runner.re_run_flow().status == FlowStatus.SUCCEEDED  # type: ignore[union-attr]
    assert ran == [1]


def for_a_worker(runner: FlowRunner) -> None:
    runner.schedule_flow("late")


def for_its_moment_and_a_worker(runner: FlowRunner) -> None:
    """The deadline counts from the moment that the flow is scheduled for."""
    runner.schedule_flow("late", run_at=timezone.now() + timedelta(hours=1))
    move_clock(timedelta(hours=1), runner=runner)


def for_a_retry(runner: FlowRunner) -> None:
    runner.schedule_flow("late", {"raises": "OSError"})
    assert runner.run_next() is not None


def for_what_it_asked_for(runner: FlowRunner) -> None:
    runner.schedule_flow("late", {"raises": "RetryLater"})
    assert runner.run_next() is not None


def for_the_next_worker(runner: FlowRunner) -> None:
    """The one before has handed it back."""
    runner.schedule_flow("late")
    assert runner.run_next(stop=lambda: True) is not None


def for_its_recovery(runner: FlowRunner) -> None:
    flow = runner.schedule_flow("late")
    assert runner.service.claim_flow(flow, runner.get_flow_template("late"), "lost") is not None


def for_its_template(runner: FlowRunner) -> None:
    runner.pause_flow_template("late")
    runner.schedule_flow("late")


@pytest.mark.parametrize(
    ("wait", "status", "attempts"),
    [
        (for_a_worker, "SCHEDULED", ["first 1"]),
        (for_its_moment_and_a_worker, "SCHEDULED", ["first 1"]),
        (for_a_retry, "RESCHEDULED", ["first 1", "first 2"]),
        (for_what_it_asked_for, "RESCHEDULED", ["first 1", "first 2"]),
        (for_the_next_worker, "RUNNING", ["first 1", "second 1"]),
        (for_its_recovery, "RUNNING", ["first 1", "first 2"]),
        (for_its_template, "SCHEDULED", ["first 1"]),
    ],
)
def test_a_flow_whose_deadline_passes_while_it_waits_fails_when_a_worker_takes_it(
    runner: FlowRunner, wait: Callable[[FlowRunner], None], status: str, attempts: list[str]
) -> None:
    ran: list[str] = []

    def first(context: ExecutionContext) -> ExecutionContext:
        ran.append("first")
        if context.attempt == 1 and context.get("raises") == "OSError":
            raise OSError("down")
        if context.attempt == 1 and context.get("raises") == "RetryLater":
            raise RetryLater(30)
        return context

    def second(context: ExecutionContext) -> ExecutionContext:
        ran.append("second")
        return context

    retry = Retry(attempts=2, delay=30, jitter=False)
    tasks = [task(name="first", retry=retry)(first), task(name="second")(second)]
    runner.register_flow_template(FlowTemplate("late", tasks=tasks, deadline=60))
    wait(runner)
    ran_before = list(ran)
    move_clock(timedelta(seconds=61), runner=runner)
    # No one looks at it meanwhile: its status stays what it was.
    flow = FlowExecution.objects.get()
    assert flow.status == status
    if wait is for_its_template:
        assert runner.run_next() is None
        runner.resume_flow_template("late")
    failed = runner.run_next()
    assert failed is not None
    assert (failed.pk, failed.status, ran) == (flow.pk, FlowStatus.FAILED, ran_before)
    history = runner.service.get_flow_task_execution_history(flow)
    assert [f"{row.task_name} {row.attempt}" for row in history] == attempts
    assert history[-1].error_type == "DeadlineExceeded"
    assert flow.deadline_at is not None
    assert history[-1].output == (
        f"Flow {flow.pk} was not over by its deadline at"
        f" {flow.deadline_at:%Y-%m-%d %H:%M:%S} UTC: reschedule it to continue without one."
    )
    transition = flow.transitions.order_by("pk").last()
    assert transition is not None
    assert (transition.from_status, transition.to_status) == ("RUNNING", "FAILED")
    assert transition.reason == f"{history[-1].task_name} failed: DeadlineExceeded"
    assert list(IntegrityCheck().findings()) == []
    # Who reschedules it wants it to go on, without a deadline.
    assert runner.reschedule_flow_execution(flow).deadline_at is None
    assert runner.run_flow_execution(flow).status == FlowStatus.SUCCEEDED
    assert ran[-1] == "second"


def test_a_flow_that_waits_until_just_before_its_deadline_still_runs(runner: FlowRunner) -> None:
    runner.register_flow_template(FlowTemplate("late", tasks=[quick], deadline=60))
    flow = runner.schedule_flow("late")
    with freeze_clock(flow.run_at + timedelta(seconds=59), runner=runner):
        assert runner.run_flow().status == FlowStatus.SUCCEEDED  # type: ignore[union-attr]


def test_no_retry_is_waited_for_beyond_the_deadline(runner: FlowRunner) -> None:
    def fail(context: ExecutionContext) -> ExecutionContext:
        raise OSError("down")

    retry = Retry(attempts=5, delay=600, max_delay=600, jitter=False)
    flow, error, _ = outcome(runner, task(name="fail", retry=retry)(fail), deadline=300)
    assert (flow.status, error) == (FlowStatus.FAILED, "OSError")


def test_a_task_time_out_is_no_deadline_and_a_time_out_error_is_one(runner: FlowRunner) -> None:
    assert issubclass(TaskTimeout, TimeoutError)
    _, error, _ = outcome(runner, limited(0.1, sleep), deadline=600)
    assert error == "TaskTimeout"


# Errors that take no attributes


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    code: int


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted(Exception):
    code: int


@pytest.mark.parametrize("error", [Frozen, Slotted])
@pytest.mark.parametrize("is_atomic", [False, True], ids=["plain", "atomic"])
@pytest.mark.parametrize("limits", [{}, {"timeout": LONG}], ids=["no limit", "timeout"])
@pytest.mark.parametrize("of_flow", [{}, {"deadline": LONG}], ids=["", "deadline"])
def test_an_immutable_error_stays_what_it_is_and_is_retried(
    runner: FlowRunner,
    error: type[Exception],
    is_atomic: bool,
    limits: dict[str, Any],
    of_flow: dict[str, Any],
) -> None:
    def fail(context: ExecutionContext) -> ExecutionContext:
        raise error(3)

    retry = Retry(attempts=2, delay=0, jitter=False, on=(error,))
    failing = task(name="slow", retry=retry, atomic=is_atomic, **limits)(fail)
    flow, error_type, _ = outcome(runner, failing, **of_flow)
    assert error_type == f"{__name__}.{error.__name__}"
    assert flow.status == FlowStatus.RESCHEDULED


@pytest.mark.parametrize("error", [Frozen, Slotted])
def test_an_immutable_error_of_a_coroutine_stays_what_it_is(
    runner: FlowRunner, error: type[Exception]
) -> None:
    async def fail(context: ExecutionContext) -> ExecutionContext:
        await asyncio.sleep(0)
        raise error(3)

    _, error_type, _ = outcome(runner, limited(LONG, fail))
    assert error_type == f"{__name__}.{error.__name__}"


@pytest.mark.parametrize("error", [Frozen, Slotted])
def test_an_immutable_error_of_a_hook_at_the_commit_stays_what_it_is(
    runner: FlowRunner, error: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    def hook() -> None:
        raise error(3)

    def write(context: ExecutionContext) -> ExecutionContext:
        transaction.on_commit(hook, using=FLOWS)
        return context

    flow, _, _ = outcome(runner, task(name="slow", atomic=True)(write))
    assert flow.status == FlowStatus.SUCCEEDED
    assert f"what came after its commit has not: {__name__}.{error.__name__}" in caplog.text


def test_an_immutable_error_raised_as_the_time_is_over_fails_the_task(runner: FlowRunner) -> None:
    def overtake(context: ExecutionContext) -> ExecutionContext:
        try:
            time.sleep(LONG)
        finally:
            raise Frozen(3)

    flow, error_type, _ = outcome(runner, limited(0.1, overtake))
    assert (flow.status, error_type) == (FlowStatus.FAILED, f"{__name__}.Frozen")
