"""The stored times: the later write has the later time, however long its statement waited."""

from __future__ import annotations

import threading
import time
from itertools import pairwise
from typing import Any

import pytest
from django.db import connections

from ebbs_and_flows import ExecutionContext, FlowRunner, FlowTemplate, task
from ebbs_and_flows.integrity import IntegrityCheck
from ebbs_and_flows.models import FlowExecution, TaskExecution
from ebbs_and_flows.steps import CLAIMABLE

from .databases import FLOWS, connection
from .test_claim_races import is_blocked

pytestmark = pytest.mark.django_db(transaction=True)


@task
def one(context: ExecutionContext) -> ExecutionContext:
    return context


@task
def two(context: ExecutionContext) -> ExecutionContext:
    return context


@task
def fail(context: ExecutionContext) -> ExecutionContext:
    raise ValueError("no")


def findings() -> list[str]:
    return [str(finding) for finding in IntegrityCheck().findings()]


@pytest.mark.skipif("connection.vendor != 'postgresql'", reason="a claim is one statement there")
def test_i6_an_attempt_starts_after_the_end_that_its_claim_has_seen(runner: FlowRunner) -> None:
    """A claim's statement is older than what it sees: it may have waited, here for a lock.

    On a new connection it waits for its plan, long enough for another worker's hand-back.
    """
    service = runner.service
    template = runner.register_flow_template(FlowTemplate("raced", tasks=[one, two]))
    flow = runner.schedule_flow("raced")
    run = service.claim_flow(flow, template, "the first worker")
    assert run is not None
    backend: list[int] = []
    claimed: list[Any] = []

    def claim() -> None:
        connection.ensure_connection()
        backend.append(connection.connection.info.backend_pid)
        try:
            claimed.append(service.claim([template], "the second worker", CLAIMABLE))
        finally:
            connections.close_all()

    claimer = threading.Thread(target=claim)
    with service.repository.step():
        with connection.cursor() as cursor:
            cursor.execute(f"LOCK TABLE {FlowExecution._meta.db_table} IN ACCESS EXCLUSIVE MODE")
        claimer.start()
        until = time.monotonic() + 20
        while not (backend and is_blocked(backend[0])) and time.monotonic() < until:
            time.sleep(0.01)
        service.succeed_step(run, {}, "two", hand_back=True)
    claimer.join()
    assert claimed[0] is not None
    assert findings() == []
    before, after = TaskExecution.objects.order_by("task_index")
    assert before.finished_at is not None
    assert before.finished_at < after.started_at


@pytest.mark.parametrize("way", ["succeeded", "failed", "cancelled", "interrupted", "by hand"])
def test_a_flow_ends_no_earlier_than_its_last_attempt(runner: FlowRunner, way: str) -> None:
    def body(context: ExecutionContext) -> ExecutionContext:
        if way == "failed":
            raise ValueError("no")
        if way == "cancelled":
            runner.cancel_flow_execution(context.flow_execution_id or 0)
        elif way == "by hand":
            runner.service.update_flow_status(context.flow_execution_id or 0, "FAILED")  # type: ignore[arg-type]
        return context

    template = FlowTemplate("order", tasks=[one, task(name="last")(body)])
    runner.register_flow_template(template)
    flow = runner.schedule_flow("order")
    if way == "interrupted":
        run = runner.service.claim_flow(flow, template, "a lost worker")
        assert run is not None
        FlowExecution.objects.filter(pk=flow.pk).update(interruptions=99)
        held = runner.service.get_flow_execution(flow)
        with runner.service.repository.atomic():
            assert runner.service.interrupt(held, "interrupted: the worker was lost")
    else:
        runner.run_flow_execution(flow)
    flow.refresh_from_db(using=FLOWS)
    last = flow.task_executions.latest("pk")
    assert flow.is_finished
    assert flow.finished_at is not None
    assert last.finished_at is not None
    assert last.finished_at <= flow.finished_at
    assert findings() == []


def test_i3_within_a_step_the_next_attempt_starts_when_the_last_one_ends(
    runner: FlowRunner,
) -> None:
    names = [task(name=f"t{number}")(lambda context: context) for number in range(20)]
    runner.register_flow_template(FlowTemplate("order", tasks=names))
    flow = runner.run_flow_execution(runner.schedule_flow("order"))
    attempts = list(flow.task_executions.order_by("task_index"))
    for before, after in pairwise(attempts):
        assert before.started_at <= before.finished_at <= after.started_at  # type: ignore[operator]
    assert findings() == []
