"""The pacemaker wakes workers for what is due, once a second for the whole installation."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import pytest
from django.db import connection, connections
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from django_q.models import OrmQ

from ebbs_and_flows import FlowRunner, FlowStatus, FlowTemplate, task
from ebbs_and_flows.models import FlowExecution, PacemakerBeat
from ebbs_and_flows.pacemaker import Pacemaker

pytestmark = pytest.mark.django_db


@pytest.fixture
def due(runner: FlowRunner) -> FlowExecution:
    """A flow that is due, and whose message was lost."""
    template = FlowTemplate("t", tasks=[task(name="only")(lambda context: context)])
    runner.register_flow_template(template)
    flow = runner.schedule_flow("t")
    OrmQ.objects.all().delete()
    return flow


def let_a_second_pass() -> None:
    PacemakerBeat.objects.update_or_create(
        pk=1, defaults={"beat_at": timezone.now() - timedelta(seconds=1)}
    )


def test_the_first_pacemaker_of_an_installation_wakes_at_once(
    runner: FlowRunner, due: FlowExecution
) -> None:
    assert runner.wake_worker()
    assert not runner.wake_worker()


def test_an_idle_pacemaker_asks_one_query(runner: FlowRunner, due: FlowExecution) -> None:
    runner.cancel_flow_execution(due)
    with CaptureQueriesContext(connection) as captured:
        assert not runner.wake_worker()
    assert len(captured) == 1


def test_i1_a_lost_message_is_sent_again(runner: FlowRunner, due: FlowExecution) -> None:
    let_a_second_pass()
    assert runner.wake_worker()
    assert OrmQ.objects.count() == 1


def test_i1_a_later_flow_is_woken_when_its_time_has_come(
    runner: FlowRunner, due: FlowExecution
) -> None:
    let_a_second_pass()
    FlowExecution.objects.update(run_at=timezone.now() + timedelta(seconds=60))
    assert not runner.wake_worker()
    FlowExecution.objects.update(run_at=timezone.now())
    assert runner.wake_worker()


def test_i1_a_flow_that_lost_its_worker_is_taken_back_and_woken(
    runner: FlowRunner, due: FlowExecution
) -> None:
    assert runner.service.claim_flow(due, runner.get_flow_template("t"), "gone") is not None
    let_a_second_pass()
    assert not runner.wake_worker()
    FlowExecution.objects.update(lease_expires_at=timezone.now() - timedelta(seconds=1))
    assert runner.wake_worker()
    assert FlowExecution.objects.get().status == FlowStatus.RESCHEDULED


def test_a_backlog_makes_one_message_a_second(runner: FlowRunner, due: FlowExecution) -> None:
    for _ in range(20):
        runner.schedule_flow("t")
    OrmQ.objects.all().delete()
    let_a_second_pass()
    assert sum(runner.wake_worker() for _ in range(50)) == 1
    assert OrmQ.objects.count() == 1


def test_flows_that_nobody_here_knows_wake_nobody(due: FlowExecution) -> None:
    assert not FlowRunner().wake_worker()


@pytest.mark.django_db(transaction=True)
def test_many_pacemakers_do_no_double_work(runner: FlowRunner, due: FlowExecution) -> None:
    let_a_second_pass()
    woken: list[bool] = []
    barrier = threading.Barrier(6)

    def beat() -> None:
        try:
            barrier.wait(10)
            woken.append(runner.wake_worker())
        finally:
            connections.close_all()

    threads = [threading.Thread(target=beat) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(woken) == [False] * 5 + [True]
    assert OrmQ.objects.count() == 1


@pytest.mark.django_db(transaction=True)
def test_the_thread_wakes_stops_and_leaves_no_connection(
    runner: FlowRunner, due: FlowExecution
) -> None:
    pacemaker = Pacemaker(runner)
    pacemaker.start()
    end = time.monotonic() + 20
    while not OrmQ.objects.exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    pacemaker.stop()
    assert not pacemaker.is_alive()
