"""What the claim holds back: paused templates, and flows beyond a template's `max_running`."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from django.db import connections
from django.test import override_settings
from django.test.utils import CaptureQueriesContext

from ebbs_and_flows import (
    ExecutionContext,
    FlowRunner,
    FlowStatus,
    FlowTemplate,
    flow_runner,
    task,
)
from ebbs_and_flows.models import FlowExecution, FlowTemplateState
from ebbs_and_flows.plans import Offer, Plan

from .databases import connection, database_names
from .test_command_processes import until

pytestmark = pytest.mark.django_db(transaction=True)


class Gauge:
    """A task's body that knows how many are within it at once."""

    def __init__(self, wait: float = 0.003) -> None:
        self.now = self.most = self.ran = 0
        self.wait = wait
        self.lock = threading.Lock()

    def __call__(self, context: ExecutionContext) -> ExecutionContext:
        with self.lock:
            self.now += 1
            self.ran += 1
            self.most = max(self.most, self.now)
        threading.Event().wait(self.wait)
        with self.lock:
            self.now -= 1
        return context


def register(runner: FlowRunner, name: str, body: Callable[..., Any], **options: Any) -> None:
    tasks = [task(name="one")(body), task(name="two")(body)]
    runner.register_flow_template(FlowTemplate(name, tasks=tasks, **options))


def work(threads: int, body: Callable[[], Any]) -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            body()
        except BaseException as error:  # noqa: BLE001 - shown by the assertion
            errors.append(error)
        finally:
            connections.close_all()

    started = [threading.Thread(target=run) for _ in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    assert errors == []


@pytest.mark.parametrize("limit", [1, 3])
def test_eight_workers_never_run_more_than_max_running_at_once(
    runner: FlowRunner, limit: int
) -> None:
    limited, free = Gauge(), Gauge()
    register(runner, "limited", limited, max_running=limit)
    register(runner, "free", free)
    runner.schedule_flows("limited", [{}] * 20, priority=5)
    runner.schedule_flows("free", [{}] * 10)

    def until_done() -> None:
        while FlowExecution.objects.exclude(status=FlowStatus.SUCCEEDED).exists():
            if runner.run_next() is None:
                threading.Event().wait(0.01)

    work(8, until_done)
    assert limited.most <= limit
    assert (limited.ran, free.ran) == (40, 20)
    assert not FlowExecution.objects.exclude(claim=1).exists()


def test_a_flow_that_is_run_by_its_id_counts_and_waits_too(runner: FlowRunner) -> None:
    gauge = Gauge(wait=0.05)
    register(runner, "limited", gauge, max_running=2)
    flows = runner.schedule_flows("limited", [{}] * 8)
    waiting = list(flows)
    work(8, lambda: runner.run_flow_execution(waiting.pop()))
    assert gauge.most <= 2
    # What there was no place for is as it was.
    left = FlowExecution.objects.exclude(status=FlowStatus.SUCCEEDED)
    assert set(left.values_list("status", "claim")) <= {(FlowStatus.SCHEDULED, 0)}
    assert gauge.ran >= 2


def test_a_full_template_leaves_the_others_their_turn(runner: FlowRunner) -> None:
    ran: list[str] = []

    def note(context: ExecutionContext) -> ExecutionContext:
        ran.append(context["name"])
        if context["name"] == "outer" and "inner" not in ran:
            # While this one runs, the other one of the template is not claimed.
            runner.run_next()
            assert runner.run_next() is None
            assert not runner.has_work()
        return context

    register(runner, "limited", note, max_running=1)
    register(runner, "free", note)
    runner.schedule_flow("limited", {"name": "outer"}, priority=9)
    runner.schedule_flow("limited", {"name": "inner"}, priority=8)
    runner.schedule_flow("free", {"name": "free"})
    runner.run_next()
    runner.run_next()
    assert ran == ["outer", "free", "free", "outer", "inner", "inner"]


def test_limited_unlimited_and_paused_templates_share_one_order(runner: FlowRunner) -> None:
    for name, options in {"free": {}, "one": {"max_running": 1}, "paused": {}, "two": {}}.items():
        register(runner, name, lambda context: context, **options)
    runner.pause_flow_template("paused")
    planned = [("paused", 9), ("one", 8), ("free", 7), ("one", 6), ("two", 5), ("one", 5)]
    for name, priority in reversed(planned):
        runner.schedule_flow(name, priority=priority)
    ran = [(flow.template_name, flow.priority) for flow in iter(runner.run_next, None)]
    # Of two that are alike the earlier one; here it was scheduled the other way round.
    assert ran == [("one", 8), ("free", 7), ("one", 6), ("one", 5), ("two", 5)]


def test_a_limited_template_does_not_cost_the_flows_of_others(runner: FlowRunner) -> None:
    def claims(*, limit: int | None, ahead: int = 0) -> int:
        FlowExecution.objects.all().delete()
        one = FlowRunner()
        register(one, "free", lambda context: context)
        register(one, "limited", lambda context: context, max_running=limit)
        for flow in one.schedule_flows("limited", [None] * ahead, priority=9)[:1]:
            assert one.service.claim_flow(flow, one.get_flow_template("limited"), "a worker")
        one.schedule_flow("free")
        with CaptureQueriesContext(connection) as captured:
            assert one.run_next() is not None
        return len(captured)

    # To see what is due, and whose turn it is.
    more = 2 if connection.vendor == "postgresql" else 1
    assert claims(limit=1) - claims(limit=None) == more
    assert claims(limit=1, ahead=5) - claims(limit=None) == more


def test_there_may_be_any_number_of_limited_templates(runner: FlowRunner) -> None:
    limits = {f"limited-{number}": 1 for number in range(1200)}
    register(runner, "limited-7", lambda context: context, max_running=1)
    runner.schedule_flow("limited-7")
    repository = runner.service.repository
    offers = []
    for name in limits:
        plan = Plan.of(name, 1, runner.get_flow_template("limited-7").task_names)
        offers.append(Offer(plan, plan, plan.task_names))
    assert repository.best_template([FlowStatus.SCHEDULED], offers, limits) == "limited-7"


def test_a_lost_worker_gives_its_place_back(runner: FlowRunner) -> None:
    register(runner, "limited", lambda context: context, max_running=1)
    lost, waiting = runner.schedule_flows("limited", [{}, {}])
    template = runner.get_flow_template("limited")
    with override_settings(EBBS_AND_FLOWS={"LEASE_SECONDS": 2}):
        assert runner.service.claim([template], "a worker that dies") is not None
        assert runner.run_next() is None
        threading.Event().wait(2.1)
        ran = {flow.pk for flow in iter(runner.run_next, None)}
    assert ran == {lost.pk, waiting.pk}


# Pausing


def test_a_paused_template_is_claimed_by_nobody_until_it_is_resumed(runner: FlowRunner) -> None:
    register(runner, "billing", lambda context: context)
    register(runner, "other", lambda context: context)
    flow = runner.schedule_flow("billing", priority=100)
    other = runner.schedule_flow("other")
    runner.pause_flow_template("billing", actor="ada")
    state = FlowTemplateState.objects.get(template_name="billing")
    assert (state.paused_at is not None, state.paused_by) == (True, "ada")
    runner.pause_flow_template("billing", actor="bob")
    assert FlowTemplateState.objects.get(template_name="billing").paused_by == "ada"
    assert runner.run_flow().pk == other.pk  # type: ignore[union-attr]
    assert runner.run_flow() is None
    assert runner.run_flow_execution(flow).status == FlowStatus.SCHEDULED
    assert not runner.has_work()
    assert FlowExecution.objects.get(pk=flow.pk).claim == 0
    runner.resume_flow_template("billing")
    assert runner.run_flow().pk == flow.pk  # type: ignore[union-attr]
    runner.resume_flow_template("billing")


def test_pausing_lets_what_runs_go_on_to_its_end(runner: FlowRunner) -> None:
    def pause(context: ExecutionContext) -> ExecutionContext:
        runner.pause_flow_template("billing")
        return context

    register(runner, "billing", pause)
    runner.schedule_flow("billing")
    assert runner.run_flow().status == FlowStatus.SUCCEEDED  # type: ignore[union-attr]
    runner.schedule_flow("billing")
    assert runner.run_flow() is None


def test_a_paused_flow_that_was_handed_back_waits_too(runner: FlowRunner) -> None:
    register(runner, "billing", lambda context: context)
    runner.schedule_flow("billing")
    runner.run_next(stop=lambda: True)
    runner.pause_flow_template("billing")
    assert runner.run_next() is None
    runner.resume_flow_template("billing")
    assert runner.run_next().status == FlowStatus.SUCCEEDED  # type: ignore[union-attr]


def test_pausing_and_resuming_under_eight_workers_loses_no_flow(runner: FlowRunner) -> None:
    gauge = Gauge(wait=0)
    register(runner, "billing", gauge, max_running=3)
    runner.schedule_flows("billing", [{}] * 40)
    done = threading.Event()

    def until_done() -> None:
        while FlowExecution.objects.exclude(status=FlowStatus.SUCCEEDED).exists():
            if runner.run_next() is None:
                threading.Event().wait(0.01)
        done.set()

    def toggle() -> None:
        while not done.wait(0.02):
            runner.pause_flow_template("billing")
            runner.resume_flow_template("billing")

    turns = [toggle, *[until_done] * 7]
    work(8, lambda: turns.pop()())  # noqa: PLW0108 - each thread takes its own
    assert gauge.ran == 80
    assert gauge.most <= 3


@pytest.mark.processes
@pytest.mark.skipif("connection.vendor == 'sqlite'", reason="it cannot end another's transaction")
def test_a_worker_that_is_frozen_in_a_claim_does_not_block_its_template(tmp_path: Path) -> None:
    flows = flow_runner.schedule_flows("shop-limited", [{"folder": str(tmp_path)}] * 2)
    frozen = subprocess.Popen(
        [sys.executable, "-m", "tests.frozen_claim", str(tmp_path), "shop-limited"],
        env={
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "tests.settings",
            **database_names(),
            "EBBS_TEST_LEASE_SECONDS": "6",
        },
        cwd=Path(__file__).parent.parent,
    )
    try:
        until((tmp_path / "frozen").exists, "the claim")
        assert flow_runner.run_next() is None

        def are_done() -> bool:
            flow_runner.run_next()
            done = FlowExecution.objects.filter(pk__in=[flow.pk for flow in flows])
            return not done.exclude(status=FlowStatus.SUCCEEDED).exists()

        # The process is still there, and would hold its locks for as long.
        until(are_done, "the flows of the template")
        assert frozen.poll() is None
    finally:
        frozen.kill()
        frozen.wait()


@pytest.mark.skipif("connection.vendor == 'sqlite'", reason="it cannot end another's transaction")
def test_the_limit_of_a_claims_idle_time_is_for_that_claim_only(runner: FlowRunner) -> None:
    asked = "SELECT @@SESSION.idle_transaction_timeout"
    if connection.vendor == "postgresql":
        asked = "SHOW idle_in_transaction_session_timeout"

    def limit() -> Any:
        with connection.cursor() as cursor:
            cursor.execute(asked)
            return cursor.fetchone()[0]

    seen: list[Any] = []

    def note(context: ExecutionContext) -> ExecutionContext:
        seen.append(limit())
        return context

    register(runner, "limited", note, max_running=1)
    with connection.cursor() as cursor:
        # The project's own.
        own = "idle_in_transaction_session_timeout = '7s'"
        if connection.vendor == "mysql":
            own = "SESSION idle_transaction_timeout = 7"
        cursor.execute(f"SET {own}")
    before = limit()
    runner.schedule_flow("limited")
    assert runner.run_next() is not None
    assert [*seen, limit()] == [before] * 3
    connection.close()
