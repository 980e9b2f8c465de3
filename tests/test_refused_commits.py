"""A COMMIT that the server refuses, as Galera's certification and serialization failures do.

The whole transaction is undone then, and the connection stays. PostgreSQL refuses by a deferred
trigger of the tests' own. MariaDB refuses so in a Galera cluster only, so the driver's error is
raised here after a ROLLBACK.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from ebbs_and_flows import ExecutionContext, FlowRunner, FlowTemplate, Retry, task
from ebbs_and_flows.integrity import IntegrityCheck
from ebbs_and_flows.models import TaskExecution
from tests.shop.models import Order

from .chaos.faults import conflict
from .databases import FLOWS, connection

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.skipif(
        "connection.vendor == 'sqlite'", reason="SQLite refuses no commit of a writer that waited"
    ),
]

ATTEMPTS = TaskExecution._meta.db_table
# A sequence counts what is undone, too.
REFUSE = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF nextval('commits') = 1 THEN
        RAISE EXCEPTION 'could not serialize access' USING ERRCODE = '40001';
    END IF;
    RETURN NULL;
END $$
"""
TRIGGER = f"""
CREATE CONSTRAINT TRIGGER refuse AFTER UPDATE ON {ATTEMPTS} DEFERRABLE INITIALLY DEFERRED
FOR EACH ROW WHEN (NEW.status <> 'RUNNING') EXECUTE FUNCTION refuse()
"""
PREPARE = ["CREATE SEQUENCE commits", REFUSE, TRIGGER]
REMOVE = [
    f"DROP TRIGGER refuse ON {ATTEMPTS}",
    "DROP FUNCTION refuse",
    "DROP SEQUENCE commits",
]


def execute(statements: list[str]) -> None:
    with connection.cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)


@contextmanager
def first_end_of_an_attempt_refused() -> Iterator[list[str]]:
    """Refuse the first COMMIT of a transaction that ends an attempt; the list says that it did."""
    refused: list[str] = []
    if connection.vendor == "postgresql":
        execute(PREPARE)
        try:
            yield refused
            with connection.cursor() as cursor:
                cursor.execute("SELECT last_value > 1 FROM commits")
                refused += ["refused"] if cursor.fetchone()[0] else []
        finally:
            execute(REMOVE)
        return
    ended: list[str] = []
    commit: Callable[[], None] = connection._commit

    def watch(execute: Callable[..., object], sql: str, *given: object) -> object:
        if sql.startswith("UPDATE") and ATTEMPTS in sql:
            ended.append(sql)
        if sql == "COMMIT":
            refuse_once()
        return execute(sql, *given)

    def refuse_once() -> None:
        if ended and not refused:
            refused.append("refused")
            conflict(connection)

    def watched_commit() -> None:
        refuse_once()
        commit()

    connection._commit = watched_commit
    try:
        with connection.execute_wrapper(watch):
            yield refused
    finally:
        del connection._commit


def run(
    runner: FlowRunner, body: Callable[[ExecutionContext], ExecutionContext], atomic: bool
) -> list[tuple[object, ...]]:
    """Run a flow to its end; return its attempts."""
    retry = Retry(attempts=2, delay=0, jitter=False, on=(ValueError,))
    tasks = [
        task(name="first", atomic=atomic, retry=retry)(body),
        task(name="last")(lambda context: context),
    ]
    runner.register_flow_template(FlowTemplate("refused", tasks=tasks))
    flow = runner.schedule_flow("refused")
    with first_end_of_an_attempt_refused() as refused:
        while runner.run_next() is not None:
            pass
    assert refused == ["refused"]
    flow.refresh_from_db()
    assert flow.status == "SUCCEEDED"
    assert list(IntegrityCheck().findings()) == []
    rows = TaskExecution.objects.filter(task_name="first").order_by("attempt")
    return list(rows.values_list("attempt", "status", "error_type"))


def test_i2_a_refused_commit_repeats_no_plain_task(runner: FlowRunner) -> None:
    """Its result is kept, and stored again."""
    ran: list[int] = []

    def body(context: ExecutionContext) -> ExecutionContext:
        ran.append(context.attempt)
        return context.with_entries(charged=True)

    assert run(runner, body, atomic=False) == [(1, "SUCCEEDED", "")]
    assert ran == [1]


@pytest.mark.skipif(FLOWS != "default", reason="orders are on another database")
def test_i2_a_refused_commit_undoes_an_atomic_task_and_its_effect_happens_once(
    runner: FlowRunner,
) -> None:
    """It is repeated at once, and costs none of its retries."""
    ran: list[int] = []

    def body(context: ExecutionContext) -> ExecutionContext:
        ran.append(context.attempt)
        Order.objects.create(number=str(context.attempt))
        if context.attempt == 2:
            raise ValueError("the one retry")
        return context.with_entries(booked=context.attempt)

    (first, second, third) = run(runner, body, atomic=True)
    assert first[:2] == (1, "FAILED")
    assert second == (2, "FAILED", "ValueError")
    assert third == (3, "SUCCEEDED", "")
    assert ran == [1, 2, 3]
    assert list(Order.objects.values_list("number", flat=True)) == ["3"]


@pytest.mark.parametrize("atomic", [False, True], ids=["plain", "atomic"])
def test_a_refused_commit_of_a_failure_records_it_once(runner: FlowRunner, atomic: bool) -> None:
    def body(context: ExecutionContext) -> ExecutionContext:
        if context.attempt == 1:
            raise ValueError("the card is bad")
        return context

    assert run(runner, body, atomic=atomic) == [(1, "FAILED", "ValueError"), (2, "SUCCEEDED", "")]
