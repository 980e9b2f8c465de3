"""Many flows are rescheduled and cancelled by a few statements, and each as it would be alone."""

from __future__ import annotations

from typing import Any

import pytest
from django.test.utils import CaptureQueriesContext
from django_q.models import OrmQ

from ebbs_and_flows import ExecutionContext, FlowRunner, FlowStatus, FlowTemplate, Retry, Task
from ebbs_and_flows.models import FlowExecution, FlowTransition
from ebbs_and_flows.runner import MOST_WAKE_UPS

from .databases import connection

pytestmark = pytest.mark.django_db


class Fails(Task):
    """Fail, twice in a row each time that it is given its allowance."""

    retry = Retry(attempts=2, delay=0, jitter=False)

    def run(self, context: ExecutionContext) -> ExecutionContext:
        raise ValueError("no")


@pytest.fixture
def runner() -> FlowRunner:
    runner = FlowRunner()
    runner.register_flow_template(FlowTemplate("t", tasks=[Fails()], deadline=3600))
    return runner


def fail_all(runner: FlowRunner) -> None:
    while runner.run_next() is not None:
        pass


def stored(flow: FlowExecution) -> dict[str, Any]:
    row = FlowExecution.objects.filter(pk=flow.pk).values().get()
    for own in ("id", "key", "token", "created_at", "started_at", "finished_at", "run_at"):
        del row[own]
    return row


def test_many_are_rescheduled_as_one_would_be(runner: FlowRunner) -> None:
    flows = runner.schedule_flows("t", [None] * 4)
    fail_all(runner)
    alone, *rest = flows
    runner.reschedule_flow_execution(alone, actor="ada", priority=7)
    waits = runner.schedule_flow("t")
    OrmQ.objects.all().delete()
    pks = [flow.pk for flow in (*rest, alone, waits)]
    done = runner.reschedule_flow_executions(pks, actor="ada", priority=7)
    assert done == [flow.pk for flow in rest]
    assert OrmQ.objects.count() == min(len(rest), MOST_WAKE_UPS)
    for flow in rest:
        assert stored(flow) == stored(alone)
        last = FlowTransition.objects.filter(flow_execution=flow).latest("pk")
        assert (last.from_status, last.to_status, last.actor) == ("FAILED", "RESCHEDULED", "ada")
    # Each has its whole allowance anew, and attempt numbers go on counting.
    fail_all(runner)
    for flow in rest:
        history = runner.service.get_flow_task_execution_history(flow)
        assert [row.attempt for row in history] == [1, 2, 3, 4]


def test_many_are_cancelled_at_once_or_after_the_task_in_progress(runner: FlowRunner) -> None:
    waits, runs, failed = runner.schedule_flows("t", [None] * 3)
    runner.run_flow_execution(failed)
    runner.run_flow_execution(failed)
    assert runner.service.claim_flow(runs, runner.get_flow_template("t"), "worker") is not None
    pks = [waits.pk, runs.pk, failed.pk]
    assert sorted(runner.cancel_flow_executions(pks, actor="ada", reason="sold out")) == pks
    for flow in (waits, runs, failed):
        flow.refresh_from_db()
    assert [flow.status for flow in (waits, runs, failed)] == ["CANCELLED", "RUNNING", "CANCELLED"]
    assert (runs.cancel_requested, runs.cancel_requested_by) == (True, "ada")
    assert runs.cancel_reason == "sold out"
    assert waits.finished_at is not None
    last = FlowTransition.objects.filter(flow_execution=waits).latest("pk")
    assert (last.from_status, last.actor, last.reason) == ("SCHEDULED", "ada", "sold out")
    # One that is over is left alone.
    assert runner.cancel_flow_executions([waits.pk]) == []
    assert FlowTransition.objects.filter(flow_execution=waits, to_status="CANCELLED").count() == 1


@pytest.mark.parametrize("number", [20, 400])
def test_the_number_of_statements_does_not_grow_with_the_flows(
    runner: FlowRunner, number: int
) -> None:
    flows = runner.schedule_flows("t", [None] * number)
    pks = [flow.pk for flow in flows]
    FlowExecution.objects.update(status=FlowStatus.FAILED, ready_rank=None)
    with CaptureQueriesContext(connection) as captured:
        assert len(runner.reschedule_flow_executions(pks)) == number
        assert len(runner.cancel_flow_executions(pks)) == number
    # Eight messages; SQLite takes some 140 transitions in one statement.
    assert len(captured) <= 40


def test_entries_of_any_number_and_size_are_stored(runner: FlowRunner) -> None:
    # Twenty million bytes: MariaDB takes sixteen in one statement.
    big = {f"part_{number}": "x" * 1_000_000 for number in range(20)}
    many = {f"entry_{number}": number for number in range(1200)}
    flow, other = runner.schedule_flows("t", [big, many])
    assert dict(flow.execution_context) == big
    assert dict(other.execution_context) == many
