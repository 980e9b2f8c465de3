"""Claims at the same instant as what other workers do, on a database that has such an instant."""

from __future__ import annotations

import threading
import time

import pytest
from django.db import DatabaseError

from ebbs_and_flows import ExecutionContext, FlowRunner, FlowStatus, FlowTemplate, task
from ebbs_and_flows.models import FlowExecution, FlowTemplateState, TaskExecution

from .databases import connection

pytestmark = pytest.mark.django_db(transaction=True)


def is_blocked(backend: int) -> bool:
    """Whether a server process waits for another one."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT cardinality(pg_blocking_pids(%s))", [backend])
        return bool(cursor.fetchone()[0])


@task
def first(context: ExecutionContext) -> ExecutionContext:
    return context


@pytest.mark.skipif("connection.vendor != 'postgresql'", reason="a claim is one statement there")
def test_an_attempt_that_the_claims_snapshot_did_not_see_is_not_made_twice(
    runner: FlowRunner,
) -> None:
    """A statement sees the attempts as they were when it began, and the flow as it is when locked.

    Between the two another worker may have claimed the flow, failed and set it free again.
    """
    runner.register_flow_template(FlowTemplate("raced", tasks=[first]))
    flow = runner.schedule_flow("raced")
    outcomes: list[object] = []
    backend: list[int] = []

    def claim() -> None:
        connection.ensure_connection()
        backend.append(connection.connection.info.backend_pid)
        try:
            outcomes.append(runner.run_next())
        except DatabaseError as error:
            outcomes.append(error)
        finally:
            connection.close()

    thread = threading.Thread(target=claim)
    repository = runner.service.repository
    with repository.atomic():
        with connection.cursor() as cursor:
            # The foreign key's own lock on the flow would keep the claim off.
            cursor.execute("SET LOCAL session_replication_role = replica")
        now = repository.now()
        TaskExecution.objects.create(
            flow_execution=flow,
            task_index=0,
            task_name="first",
            attempt=1,
            claim=0,
            status="FAILED",
            started_at=now,
            finished_at=now,
        )
        thread.start()
        until = time.monotonic() + 20
        while not (backend and is_blocked(backend[0])):
            assert time.monotonic() < until, "the claim did not wait for the attempt"
            time.sleep(0.01)
    thread.join(30)
    # What it could not do at that instant is done by the next look.
    assert not isinstance(outcomes[0], DatabaseError), outcomes
    flow.refresh_from_db()
    assert flow.status == FlowStatus.SUCCEEDED
    assert [row.attempt for row in runner.service.get_flow_task_execution_history(flow)] == [1, 2]


@pytest.mark.skipif("connection.vendor != 'postgresql'", reason="a claim is one statement there")
def test_a_claim_whose_snapshot_is_a_step_old_reads_the_entries_anew(runner: FlowRunner) -> None:
    """Another worker may claim the flow, make a step and hand it back, all in between."""
    seen: list[object] = []

    def write(context: ExecutionContext) -> ExecutionContext:
        return context.with_entries(written="by the other worker")

    def read(context: ExecutionContext) -> ExecutionContext:
        seen.append(context["written"])
        return context

    tasks = [task(name="write")(write), task(name="read")(read)]
    runner.register_flow_template(FlowTemplate("raced", tasks=tasks))
    flow = runner.schedule_flow("raced")
    state = FlowTemplateState._meta.db_table
    # The templates' states are read after the snapshot is taken, and before the flow is locked.
    # Here they make whoever reads them wait for this session, which itself does not.
    FlowTemplateState.objects.create(template_name="another")
    with connection.cursor() as cursor:
        cursor.execute(f"ALTER TABLE {state} RENAME TO states_themselves")
        cursor.execute(
            f"CREATE VIEW {state} AS SELECT * FROM states_themselves"
            " WHERE pg_advisory_lock(42) IS NOT NULL OFFSET 0"
        )
        cursor.execute("SELECT pg_advisory_lock(42)")
    backend: list[int] = []
    outcomes: list[FlowExecution | None] = []

    def claim() -> None:
        connection.ensure_connection()
        backend.append(connection.connection.info.backend_pid)
        try:
            outcomes.append(runner.run_next())
        finally:
            connection.close()

    thread = threading.Thread(target=claim)
    try:
        thread.start()
        until = time.monotonic() + 20
        while not (backend and is_blocked(backend[0])):
            assert time.monotonic() < until, "the claim did not wait"
            time.sleep(0.01)
        handed_back = runner.run_next(stop=lambda: True)
    finally:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_unlock_all()")
            thread.join(30)
            cursor.execute(f"DROP VIEW {state}")
            cursor.execute(f"ALTER TABLE states_themselves RENAME TO {state}")
    assert handed_back is not None
    assert handed_back.current_task_index == 1
    assert seen == ["by the other worker"]
    flow.refresh_from_db()
    assert (flow.status, flow.claim) == (FlowStatus.SUCCEEDED, 2)
