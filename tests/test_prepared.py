"""What the hot path's statements are handed to the driver by, beneath Django's own cursors."""

from __future__ import annotations

import gc
import sqlite3
import threading
import weakref
from typing import Any

import pytest
from django.db import OperationalError, connections

from ebbs_and_flows import ExecutionContext, FlowRunner, FlowStatus, FlowTemplate, task
from ebbs_and_flows.models import FlowExecution
from ebbs_and_flows.repository import direct
from tests.databases import connection

pytestmark = pytest.mark.django_db(transaction=True)

only_postgresql = pytest.mark.skipif(
    connection.vendor != "postgresql", reason="statements are prepared on PostgreSQL"
)
ODD = "100 % of '%s' \\ \"$1\" ? :name\n\ttab ä 😀 \u2028"


def add(context: ExecutionContext) -> ExecutionContext:
    return context.with_entries(**{f"{context.task_name} {ODD.strip()}".split("\n", 1)[0]: ODD})


def two_tasks(runner: FlowRunner) -> FlowTemplate:
    tasks = [task(name="one")(add), task(name="two % %s ?")(add)]
    return runner.register_flow_template(FlowTemplate("odd", tasks=tasks))


def prepared() -> set[str]:
    with connection.cursor() as cursor:
        cursor.execute("SELECT name FROM pg_prepared_statements WHERE name LIKE 'ebbs_%'")
        return {name for (name,) in cursor.fetchall()}


def run(runner: FlowRunner) -> FlowExecution:
    flow = runner.schedule_flow("odd", {"first": ODD})
    ran = runner.run_flow()
    assert ran is not None
    assert ran.pk == flow.pk
    return ran


def test_what_comes_out_is_what_went_in_whichever_way_it_went(runner: FlowRunner) -> None:
    two_tasks(runner)
    # The first ones are made as they are, the later ones prepared.
    flows = [run(runner) for _ in range(5)]

    def watch(execute: Any, sql: str, parameters: Any, many: bool, context: Any) -> Any:
        return execute(sql, parameters, many, context)

    with connection.execute_wrapper(watch):
        flows.append(run(runner))
    for flow in flows:
        # Read by the last step, and by the ORM.
        stored = FlowExecution.objects.get(pk=flow.pk)
        fields = [field.attname for field in FlowExecution._meta.concrete_fields]
        assert [getattr(flow, name) for name in fields] == [
            getattr(stored, name) for name in fields
        ]
        assert flow.status == FlowStatus.SUCCEEDED
        assert list(flow.execution_context.values()) == [ODD] * 3
        attempts = runner.service.get_flow_task_execution_history(flow)
        assert [attempt.task_name for attempt in attempts] == ["one", "two % %s ?"]


def test_who_watches_a_connection_sees_every_statement(runner: FlowRunner) -> None:
    two_tasks(runner)
    for _ in range(4):
        run(runner)
    runner.schedule_flow("odd")
    seen: list[str] = []

    def watch(execute: Any, sql: str, parameters: Any, many: bool, context: Any) -> Any:
        seen.append(sql)
        return execute(sql, parameters, many, context)

    with connection.execute_wrapper(watch):
        runner.run_flow()
    writes = [sql for sql in seen if "UPDATE ebbs_and_flows_flowexecution" in sql]
    # The claim and two steps.
    assert len(writes) == 3


@only_postgresql
def test_the_claim_and_the_steps_are_planned_once_a_connection(runner: FlowRunner) -> None:
    two_tasks(runner)
    connection.close()
    assert prepared() == set()
    for _ in range(4):
        run(runner)
    # The claim, a step that goes on, and one that is the last.
    assert len(prepared()) == 3


@only_postgresql
@pytest.mark.parametrize("command", ["DEALLOCATE ALL", "DISCARD ALL"])
def test_a_session_that_forgot_its_statements_goes_on(runner: FlowRunner, command: str) -> None:
    two_tasks(runner)
    for _ in range(4):
        run(runner)
    with connection.cursor() as cursor:
        cursor.execute(command)
    for _ in range(4):
        assert run(runner).status == FlowStatus.SUCCEEDED
    assert len(prepared()) == 3


@only_postgresql
def test_a_name_that_another_session_has_prepared_here_is_the_same_statement(
    runner: FlowRunner,
) -> None:
    from ebbs_and_flows.repository import prepared as module

    two_tasks(runner)
    for _ in range(4):
        run(runner)
    # As behind a pooler: the server's session knows the names, and this one has forgotten.
    module._uses.clear()
    for _ in range(4):
        assert run(runner).status == FlowStatus.SUCCEEDED


@pytest.mark.skipif(connection.vendor != "sqlite", reason="another database's locks are rows'")
def test_the_drivers_errors_are_djangos(runner: FlowRunner) -> None:
    other = sqlite3.connect(connection.settings_dict["NAME"], isolation_level=None)
    try:
        with connection.cursor() as cursor:
            cursor.execute("PRAGMA busy_timeout = 10")
        other.execute("BEGIN IMMEDIATE")
        with (
            pytest.raises(OperationalError, match="database is locked"),
            runner.service.repository.brief_transaction(),
        ):
            pass
        other.execute("ROLLBACK")
        with runner.service.repository.brief_transaction() as cursor:
            assert isinstance(cursor, direct._SQLiteCursor)
            cursor.execute("SELECT %s", [1])
            assert cursor.fetchone() == (1,)
    finally:
        other.close()
        connection.close()


@only_postgresql
def test_a_plan_that_an_altered_table_outdated_is_made_anew(runner: FlowRunner) -> None:
    two_tasks(runner)
    for _ in range(4):
        run(runner)
    table = FlowExecution._meta.db_table
    try:
        with connection.cursor() as cursor:
            cursor.execute(f"ALTER TABLE {table} ALTER COLUMN claimed_by TYPE varchar(201)")
            cursor.execute(f"ALTER TABLE {table} ALTER COLUMN first_task_index TYPE bigint")
        for _ in range(6):
            assert run(runner).status == FlowStatus.SUCCEEDED
        assert len(prepared()) == 3
    finally:
        with connection.cursor() as cursor:
            cursor.execute(f"ALTER TABLE {table} ALTER COLUMN claimed_by TYPE varchar(200)")
            cursor.execute(f"ALTER TABLE {table} ALTER COLUMN first_task_index TYPE integer")


def test_a_connection_that_is_thrown_away_is_not_kept(runner: FlowRunner) -> None:
    two_tasks(runner)
    flow = run(runner)
    thrown_away: list[weakref.ref[Any]] = []

    def look() -> None:
        for _ in range(4):
            runner.service.repository.find(flow.pk)
        wrapper = connections[connection.alias]
        thrown_away.append(weakref.ref(wrapper))
        if connection.vendor == "postgresql":
            thrown_away.append(weakref.ref(wrapper.connection))
        wrapper.close()

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    gc.collect()
    assert [reference() for reference in thrown_away] == [None] * len(thrown_away)


@pytest.mark.skipif(connection.vendor == "mysql", reason="nothing goes past Django there")
def test_a_backend_of_somebody_elses_sees_every_statement() -> None:
    ours = connections[connection.alias]

    class Backend(type(ours)):  # type: ignore[misc]
        """As those that choose a tenant's schema with the next cursor."""

    assert direct.goes_direct(ours)
    theirs = Backend(ours.settings_dict, ours.alias)
    try:
        assert not direct.goes_direct(theirs)
    finally:
        theirs.close()
