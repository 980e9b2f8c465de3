"""What a task leaves behind in its process, thread and connections reaches no other flow."""

from __future__ import annotations

import contextvars
import decimal
import os
import random
import signal
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from django.db import connections
from django.utils import timezone, translation

from ebbs_and_flows import ExecutionContext, FlowRunner, FlowStatus, FlowTemplate, Retry, task
from ebbs_and_flows.models import FlowExecution, TaskExecution
from ebbs_and_flows.recurrence import Recurrence
from tests.shop.models import Order

from .databases import FLOWS, connection

pytestmark = pytest.mark.django_db(transaction=True)

Body = Callable[[ExecutionContext], object]


def run(runner: FlowRunner, body: Body, *, atomic: bool = False, name: str = "it") -> Any:
    """Run a flow of one task that does this and returns its context; return the flow."""

    @task(name="tested", atomic=atomic)
    def tested(context: ExecutionContext) -> ExecutionContext:
        body(context)
        return context

    runner.register_flow_template(FlowTemplate(name, tasks=[tested]))
    return runner.run_flow_execution(runner.schedule_flow(name))


def last_attempt(flow: FlowExecution) -> TaskExecution:
    return TaskExecution.objects.filter(flow_execution=flow).order_by("pk").last()  # type: ignore[return-value]


def committed(ask: Callable[[], object]) -> object:
    """Ask over a second connection, which sees only what was committed."""
    answers: list[object] = []

    def act() -> None:
        try:
            answers.append(ask())
        finally:
            connections.close_all()

    thread = threading.Thread(target=act)
    thread.start()
    thread.join()
    return answers[0]


# Transactions and connections


def begin_and_insert(context: ExecutionContext) -> None:
    with connection.cursor() as cursor:
        cursor.execute("BEGIN")
    Order.objects.using(FLOWS).create(number="lost")


def test_a_transaction_that_a_statement_began_is_undone_and_the_task_has_failed(
    runner: FlowRunner,
) -> None:
    flow = run(runner, begin_and_insert)
    assert (flow.status, last_attempt(flow).error_type) == ("FAILED", "TransactionLeftOpen")
    after = run(runner, lambda context: None, name="next")

    def what_is_stored() -> tuple[int, str]:
        stored = FlowExecution.objects.get(pk=after.pk)
        return Order.objects.using(FLOWS).count(), str(stored.status)

    assert committed(what_is_stored) == (0, "SUCCEEDED")


def test_a_task_that_raises_after_its_own_begin_leaves_nothing_open(runner: FlowRunner) -> None:
    def begin_and_raise(context: ExecutionContext) -> None:
        begin_and_insert(context)
        raise ValueError("no")

    flow = run(runner, begin_and_raise)
    assert (flow.status, last_attempt(flow).error_type) == ("FAILED", "ValueError")
    assert committed(Order.objects.using(FLOWS).count) == 0
    assert committed(lambda: FlowExecution.objects.get(pk=flow.pk).status) == FlowStatus.FAILED


@pytest.mark.parametrize("way", ["one", "all", "driver"])
def test_an_atomic_task_that_closes_its_connection_fails_once(
    runner: FlowRunner, way: str
) -> None:
    ran = []

    @task(name="tested", atomic=True)
    def tested(context: ExecutionContext) -> ExecutionContext:
        ran.append(context.attempt)
        Order.objects.using(FLOWS).create(number="lost")
        {
            "one": connection.close,
            "all": connections.close_all,
            "driver": connection.connection.close,
        }[way]()
        return context

    runner.register_flow_template(FlowTemplate("closing", tasks=[tested]))
    flow = runner.run_flow_execution(runner.schedule_flow("closing"))
    assert (flow.status, ran) == (FlowStatus.FAILED, [1])
    attempt = last_attempt(flow)
    assert attempt.error_type == "ConnectionClosed"
    assert "connection.close()" in attempt.output
    assert Order.objects.using(FLOWS).count() == 0


def test_a_query_after_the_close_does_not_hide_the_close(runner: FlowRunner) -> None:
    def close_and_ask(context: ExecutionContext) -> None:
        connection.close()
        Order.objects.using(FLOWS).count()

    flow = run(runner, close_and_ask, atomic=True)
    assert flow.status == FlowStatus.FAILED
    assert last_attempt(flow).error_type == "ConnectionClosed"
    assert TaskExecution.objects.filter(flow_execution=flow).count() == 1


def test_a_drivers_connection_that_a_task_closed_fails_it_at_once(runner: FlowRunner) -> None:
    flow = run(runner, lambda context: connection.connection.close())
    assert (flow.status, last_attempt(flow).error_type) == ("FAILED", "ConnectionClosed")
    assert run(runner, lambda context: None, name="next").status == FlowStatus.SUCCEEDED


def test_a_task_that_is_not_atomic_may_close_its_connections(runner: FlowRunner) -> None:
    flow = run(runner, lambda context: connections.close_all())
    assert flow.status == FlowStatus.SUCCEEDED


# Context variables


COLOUR = contextvars.ContextVar("COLOUR", default="none")


def test_what_a_task_activates_is_gone_after_it(runner: FlowRunner) -> None:
    def activate(context: ExecutionContext) -> None:
        timezone.activate(ZoneInfo("Pacific/Kiritimati"))
        translation.activate("de")
        COLOUR.set("red")
        decimal.getcontext().prec = 3

    before = timezone.get_current_timezone_name(), translation.get_language()
    digits = decimal.getcontext().prec
    run(runner, activate)
    assert (timezone.get_current_timezone_name(), translation.get_language()) == before
    assert (COLOUR.get(), decimal.getcontext().prec) == ("none", digits)


def test_so_it_is_with_an_async_task(runner: FlowRunner) -> None:
    @task(name="tested")
    async def tested(context: ExecutionContext) -> ExecutionContext:
        timezone.activate(ZoneInfo("Pacific/Kiritimati"))
        COLOUR.set("red")
        decimal.getcontext().prec = 3
        return context

    before, digits = timezone.get_current_timezone_name(), decimal.getcontext().prec
    runner.register_flow_template(FlowTemplate("it", tasks=[tested]))
    flow = runner.run_flow_execution(runner.schedule_flow("it"))
    assert flow.status == FlowStatus.SUCCEEDED
    assert (timezone.get_current_timezone_name(), COLOUR.get()) == (before, "none")
    assert decimal.getcontext().prec == digits


def test_one_task_does_not_see_what_the_one_ahead_activated(runner: FlowRunner) -> None:
    seen = []
    first = task(name="first")(lambda c: (COLOUR.set("red"), c)[1])
    second = task(name="second")(lambda c: (seen.append(COLOUR.get()), c)[1])  # type: ignore[func-returns-value]
    runner.register_flow_template(FlowTemplate("two", tasks=[first, second]))
    runner.run_flow_execution(runner.schedule_flow("two"))
    assert seen == ["none"]


def test_a_recurring_flow_is_due_by_the_projects_zone_whatever_is_active() -> None:
    daily = Recurrence(name="daily", template_name="daily", cron="30 6 * * *")
    moment = datetime(2026, 3, 28, 12, tzinfo=UTC)
    expected = daily.next_after(moment)
    missed = list(daily.missed(expected, expected + timedelta(days=3)))
    with timezone.override(ZoneInfo("Pacific/Kiritimati")):
        assert daily.next_after(moment) == expected
        assert list(daily.missed(expected, expected + timedelta(days=3))) == missed
    # The tests' project is in Berlin, where the clocks go forward on that day.
    assert expected == datetime(2026, 3, 29, 4, 30, tzinfo=UTC)


def test_a_seed_that_a_task_sets_does_not_align_the_retries() -> None:
    retry = Retry(delay=100, jitter=True)
    delays = set()
    for _ in range(5):
        random.seed(1)
        delays.add(retry.delay_after(1))
    assert len(delays) == 5


# The process


def test_the_directory_and_the_environment_are_put_back(
    runner: FlowRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EBBS_KEPT", "1")
    monkeypatch.setenv("EBBS_CHANGED", "1")

    def change(context: ExecutionContext) -> None:
        os.chdir(tmp_path)
        os.environ["EBBS_CHANGED"] = "2"
        os.environ["EBBS_NEW"] = "1"
        del os.environ["EBBS_KEPT"]

    before = Path.cwd()
    run(runner, change)
    assert Path.cwd() == before
    assert (os.environ["EBBS_KEPT"], os.environ["EBBS_CHANGED"]) == ("1", "1")
    assert "EBBS_NEW" not in os.environ


def test_a_directory_that_a_task_removed_fails_no_flow(
    runner: FlowRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)

    def remove(context: ExecutionContext) -> None:
        os.chdir(tmp_path)
        gone.rmdir()

    assert run(runner, remove).status == FlowStatus.SUCCEEDED


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGCHLD])
@pytest.mark.parametrize("raises", [False, True])
def test_a_handler_that_a_task_sets_is_put_back(
    runner: FlowRunner, number: int, raises: bool
) -> None:
    def ignore(context: ExecutionContext) -> None:
        signal.signal(number, signal.SIG_IGN)
        if raises:
            raise ValueError("no")

    before = signal.getsignal(number)
    try:
        run(runner, ignore)
        assert signal.getsignal(number) is before
    finally:
        signal.signal(number, before)


def test_signals_that_a_task_blocks_are_let_through_again(runner: FlowRunner) -> None:
    def block(context: ExecutionContext) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    try:
        run(runner, block)
        assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
