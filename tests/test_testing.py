"""What `ebbs_and_flows.testing` promises to the tests of a project."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
from django.test import TestCase
from django.utils import timezone

from ebbs_and_flows import (
    ExecutionContext,
    FlowRunner,
    FlowStatus,
    FlowTemplate,
    IllegalTransition,
    InvalidArgument,
    Retry,
    RetryLater,
    Task,
    TaskNotFound,
    WrongEntryType,
    task,
)
from ebbs_and_flows.models import FlowExecution, FlowTransition
from ebbs_and_flows.testing import (
    FlowTester,
    FlowTestMixin,
    WorkerCrash,
    crash_task,
    fail_task,
    move_clock,
    run_due_flows,
    run_flow,
)
from tests.shop.models import Order

pytestmark = pytest.mark.django_db


class Ledger:
    """Counts what the tasks did outside."""

    def __init__(self) -> None:
        self.charges: list[str] = []


@pytest.fixture
def ledger(runner: FlowRunner) -> Ledger:
    """A shop: `runner` has the flow "order" of the tasks charge, pay and ship."""
    ledger = Ledger()

    class Charge(Task):
        name = "charge"
        retry = Retry(attempts=3, delay=60, jitter=False)

        def run(self, context: ExecutionContext) -> ExecutionContext:
            ledger.charges.append(context.idempotency_key)
            return context.with_entries(receipt=f"R{context['order']}")

    @task(atomic=True)
    def pay(context: ExecutionContext) -> ExecutionContext:
        Order.objects.create(number=context["receipt"], paid=True)
        return context

    @task
    async def ship(context: ExecutionContext) -> ExecutionContext:
        ledger.charges.append("shipped")
        return context.with_entries(weight=Decimal("1.5"))

    runner.register_flow_template(FlowTemplate("order", tasks=[Charge(), pay, ship]))
    return ledger


def test_a_flow_is_run_and_comes_back_with_its_tasks_and_context(
    runner: FlowRunner, ledger: Ledger
) -> None:
    run = run_flow("order", {"order": 7}, runner=runner, key="order-7").assert_succeeded()
    assert run.status == FlowStatus.SUCCEEDED
    assert run.flow.key == "order-7"
    assert [attempt.task_name for attempt in run.tasks] == ["charge", "pay", "ship"]
    assert dict(run.context) == {"order": 7, "receipt": "R7", "weight": Decimal("1.5")}
    assert run.attempts("pay") == run.tasks[1:2]


def test_a_flow_that_waits_is_run_whether_it_is_due_or_not(
    runner: FlowRunner, ledger: Ledger
) -> None:
    flow = runner.schedule_flow("order", {"order": 7}, run_at=timezone.now() + timedelta(days=1))
    assert run_due_flows(runner=runner) == []
    assert run_flow(flow.pk, runner=runner).assert_succeeded().flow == flow
    with pytest.raises(InvalidArgument, match="give run_flow the flow alone"):
        run_flow(flow, {"order": 8}, runner=runner)


def test_retries_are_made_at_once_or_not_at_all(runner: FlowRunner, ledger: Ledger) -> None:
    with fail_task("order", "charge", ConnectionError("no route"), attempts=[1, 2], runner=runner):
        run = run_flow("order", {"order": 7}, runner=runner).assert_succeeded()
        assert [row.error_type for row in run.attempts("charge")] == 2 * ["ConnectionError"] + [""]
        left = run_flow("order", {"order": 8}, runner=runner, retry=False)
    assert left.status == FlowStatus.RESCHEDULED
    assert len(left.tasks) == 1


def test_what_was_made_to_fail_works_again(runner: FlowRunner, ledger: Ledger) -> None:
    with fail_task("order", "pay", runner=runner):
        with fail_task("order", "pay", KeyError("x"), attempts=[2], runner=runner):
            run = run_flow("order", {"order": 7}, runner=runner)
            run.assert_failed("pay", error=RuntimeError, text="The test makes pay fail.")
            run.rerun().assert_failed("pay", error="KeyError")
        again = run.rerun().assert_succeeded()
    assert [row.attempt for row in again.attempts("pay")] == [1, 2, 3]
    assert len(ledger.charges) == 2
    run_flow("order", {"order": 8}, runner=runner).assert_succeeded()
    with pytest.raises(IllegalTransition):
        again.rerun()


def test_a_task_may_fail_after_its_work(runner: FlowRunner, ledger: Ledger) -> None:
    with fail_task("order", "ship", after=True, runner=runner):
        run_flow("order", {"order": 7}, runner=runner).assert_failed("ship")
    assert ledger.charges[1:] == ["shipped"]


@pytest.mark.parametrize("transaction", [False, True])
def test_a_crash_repeats_the_task_in_progress_and_no_other(
    request: pytest.FixtureRequest, runner: FlowRunner, ledger: Ledger, transaction: bool
) -> None:
    if transaction:
        request.getfixturevalue("transactional_db")
    for name in ("charge", "pay", "ship"):
        with crash_task("order", name, runner=runner):
            run = run_flow("order", {"order": 7}, runner=runner).assert_succeeded()
        assert [row.error_type for row in run.attempts(name)] == ["TaskInterrupted", ""]
        assert len(run.tasks) == 4
    charged, again = ledger.charges[:2]
    assert charged == again
    assert ledger.charges.count("shipped") == 4
    # Atomic: what the first attempt wrote was undone.
    assert Order.objects.count() == 3


def test_a_task_that_always_loses_its_worker_fails_in_the_end(
    runner: FlowRunner, ledger: Ledger
) -> None:
    with crash_task("order", "charge", attempts=range(1, 99), after=False, runner=runner):
        run = run_flow("order", {"order": 7}, runner=runner)
        run.assert_failed("charge", error="TaskInterrupted", text="find out what ends the worker")
        with pytest.raises(WorkerCrash):
            runner.run_flow_execution(runner.reschedule_flow_execution(run.flow))
    assert ledger.charges == []


def test_the_clock_decides_what_is_due(runner: FlowRunner, ledger: Ledger) -> None:
    tomorrow = timezone.now() + timedelta(days=1)
    flow = runner.schedule_flow("order", {"order": 7}, run_at=tomorrow)
    move_clock(timedelta(hours=23), runner=runner)
    assert run_due_flows(runner=runner) == []
    move_clock(timedelta(hours=1), runner=runner)
    with fail_task("order", "charge", ConnectionError, runner=runner):
        (run,) = run_due_flows(runner=runner)
    assert run.flow == flow
    assert run.status == FlowStatus.RESCHEDULED
    move_clock(timedelta(seconds=59), runner=runner)
    assert run_due_flows(runner=runner) == []
    move_clock(timedelta(seconds=1), runner=runner)
    (run,) = run_due_flows(runner=runner)
    run.assert_succeeded()
    assert run.flow.duration is not None
    assert run.flow.duration >= timedelta(seconds=60)
    moments = FlowTransition.objects.order_by("pk").values_list("at", flat=True)
    assert list(moments) == sorted(moments)


@pytest.mark.parametrize("by", [timedelta(0), timedelta(days=-1), 60, None])
def test_the_clock_goes_forward(by: Any) -> None:
    with pytest.raises(InvalidArgument, match="give a timedelta above 0"):
        move_clock(by)


def test_a_worker_that_was_lost_is_replaced_when_its_lease_is_over(
    runner: FlowRunner, ledger: Ledger
) -> None:
    flow = runner.schedule_flow("order", {"order": 7})
    runner.service.claim([runner.get_flow_template("order")], "a worker that is lost")
    with pytest.raises(AssertionError, match="was not claimed: its template is paused, or a"):
        run_flow(flow, runner=runner)
    move_clock(timedelta(seconds=31), runner=runner)
    run_flow(flow, runner=runner).assert_succeeded()


def test_what_is_not_as_expected_is_told_with_the_outputs(
    runner: FlowRunner, ledger: Ledger
) -> None:
    succeeded = run_flow("order", {"order": 7}, runner=runner)
    with pytest.raises(AssertionError, match=r"order #\d+ is SUCCEEDED, not FAILED"):
        succeeded.assert_failed()
    with fail_task("order", "pay", ValueError("the card is bad"), runner=runner):
        failed = run_flow("order", {"order": 7}, runner=runner)
    with pytest.raises(AssertionError) as caught:
        failed.assert_succeeded()
    said = str(caught.value)
    assert "is FAILED, not SUCCEEDED.\n  0 charge, attempt 1: SUCCEEDED\n" in said
    assert "  1 pay, attempt 1: FAILED ValueError\n\npay, attempt 1, failed:\n" in said
    assert "ValueError: the card is bad" in said
    assert "Traceback" in said
    for expected, message in [
        ({"task_name": "ship"}, "at 'pay', not at 'ship'"),
        ({"error": KeyError}, "by ValueError, not KeyError"),
        ({"text": "stolen"}, "without 'stolen' in its output"),
    ]:
        with pytest.raises(AssertionError, match=message):
            failed.assert_failed(**expected)  # type: ignore[arg-type]


def test_a_flow_that_does_not_end_is_given_up(runner: FlowRunner) -> None:
    @task
    def again(context: ExecutionContext) -> ExecutionContext:
        raise RetryLater(5)

    runner.register_flow_template(FlowTemplate("again", tasks=[again]))
    with pytest.raises(AssertionError, match="taken up 100 times and is still RESCHEDULED"):
        run_flow("again", runner=runner)


def test_unknown_names_are_refused(runner: FlowRunner, ledger: Ledger) -> None:
    with pytest.raises(TaskNotFound), fail_task("order", "chrage", runner=runner):
        pass
    with pytest.raises(LookupError), crash_task("odrer", "charge", runner=runner):
        pass


def test_the_tester_makes_work_again_what_it_made_fail(runner: FlowRunner, ledger: Ledger) -> None:
    tester = FlowTester(runner)
    tester.fail_task("order", "pay")
    tester.crash_task("order", "charge")
    run = tester.run("order", {"order": 7}).assert_failed("pay")
    assert len(run.attempts("charge")) == 2
    tester.work_again()
    tester.run("order", {"order": 8}).assert_succeeded()
    runner.schedule_flow("order", {"order": 9}, run_at=timezone.now() + timedelta(hours=1))
    tester.move_clock(timedelta(hours=1))
    assert [run.status for run in tester.run_due()] == [FlowStatus.SUCCEEDED]


class InATestCase(FlowTestMixin, TestCase):
    def test_the_mix_in_runs_flows(self) -> None:
        self.flows.fail_task("shop-quick", "last")
        run = self.flows.run("shop-quick", {"folder": "/tmp"})
        run.assert_failed("last")

    def test_what_another_test_made_fail_works_again(self) -> None:
        self.flows.run("shop-quick", {"folder": "/tmp"}).assert_succeeded()
        assert FlowExecution.objects.count() == 1


# A typed entry


def test_an_entry_is_read_with_its_type() -> None:
    context = ExecutionContext({"total": Decimal("1.5"), "lines": [1]})
    assert context.get_typed("total", Decimal) == Decimal("1.5")
    assert context.get_typed("lines", list) == [1]
    with pytest.raises(KeyError, match="no entry 'sum'"):
        context.get_typed("sum", int)
    with pytest.raises(TypeError, match="'total' is of type Decimal, not of the wanted type str"):
        context.get_typed("total", str)
    with pytest.raises(WrongEntryType, match="give a class, such as list"):
        context.get_typed("lines", list[int])
