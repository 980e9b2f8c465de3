"""A task that changes its database session changes nothing for what runs after it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
from django.conf import settings
from django.db.backends.signals import connection_created

from ebbs_and_flows import ExecutionContext, FlowRunner, FlowStatus, FlowTemplate, task
from ebbs_and_flows.models import FlowExecution
from ebbs_and_flows.status import TaskStatus

from .databases import connection

pytestmark = pytest.mark.django_db(transaction=True)

_CHANGES = {
    "postgresql": [
        "SET search_path TO pg_catalog",
        "SELECT set_config('search_path', 'pg_catalog', false)",
        "/* a comment */ set role pg_monitor",
        "SET default_transaction_read_only TO on",
        "SET statement_timeout TO 1",
        "SET DateStyle TO 'SQL, DMY'",
        "SET TIME ZONE 'Asia/Tokyo'",
        "SET client_encoding TO LATIN1",
        "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL SERIALIZABLE",
    ],
    "mariadb": [
        "USE information_schema",
        "SET NAMES latin1",
        "SET SESSION TRANSACTION READ ONLY",
        "SET sql_mode = 'ANSI'",
        "SET autocommit = 0",
        "SET time_zone = '+09:00'",
        "SET max_statement_time = 0.000001",
    ],
    "sqlite": ["PRAGMA query_only = ON", "PRAGMA foreign_keys = OFF"],
}
_FATAL = {
    "postgresql": [*_CHANGES["postgresql"][:4]],
    "mariadb": [_CHANGES["mariadb"][0], _CHANGES["mariadb"][2]],
    "sqlite": _CHANGES["sqlite"][:1],
}
CHANGES, FATAL = _CHANGES[settings.DATABASE], _FATAL[settings.DATABASE]
TEXT = "Grüße, 東京"

Body = Callable[[ExecutionContext], ExecutionContext]
Flow = Callable[..., FlowExecution]


@pytest.fixture
def run(runner: FlowRunner) -> Flow:
    """Run two flows of a task with this body, and one more; return the first."""

    def run(body: Body, **options: Any) -> FlowExecution:
        @task
        def greet(context: ExecutionContext) -> ExecutionContext:
            return context.with_entries(text=TEXT)

        changing = task(name="changes", **options)(body)
        runner.register_flow_template(FlowTemplate("changing", tasks=[changing, greet]))
        runner.register_flow_template(FlowTemplate("plain", tasks=[greet]))
        flows = [runner.schedule_flow(name) for name in ("changing", "changing", "plain")]
        while runner.run_next() is not None:
            pass
        connection.close()
        plain = FlowExecution.objects.get(pk=flows[-1].pk)
        assert plain.status == FlowStatus.SUCCEEDED
        assert plain.execution_context["text"] == TEXT
        return FlowExecution.objects.get(pk=flows[0].pk)

    return run


@pytest.mark.parametrize("statement", CHANGES)
def test_a_session_that_a_task_has_changed_is_not_used_again(run: Flow, statement: str) -> None:
    def change(context: ExecutionContext) -> ExecutionContext:
        with connection.cursor() as cursor:
            cursor.execute(statement)
        return context

    flow = run(change)
    assert flow.status == FlowStatus.SUCCEEDED
    assert flow.execution_context["text"] == TEXT


@pytest.mark.parametrize("statement", CHANGES)
def test_nor_is_one_that_a_task_has_changed_and_then_failed(run: Flow, statement: str) -> None:
    def change(context: ExecutionContext) -> ExecutionContext:
        with connection.cursor() as cursor:
            cursor.execute(statement)
        raise ValueError(TEXT)

    flow = run(change)
    (attempt,) = flow.task_executions.filter(status=TaskStatus.FAILED)
    assert attempt.error_type == "ValueError"
    assert TEXT in attempt.output


@pytest.mark.parametrize("statement", [item for item in CHANGES if "autocommit" not in item])
def test_an_atomic_task_that_changes_its_session_harms_its_own_flow_at_most(
    run: Flow, statement: str
) -> None:
    def change(context: ExecutionContext) -> ExecutionContext:
        with connection.cursor() as cursor:
            cursor.execute(statement)
        return context

    assert run(change, atomic=True).status in (FlowStatus.SUCCEEDED, FlowStatus.FAILED)


@pytest.mark.parametrize("statement", FATAL)
def test_an_error_of_a_session_that_the_driver_has_changed_is_not_believed(
    run: Flow, statement: str
) -> None:
    def change(context: ExecutionContext) -> ExecutionContext:
        connection.ensure_connection()
        with closing(connection.connection.cursor()) as cursor:
            cursor.execute(statement)
        return context

    flow = run(change)
    assert flow.status == FlowStatus.SUCCEEDED
    assert flow.execution_context["text"] == TEXT


def test_a_plain_task_and_the_projects_setup_of_a_connection_keep_it(runner: FlowRunner) -> None:
    opened = []

    def query(context: ExecutionContext) -> ExecutionContext:
        assert FlowExecution.objects.exists()
        with connection.cursor() as cursor:
            cursor.execute("SELECT 'SET search_path'")
        return context

    def set_up_plainly(connection: Any, **_: Any) -> None:
        opened.append(connection.alias)
        statement = {
            "postgresql": "SET application_name TO 'shop'",
            "mysql": "SET @shop = 1",
            "sqlite": "PRAGMA cache_size = 100",
        }[connection.vendor]
        with connection.cursor() as cursor:
            cursor.execute(statement)

    runner.register_flow_template(FlowTemplate("plain", tasks=[task(name="query")(query)]))
    for _ in range(3):
        runner.schedule_flow("plain")

    def reopen(context: ExecutionContext) -> ExecutionContext:
        connection.close()
        return query(context)

    runner.register_flow_template(FlowTemplate("reopening", tasks=[task(name="r")(reopen)]))
    runner.run_flow_execution(runner.schedule_flow("plain"))
    connection_created.connect(set_up_plainly)
    try:
        runner.run_flow_execution(runner.schedule_flow("reopening"))
        while runner.run_next() is not None:
            pass
    finally:
        connection_created.disconnect(set_up_plainly)
    # Only what the task itself has opened again.
    assert opened == [connection.alias]
