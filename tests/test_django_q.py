"""What is put on django-q2's queue, and what becomes of it."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest
from django.test.utils import CaptureQueriesContext
from django_q.conf import Conf
from django_q.models import OrmQ, Schedule, Task
from django_q.scheduler import scheduler
from django_q.tasks import async_task

from ebbs_and_flows import ExecutionContext, FlowStatus, FlowTemplate, flow_runner, task
from ebbs_and_flows.engines.django_q import run_due_flows
from ebbs_and_flows.models import FlowExecution

from .databases import connection

pytestmark = pytest.mark.django_db(transaction=True)


@task(name="only")
def only(context: ExecutionContext) -> ExecutionContext:
    if context["fails"]:
        raise ValueError("the card is bad")
    return context


@pytest.fixture(autouse=True)
def template() -> Any:
    flow_runner.register_flow_template(
        FlowTemplate("queued", tasks=[only], cron="0 6 * * *"),
    )
    yield
    flow_runner._templates.pop("queued")
    flow_runner._recurrences.clear()


def test_a_message_is_sent_in_the_transaction_of_its_flow() -> None:
    with pytest.raises(ZeroDivisionError), flow_runner.service.repository.atomic():
        flow_runner.schedule_flow("queued", {"fails": False})
        assert OrmQ.objects.count() == 1
        raise ZeroDivisionError
    assert not OrmQ.objects.exists()
    assert not FlowExecution.objects.exists()


def test_what_is_enqueued_is_not_said_among_a_commands_words() -> None:
    said: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    queue = logging.getLogger("django-q")
    level = queue.level
    queue.addHandler(listener)
    queue.setLevel(logging.INFO)
    try:
        flow_runner.schedule_flow("queued", {"fails": False})
        assert (OrmQ.objects.count(), said) == (1, [])
        async_task("math.sqrt", 4)
        assert "Enqueued" in said[0]
    finally:
        queue.removeHandler(listener)
        queue.setLevel(level)


def test_each_message_says_itself_whether_it_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # As django-q2 reads it from Q_CLUSTER['ack_failures'].
    for ack_failures in (False, True):
        monkeypatch.setattr(Conf, "ACK_FAILURES", ack_failures)
        flow_runner.schedule_flow("queued", {"fails": False})
        flow_runner.sync_recurring()
        Schedule.objects.update(next_run="2026-01-01T00:00Z")
        scheduler()
        wake_up, firing = (row.task for row in OrmQ.objects.order_by("pk"))
        assert (wake_up["ack_failure"], wake_up["save"]) == (True, False)
        assert (firing["ack_failure"], firing["save"]) == (False, False)
        OrmQ.objects.all().delete()


def test_a_message_with_nothing_due_costs_one_query() -> None:
    # The first look of a process asks for the server's settings, too.
    run_due_flows()
    with CaptureQueriesContext(connection) as captured:
        run_due_flows()
    assert len(captured) == 1


@pytest.mark.parametrize("fails", [False, True])
def test_with_sync_a_flow_runs_at_the_commit_and_a_failure_is_the_flows_alone(
    monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    monkeypatch.setattr(Conf, "SYNC", True)
    with flow_runner.service.repository.atomic():
        flow = flow_runner.schedule_flow("queued", {"fails": fails})
        assert flow_runner.service.get_flow_execution(flow).status == FlowStatus.SCHEDULED
    ended = flow_runner.service.get_flow_execution(flow)
    assert ended.status == (FlowStatus.FAILED if fails else FlowStatus.SUCCEEDED)
    # Neither a result nor a failure of django-q2, and no pacemaker in this process.
    assert not Task.objects.exists()
    assert "flow-pacemaker" not in {thread.name for thread in threading.enumerate()}
