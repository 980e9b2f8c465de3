"""`freeze_clock`: the app's clock stands still, on every database, and is set on by hand."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from django.test import Client, TestCase
from django.utils import timezone as django_timezone

from ebbs_and_flows import (
    ExecutionContext,
    FlowRunner,
    FlowStatus,
    FlowTemplate,
    InvalidArgument,
    Retry,
    clock,
    flow_runner,
    task,
)
from ebbs_and_flows.engines.django_tasks import DjangoTasksEngine
from ebbs_and_flows.integrity import IntegrityCheck
from ebbs_and_flows.management.arguments import moment
from ebbs_and_flows.models import (
    FlowExecution,
    FlowTransition,
    PacemakerBeat,
    TaskExecution,
    WorkerProcess,
)
from ebbs_and_flows.presence import Presence
from ebbs_and_flows.testing import (
    FlowTester,
    FlowTestMixin,
    crash_task,
    fail_task,
    freeze_clock,
    move_clock,
    run_due_flows,
    run_flow,
)

from .operators import LIST, page, registered

pytestmark = pytest.mark.django_db

NOON = datetime(2031, 5, 17, 12, 0, 0, tzinfo=UTC)
FRACTION = NOON.replace(microsecond=123456)
MICROSECOND = timedelta(microseconds=1)


@task
def first(context: ExecutionContext) -> ExecutionContext:
    return context.with_entries(receipt="R1")


@task(atomic=True)
def last(context: ExecutionContext) -> ExecutionContext:
    return context


@pytest.fixture
def shop(runner: FlowRunner) -> FlowRunner:
    """A runner with the flow "order" of two tasks; the first is tried again after a minute."""
    first.retry = Retry(attempts=3, delay=60, jitter=False)
    order = FlowTemplate("order", tasks=[first, last], deadline=3600, keep_days=30)
    runner.register_flow_template(order)
    return runner


@pytest.fixture(params=["in a transaction", "committing"])
def either_way(request: pytest.FixtureRequest) -> None:
    """Within the transaction of a test, and with steps that commit, which PostgreSQL prepares."""
    if request.param == "committing":
        request.getfixturevalue("transactional_db")


def stored_moments() -> set[datetime]:
    """Return every moment that is stored of flows which nobody holds."""
    rows = [
        *FlowExecution.objects.values_list("created_at", "run_at", "started_at", "finished_at"),
        *TaskExecution.objects.values_list("started_at", "finished_at"),
        *FlowTransition.objects.values_list("at"),
    ]
    return {found for row in rows for found in row if found is not None}


@pytest.mark.parametrize("at", [NOON, FRACTION])
@pytest.mark.usefixtures("either_way")
def test_every_time_that_is_stored_is_the_frozen_one(shop: FlowRunner, at: datetime) -> None:
    with freeze_clock(at, runner=shop):
        # As often as it takes for the statements to be prepared.
        for _ in range(4):
            shop.schedule_flow("order")
        assert [run.status for run in run_due_flows(runner=shop)] == 4 * [FlowStatus.SUCCEEDED]
        with fail_task("order", "last", runner=shop):
            failed = run_flow("order", runner=shop).assert_failed("last")
        failed.rerun().assert_succeeded()
        with crash_task("order", "last", runner=shop):
            run_flow("order", runner=shop).assert_succeeded()
        shop.cancel_flow_execution(shop.schedule_flow("order"))
        assert stored_moments() == {at}
        assert shop.service.repository.now() == at
        assert list(IntegrityCheck().findings()) == []


def test_a_flow_is_due_at_its_moment_and_not_before(shop: FlowRunner) -> None:
    tomorrow = NOON + timedelta(days=1)
    with freeze_clock(NOON, runner=shop):
        flow = shop.schedule_flow("order", run_at=tomorrow)
        move_clock(timedelta(days=1) - MICROSECOND, runner=shop)
        assert run_due_flows(runner=shop) == []
        move_clock(MICROSECOND, runner=shop)
        (run,) = run_due_flows(runner=shop)
        assert run.assert_succeeded().flow == flow
        # What is stored was not moved.
        assert run.flow.run_at == run.flow.started_at == tomorrow
        assert run.flow.created_at == NOON


def test_how_long_the_next_flow_is_waited_for(shop: FlowRunner) -> None:
    waiting = [FlowStatus.SCHEDULED]
    with freeze_clock(NOON, runner=shop):
        shop.schedule_flow("order", run_at=NOON + timedelta(seconds=90))
        for ahead, next_in in [(89, None), (90, 90)]:
            ahead_by = timedelta(seconds=ahead)
            due = shop.service.repository.look(
                waiting, shop.service.offers(shop.templates.values()), ahead=ahead_by
            )
            assert due.next_in == (next_in and pytest.approx(next_in, abs=0.001))


@pytest.mark.usefixtures("either_way")
def test_a_retry_waits_for_its_delay(shop: FlowRunner) -> None:
    with freeze_clock(NOON, runner=shop), fail_task("order", "first", OSError, runner=shop):
        flow = shop.schedule_flow("order")
        (run,) = run_due_flows(runner=shop)
        assert run.flow.run_at == NOON + timedelta(seconds=60)
        move_clock(timedelta(seconds=60) - MICROSECOND, runner=shop)
        assert run_due_flows(runner=shop) == []
        move_clock(MICROSECOND, runner=shop)
        (run,) = run_due_flows(runner=shop)
        assert run.assert_succeeded().flow == flow
        assert run.flow.duration == timedelta(seconds=60)


@pytest.mark.usefixtures("either_way")
def test_a_lease_is_over_when_it_is(shop: FlowRunner) -> None:
    with freeze_clock(NOON, runner=shop):
        flow = shop.schedule_flow("order")
        shop.service.claim(shop.templates.values(), "a worker that is lost")
        flow.refresh_from_db()
        assert flow.lease_expires_at == NOON + timedelta(seconds=30)
        move_clock(timedelta(seconds=30), runner=shop)
        assert shop.service.recover_expired() == 0
        move_clock(MICROSECOND, runner=shop)
        assert shop.service.recover_expired() == 1


def test_a_deadline_passes(shop: FlowRunner) -> None:
    with freeze_clock(NOON, runner=shop):
        in_time, late = shop.schedule_flow("order"), shop.schedule_flow("order")
        # The real time that is left limits each task.
        move_clock(timedelta(minutes=59), runner=shop)
        run_flow(in_time, runner=shop).assert_succeeded()
        move_clock(timedelta(minutes=1), runner=shop)
        run_flow(late, runner=shop).assert_failed(error="DeadlineExceeded")


def test_what_was_kept_for_long_enough_is_deleted(shop: FlowRunner) -> None:
    with freeze_clock(NOON, runner=shop):
        run_flow("order", runner=shop).assert_succeeded()
        for by, left in [(timedelta(days=30), 1), (MICROSECOND, 0)]:
            move_clock(by, runner=shop)
            PacemakerBeat.objects.all().delete()
            shop.prune_kept()
            assert FlowExecution.objects.count() == left


@pytest.fixture
def daily() -> Iterator[None]:
    """A flow that recurs each day at six, in Berlin, for the front door's runner."""
    with registered(FlowTemplate("frozen-daily", tasks=[last], cron="0 6 * * *")):
        yield
    del flow_runner._recurrences["frozen-daily"]


@pytest.mark.usefixtures("daily")
def test_a_recurring_flow_recurs() -> None:
    engine = DjangoTasksEngine()
    flows = FlowExecution.objects.filter(template_name="frozen-daily")
    with freeze_clock(NOON):
        engine.sync_recurring(flow_runner.recurrences)
        # Six o'clock in Berlin is four in UTC.
        for by, fired in [(timedelta(hours=16) - MICROSECOND, 0), (MICROSECOND, 1)]:
            move_clock(by)
            engine.fire_recurring()
            assert flows.count() == fired
        assert flows.get().run_at == NOON + timedelta(hours=16)
        move_clock(timedelta(days=1))
        engine.fire_recurring()
        assert flows.count() == 2


def test_what_commands_and_presence_call_now_is_frozen(shop: FlowRunner) -> None:
    with freeze_clock(NOON):
        assert moment("--since", "2h", sign=-1) == NOON - timedelta(hours=2)
        Presence().beat()
        assert WorkerProcess.objects.get().seen_at == NOON


def test_the_admin_shows_the_frozen_times(admin_client: Client) -> None:
    with freeze_clock(NOON):
        flow = flow_runner.schedule_flow("shop-quick", {"folder": "/tmp"})
        flow_runner.service.claim([flow_runner.get_flow_template("shop-quick")], "a worker")
        move_clock(timedelta(minutes=7))
        assert "7 min" in page(admin_client, f"{LIST}{flow.pk}/change/")
        # What is listed is linked.
        for minutes, is_listed in [(1, True), (60, False)]:
            move_clock(timedelta(minutes=minutes))
            listed = page(admin_client, f"{LIST}?when=hour")
            assert (f"flowexecution/{flow.pk}/change/" in listed) is is_listed


def test_the_clock_stands_at_the_present_moment_by_default(shop: FlowRunner) -> None:
    before = shop.service.repository.now()
    with freeze_clock(runner=shop) as frozen:
        assert before <= frozen == shop.service.repository.now()
        assert shop.schedule_flow("order").created_at == frozen
    assert shop.service.repository.now() > frozen


def test_the_clock_goes_on_afterwards(shop: FlowRunner) -> None:
    with freeze_clock(NOON, runner=shop):
        with pytest.raises(KeyError), freeze_clock(FRACTION, runner=shop):
            assert shop.service.repository.now() == FRACTION
            raise KeyError
        assert shop.service.repository.now() == NOON
    assert clock.frozen_at is None
    assert abs(shop.schedule_flow("order").created_at - django_timezone.now()) < timedelta(hours=1)


def test_a_moment_is_the_same_in_any_zone(shop: FlowRunner) -> None:
    there = FRACTION.astimezone(timezone(timedelta(hours=-9)))
    with freeze_clock(there, runner=shop) as frozen:
        assert frozen == FRACTION
        run_flow("order", runner=shop).assert_succeeded()
        assert stored_moments() == {FRACTION}


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ("2031-05-17", "at is '2031-05-17': give an aware datetime, or None for now"),
        (NOON.replace(tzinfo=None), "at is 2031-05-17T12:00:00, without a time zone"),
        (NOON.replace(year=1), "give a year from 1001 to 9998"),
    ],
)
def test_what_is_no_moment_is_refused(at: Any, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message), freeze_clock(at):
        pass
    assert clock.frozen_at is None


def test_the_tester_lets_the_clock_go_with_the_test(shop: FlowRunner) -> None:
    tester = FlowTester(shop)
    assert tester.freeze_clock(NOON) == NOON
    tester.fail_task("order", "last")
    tester.run("order").assert_failed("last")
    tester.work_again()
    tester.move_clock(timedelta(hours=2))
    tester.freeze_clock(NOON + timedelta(days=1))
    tester.run("order").assert_succeeded()
    assert stored_moments() == {NOON, NOON + timedelta(days=1)}
    tester.close()
    assert clock.frozen_at is None


class InATestCase(FlowTestMixin, TestCase):
    def test_the_mix_in_freezes_the_clock(self) -> None:
        self.flows.freeze_clock(NOON)
        run = self.flows.run("shop-quick", {"folder": "/tmp"}).assert_succeeded()
        assert run.flow.finished_at == NOON

    def test_the_next_test_has_a_clock_that_goes(self) -> None:
        assert clock.frozen_at is None


def test_the_fixture_freezes_the_clock(flows: FlowTester) -> None:
    flows.freeze_clock(NOON)
    assert flows.run("shop-quick", {"folder": "/tmp"}).flow.finished_at == NOON


def test_the_test_after_the_fixture_has_a_clock_that_goes() -> None:
    assert clock.frozen_at is None
