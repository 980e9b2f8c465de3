"""The pacemaker wakes workers for what is due, once a second for the whole installation."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
from django.db import OperationalError, connections
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from django_q.models import OrmQ

from ebbs_and_flows import FlowRunner, FlowStatus, FlowTemplate, task
from ebbs_and_flows.models import FlowExecution, PacemakerBeat, WorkerProcess
from ebbs_and_flows.pacemaker import Pacemaker
from ebbs_and_flows.presence import Presence
from ebbs_and_flows.runner import MOST_WAKE_UPS
from ebbs_and_flows.worker import worker_name

from .databases import connection

pytestmark = pytest.mark.django_db


def template() -> FlowTemplate:
    return FlowTemplate("t", tasks=[task(name="only")(lambda context: context)])


@pytest.fixture
def due(runner: FlowRunner) -> FlowExecution:
    """A flow that is due, and whose message was lost."""
    runner.register_flow_template(template())
    flow = runner.schedule_flow("t")
    OrmQ.objects.all().delete()
    return flow


def let_a_second_pass() -> None:
    PacemakerBeat.objects.update_or_create(
        pk=1, defaults={"beat_at": timezone.now() - timedelta(seconds=1)}
    )


def woken_by(runner: FlowRunner) -> int:
    """Let a pacemaker look; return how many messages it sent."""
    before = OrmQ.objects.count()
    assert 0 < runner.wake_worker() <= 1
    return OrmQ.objects.count() - before


def test_the_first_pacemaker_of_an_installation_wakes_at_once(
    runner: FlowRunner, due: FlowExecution
) -> None:
    assert woken_by(runner) == 1
    assert woken_by(runner) == 0


def test_an_idle_pacemaker_asks_one_query(runner: FlowRunner, due: FlowExecution) -> None:
    runner.cancel_flow_execution(due)
    with CaptureQueriesContext(connection) as captured:
        assert runner.wake_worker() == 1
    assert len(captured) == 1


def test_i1_a_lost_message_is_sent_again(runner: FlowRunner, due: FlowExecution) -> None:
    let_a_second_pass()
    assert woken_by(runner) == 1


def test_i1_a_later_flow_is_woken_when_its_time_has_come(runner: FlowRunner) -> None:
    runner.register_flow_template(template())
    later = runner.schedule_flow("t", run_at=timezone.now() + timedelta(seconds=60))
    assert woken_by(runner) == 0
    FlowExecution.objects.filter(pk=later.pk).update(run_at=timezone.now())
    # Even where a pacemaker has sent a message within this second.
    PacemakerBeat.objects.update_or_create(pk=1, defaults={"beat_at": timezone.now()})
    assert woken_by(runner) == 1
    assert woken_by(runner) == 0


def test_a_pacemaker_waits_for_the_moment_of_the_next_flow(runner: FlowRunner) -> None:
    runner.register_flow_template(template())
    assert runner.wake_worker() == 1
    now = runner.service.repository.now()
    for milliseconds in (900, 60_000):
        runner.schedule_flow("t", run_at=now + timedelta(milliseconds=milliseconds))
    waits = runner.wake_worker()
    passed = (runner.service.repository.now() - now).total_seconds()
    # Within the milliseconds that the questions took; SQLite rounds to one.
    assert 0.898 - passed <= waits <= 0.902


def test_many_flows_that_fall_due_at_one_moment_wake_some_workers_at_once(
    runner: FlowRunner,
) -> None:
    runner.register_flow_template(template())
    for _ in range(20):
        runner.schedule_flow("t", run_at=timezone.now() + timedelta(seconds=60))
    FlowExecution.objects.update(run_at=timezone.now())
    assert woken_by(runner) == MOST_WAKE_UPS
    let_a_second_pass()
    assert woken_by(runner) == 1


def test_i1_a_flow_that_lost_its_worker_is_taken_back_and_woken(
    runner: FlowRunner, due: FlowExecution
) -> None:
    run = runner.service.claim_flow(due, runner.get_flow_template("t"), "gone")
    assert run is not None
    let_a_second_pass()
    assert woken_by(runner) == 0
    FlowExecution.objects.update(lease_expires_at=timezone.now() - timedelta(seconds=1))
    assert woken_by(runner) == 1
    assert FlowExecution.objects.get().status == FlowStatus.RESCHEDULED


def test_flows_that_nobody_here_knows_wake_nobody(due: FlowExecution) -> None:
    assert woken_by(FlowRunner()) == 0


def test_a_backlog_that_waits_makes_no_storm_of_messages(runner: FlowRunner) -> None:
    """20,000 flows, some of them from a moment on."""
    runner.register_flow_template(template())
    flow = runner.schedule_flow("t")
    FlowExecution.objects.bulk_create(
        FlowExecution(
            template_name="t",
            task_names=flow.task_names,
            status=FlowStatus.SCHEDULED,
            run_at=flow.run_at,
            created_at=flow.run_at,
            # Those without a rank were scheduled for later, and have had no message.
            ready_rank=flow.ready_rank if number >= 1000 else None,
        )
        for number in range(19_999)
    )
    # Within one transaction, a server keeps, and scans, every state that a row ever had.
    seconds = 600 if connection.vendor == "sqlite" else 60
    for _ in range(seconds):
        let_a_second_pass()
        runner.wake_worker()
    # The other pacemakers find the second's beat taken.
    PacemakerBeat.objects.update(beat_at=timezone.now() + timedelta(seconds=60))
    assert [woken_by(runner) for _ in range(20)] == [0] * 20
    # The first flow's own, those for the flows whose moment came, and one in each other second.
    assert OrmQ.objects.count() == 1 + MOST_WAKE_UPS + seconds - 1


@pytest.mark.django_db(transaction=True)
def test_many_pacemakers_do_no_double_work(runner: FlowRunner, due: FlowExecution) -> None:
    let_a_second_pass()
    barrier = threading.Barrier(6)

    def beat() -> None:
        try:
            barrier.wait(10)
            runner.wake_worker()
        finally:
            connections.close_all()

    threads = [threading.Thread(target=beat) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert OrmQ.objects.count() == 1


@pytest.mark.django_db(transaction=True)
def test_the_thread_wakes_stops_and_leaves_no_connection(
    runner: FlowRunner, due: FlowExecution
) -> None:
    pacemaker = Pacemaker(runner)
    pacemaker.start()
    until(OrmQ.objects.exists)
    pacemaker.stop()
    assert not pacemaker.is_alive()


@pytest.mark.django_db(transaction=True)
def test_a_pacemaker_outlives_its_connection(
    runner: FlowRunner, due: FlowExecution, caplog: pytest.LogCaptureFixture
) -> None:
    if connection.vendor == "sqlite":
        pytest.skip("SQLite has no connection to lose")
    pacemaker = Pacemaker(runner)
    pacemaker.start()
    try:
        until(OrmQ.objects.exists)
        first = others()
        assert len(first) == 1
        with connection.cursor() as cursor:
            kill = "SELECT pg_terminate_backend(%s)"
            cursor.execute("KILL %s" if connection.vendor == "mysql" else kill, first)
        OrmQ.objects.all().delete()
        until(OrmQ.objects.exists)
        assert others() != first
        # It is said once that the database was away, and once that it is back.
        until(lambda: len(caplog.records) == 2)
        assert "tries on" in caplog.messages[0]
        assert "works again" in caplog.messages[1]
    finally:
        pacemaker.stop()
    until(lambda: not others())


def others() -> list[int]:
    """The other connections to this test's database."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT id FROM information_schema.processlist"
            " WHERE db = DATABASE() AND id <> CONNECTION_ID()"
            if connection.vendor == "mysql"
            else "SELECT pid FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        return [row[0] for row in cursor.fetchall()]


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.django_db(transaction=True)
def test_a_pacemaker_shows_its_process_and_forgets_those_long_gone(runner: FlowRunner) -> None:
    now = timezone.now()
    day = timedelta(days=1)
    for name, seen_at in [("gone:1", now - day * 1.01), ("killed:1", now - day * 0.99)]:
        WorkerProcess.objects.create(name=name, started_at=now - 2 * day, seen_at=seen_at)
    # Of a process that was killed, and whose number this one has got.
    WorkerProcess.objects.create(name=worker_name(), started_at=now - 2 * day, seen_at=now - day)
    with Pacemaker(runner) as pacemaker:
        until(lambda: WorkerProcess.objects.filter(started_at__gte=now).exists())
        shown = WorkerProcess.objects.get(name=worker_name())
        assert shown.started_at >= now
        pacemaker._refresh_at = 1
        until(lambda: WorkerProcess.objects.get(name=worker_name()).seen_at > shown.seen_at)
        assert WorkerProcess.objects.get(name=worker_name()).started_at == shown.started_at
        assert set(WorkerProcess.objects.values_list("name", flat=True)) == {
            "killed:1",
            worker_name(),
        }
    assert list(WorkerProcess.objects.values_list("name", flat=True)) == ["killed:1"]


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("broken", ["wake_worker", "sync_recurring", "prune_kept"])
def test_a_duty_that_fails_holds_up_no_other(
    runner: FlowRunner,
    due: FlowExecution,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    broken: str,
) -> None:
    done: list[str] = []

    def duty(name: str) -> Callable[[], float]:
        def does() -> float:
            done.append(name)
            if name == broken:
                raise ValueError("a bad recurrence")
            return 0.5

        return does

    duties = ["wake_worker", "sync_recurring", "prune_kept"]
    for name in duties:
        monkeypatch.setattr(runner, name, duty(name))
    pacemaker = Pacemaker(runner)
    for _ in range(3):
        assert 0 < pacemaker.beat() <= 1
    assert done[:3] == duties
    assert WorkerProcess.objects.count() == 1
    failures = [message for message in caplog.messages if "has failed; it tries on" in message]
    assert len(failures) == 1


@pytest.mark.django_db(transaction=True)
def test_a_pacemaker_that_is_stopped_within_a_duty_begins_no_other(
    runner: FlowRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    pacemaker = Pacemaker(runner)

    def wake_worker() -> float:
        done.append("wake_worker")
        pacemaker._stopped.set()
        return 0.5

    monkeypatch.setattr(runner, "wake_worker", wake_worker)
    monkeypatch.setattr(runner, "sync_recurring", lambda: done.append("sync_recurring"))
    pacemaker.start()
    pacemaker.join(30)
    assert done == ["wake_worker"]
    assert not WorkerProcess.objects.exists()


class RefusedOnce(Presence):
    """Its process's row can be removed only at the second try."""

    tries = 0

    def _leave(self) -> float:
        self.tries += 1
        if self.tries == 1:
            raise OperationalError("Deadlock found when trying to get lock")
        return super()._leave()


@pytest.mark.django_db(transaction=True)
def test_a_row_that_cannot_be_removed_at_once_is_removed_a_little_later() -> None:
    presence = RefusedOnce()
    presence.start()
    until(WorkerProcess.objects.exists)
    presence.stop()
    assert presence.tries == 2
    assert not WorkerProcess.objects.exists()
