"""A slice of time that ends in the middle of a flow: the next worker continues it once."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from django.db import connections
from django_q.models import OrmQ

from ebbs_and_flows import ExecutionContext, FlowStatus, FlowTemplate, flow_runner, task
from ebbs_and_flows.conf import get_settings
from ebbs_and_flows.engines.django_q import run_due_flows
from ebbs_and_flows.models import FlowExecution, PacemakerBeat, TaskExecution

from .chaos import evidence, faults
from .chaos.evidence import Court, noted
from .chaos.processes import in_a_process
from .databases import connection

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.processes]

MISSED = 98
"""The exit code of a worker that made no such statement."""
LAST = 14
"""How many statements before the end of a slice the hand-over has begun, on each database."""
passed = 0.0
"""The seconds by the clock that slices go by."""


@task
@noted
def first(context: ExecutionContext) -> ExecutionContext:
    return context.with_entries(first=context.attempt)


@task
@noted
def long(context: ExecutionContext) -> ExecutionContext:
    """Take as long as a slice."""
    global passed
    passed += get_settings().SLICE_SECONDS
    return context.with_entries(long=context.attempt)


@task
@noted
def last(context: ExecutionContext) -> ExecutionContext:
    return context.with_entries(last=context.attempt)


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What the tasks note; the template "sliced" is registered."""
    monkeypatch.setenv(evidence.LOG, str(tmp_path / "log"))
    clock = SimpleNamespace(monotonic=lambda: passed)
    monkeypatch.setattr("ebbs_and_flows.engines.slices.time", clock)
    flow_runner.register_flow_template(FlowTemplate("sliced", tasks=[first, long, last]))
    yield tmp_path / "log"
    flow_runner._templates.pop("sliced")


def schedule() -> FlowExecution:
    flow = flow_runner.schedule_flow("sliced")
    OrmQ.objects.all().delete()
    connections.close_all()
    return flow


def work() -> None:
    """Be a worker that has got a message."""
    run_due_flows()


def test_i2_a_flow_is_handed_over_at_the_end_of_a_slice(log: Path) -> None:
    flow = schedule()
    assert in_a_process(work) == 0
    flow.refresh_from_db()
    assert (flow.status, flow.claimed_by, flow.lease_expires_at) == ("RUNNING", "", None)
    assert (flow.current_task_index, flow.claim) == (2, 1)
    assert not TaskExecution.objects.filter(status="RUNNING").exists()
    # One message for the rest.
    assert OrmQ.objects.count() == 1
    OrmQ.objects.all().delete()
    connections.close_all()
    assert in_a_process(work) == 0
    flow.refresh_from_db()
    assert (flow.status, flow.claim) == ("SUCCEEDED", 2)
    assert OrmQ.objects.count() == 0
    attempts = TaskExecution.objects.order_by("pk").values_list("task_name", "attempt", "claim")
    assert list(attempts) == [("first", 1, 1), ("long", 1, 1), ("last", 1, 2)]
    processes = {line.task: line.process for line in evidence.read_log(log)}
    assert processes["first"] == processes["long"] != processes["last"]
    assert Court({flow.pk: {FlowStatus.SUCCEEDED}}, log).judge().problems == []


def die_at(number: int, *, after: bool) -> int:
    """Be a worker that is lost before that statement of its slice, or after it."""
    connection.ensure_connection()
    fault = faults.Fault(connections[connection.alias], faults.die, number, after=after)
    run_due_flows()
    return 0 if fault.done else MISSED


def count() -> int:
    """Return how many statements a slice makes."""
    connection.ensure_connection()
    fault = faults.Fault(connections[connection.alias])
    run_due_flows()
    return len(fault.boundaries)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_i1_i2_a_worker_that_is_lost_at_a_hand_over_loses_and_repeats_nothing(
    log: Path, after: bool
) -> None:
    expected = {schedule().pk: {FlowStatus.SUCCEEDED}}
    total = in_a_process(count)
    assert in_a_process(work) == 0
    handed_over = []
    for number in range(total - LAST, total + 1):
        flow = schedule()
        expected[flow.pk] = {FlowStatus.SUCCEEDED}
        code = in_a_process(partial(die_at, number, after=after))
        assert code in (faults.DIED, MISSED), f"statement {number}"
        flow.refresh_from_db()
        handed_over.append(flow.status == "RUNNING" and flow.lease_expires_at is None)
        # Its lease has expired, and its message may be lost: a pacemaker sends another.
        late = flow_runner.service.repository.now() - timedelta(hours=1)
        FlowExecution.objects.filter(lease_expires_at__isnull=False).update(lease_expires_at=late)
        PacemakerBeat.objects.all().delete()
        OrmQ.objects.all().delete()
        flow_runner.wake_worker()
        assert OrmQ.objects.exists()
        while OrmQ.objects.exists():
            OrmQ.objects.all().delete()
            connections.close_all()
            assert in_a_process(work) == 0
        flow.refresh_from_db()
        assert flow.status == FlowStatus.SUCCEEDED
    # Lost before the hand-over and after it.
    assert set(handed_over) == {False, True}
    assert Court(expected, log).judge().problems == []
