"""Claims at the same instant as what other workers do, on a database that has such an instant."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from typing import Any

import pytest
from django.db import DatabaseError, connections
from django.utils import timezone

from ebbs_and_flows import (
    ExecutionContext,
    FlowRunner,
    FlowStatus,
    FlowTemplate,
    TaskStatus,
    task,
)
from ebbs_and_flows.models import FlowExecution, FlowTemplateState, TaskExecution
from ebbs_and_flows.steps import CLAIMABLE

from .databases import atomic, connection

pytestmark = pytest.mark.django_db(transaction=True)

UNRANK = f"UPDATE {FlowExecution._meta.db_table} SET ready_rank = NULL WHERE id = %s"


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


def test_what_becomes_due_all_the_time_keeps_nobody_from_claiming(runner: FlowRunner) -> None:
    """Ranking what is due comes before a claim, and once."""
    runner.register_flow_template(FlowTemplate("ready", tasks=[first]))
    runner.schedule_flows("ready", [None] * 5)
    due = runner.schedule_flow("ready")
    repository = runner.service.repository

    def unrank(execute: Any, sql: str, parameters: Any, many: bool, context: Any) -> Any:
        answer = execute(sql, parameters, many, context)
        if sql.startswith("UPDATE") and "ready_rank" in sql and sql != UNRANK:
            # Ranked just now, and here is the next one already.
            with connection.cursor() as cursor:
                cursor.execute(UNRANK, [due.pk])
        return answer

    FlowExecution.objects.filter(pk=due.pk).update(ready_rank=None)
    assert repository.look(CLAIMABLE, runner.service.offers(runner.templates.values())).unranked
    with connection.execute_wrapper(unrank):
        ran = [runner.run_next() for _ in range(5)]
    assert all(flow is not None for flow in ran)


@pytest.mark.skipif("connection.vendor == 'sqlite'", reason="it has no locked rows")
def test_a_row_that_somebody_holds_keeps_nobody_from_claiming(runner: FlowRunner) -> None:
    runner.register_flow_template(FlowTemplate("ready", tasks=[first]))
    held, lost, wanted = (runner.schedule_flow("ready") for _ in range(3))
    assert runner.service.claim_flow(lost, runner.get_flow_template("ready"), "lost")
    FlowExecution.objects.filter(pk=held.pk).update(ready_rank=None)
    FlowExecution.objects.filter(pk=lost.pk).update(
        lease_expires_at=runner.service.repository.now() - timedelta(seconds=1)
    )
    locked, done = threading.Event(), threading.Event()

    def hold() -> None:
        try:
            with atomic():
                list(FlowExecution.objects.select_for_update().exclude(pk=wanted.pk))
                locked.set()
                done.wait(30)
        finally:
            connections.close_all()

    holder = threading.Thread(target=hold)
    holder.start()
    wait = "SET lock_timeout = '2s'"
    if connection.vendor == "mysql":
        wait = "SET innodb_lock_wait_timeout = 2"
    try:
        assert locked.wait(20)
        with connection.cursor() as cursor:
            cursor.execute(wait)
        claimed = runner.run_next()
    finally:
        done.set()
        holder.join()
        connection.close()
    assert claimed is not None
    assert claimed.pk == wanted.pk


def test_a_flow_that_was_set_running_by_hand_for_later_stops_nobody(runner: FlowRunner) -> None:
    runner.register_flow_template(FlowTemplate("ready", tasks=[first]))
    later = runner.schedule_flow("ready", run_at=timezone.now() + timedelta(days=1))
    runner.service.update_flow_status(later, FlowStatus.RUNNING)
    wanted = runner.schedule_flow("ready")
    claimed = runner.run_next()
    assert claimed is not None
    assert claimed.pk == wanted.pk


def test_a_flow_with_an_attempt_by_hand_is_claimed(runner: FlowRunner) -> None:
    runner.register_flow_template(FlowTemplate("ready", tasks=[first]))
    flow = runner.schedule_flow("ready")
    made = runner.service.create_task_execution(flow.pk, 0, "first", attempt=1, claim=0)
    runner.service.update_task_execution(made.pk, TaskStatus.FAILED)
    claimed = runner.run_next()
    assert claimed is not None
    assert claimed.status == FlowStatus.SUCCEEDED
    attempts = runner.service.get_flow_task_execution_history(flow)
    assert [attempt.attempt for attempt in attempts] == [1, 2]


@pytest.mark.parametrize("status", [FlowStatus.RUNNING, FlowStatus.FAILED, FlowStatus.SUCCEEDED])
def test_i3_a_status_that_is_changed_by_hand_ends_the_attempt_of_whoever_held_the_flow(
    runner: FlowRunner, status: FlowStatus
) -> None:
    template = runner.register_flow_template(FlowTemplate("held", tasks=[first]))
    flow = runner.schedule_flow("held")
    assert runner.service.claim_flow(flow, template, "a worker") is not None
    runner.cancel_flow_execution(flow)
    changed = runner.service.update_flow_status(flow, status, actor="ada")
    assert (changed.status, changed.cancel_requested) == (status, False)
    (attempt,) = runner.service.get_flow_task_execution_history(flow)
    assert (attempt.status, attempt.error_type) == (TaskStatus.FAILED, "TaskInterrupted")
    assert attempt.finished_at is not None


def test_i5_a_flow_whose_last_commit_was_refused_is_returned_as_failed(
    runner: FlowRunner,
) -> None:
    def break_a_reference(context: ExecutionContext) -> ExecutionContext:
        # Found out at the commit, where foreign keys are deferred.
        now = timezone.now()
        TaskExecution.objects.create(
            flow_execution_id=999_999, task_index=0, attempt=1, claim=0, started_at=now
        )
        return context

    broken = task(name="broken", atomic=True)(break_a_reference)
    runner.register_flow_template(FlowTemplate("broken", tasks=[broken]))
    flow = runner.schedule_flow("broken")
    returned = runner.run_next()
    assert returned is not None
    flow.refresh_from_db()
    assert (returned.status, flow.status) == (FlowStatus.FAILED, FlowStatus.FAILED)
