"""What a task does to its transactions, commits and connections costs itself, and nobody else."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import pytest
from django.db import IntegrityError, OperationalError, transaction
from django.test import TestCase
from django.utils import timezone
from django.utils.connection import ConnectionDoesNotExist

from ebbs_and_flows import (
    ExecutionContext,
    FlowRunner,
    FlowStatus,
    FlowTemplate,
    OuterTransaction,
    Retry,
    task,
)
from ebbs_and_flows.models import FlowExecution, TaskExecution, WorkerProcess
from ebbs_and_flows.status import TaskStatus

from .databases import connection

pytestmark = pytest.mark.django_db(transaction=True)

Body = Callable[[ExecutionContext], ExecutionContext]


@pytest.fixture
def ran() -> list[str]:
    """The tasks that ran, in order."""
    return []


@pytest.fixture
def run(runner: FlowRunner, ran: list[str]) -> Callable[..., FlowExecution]:
    """Run a flow whose first task has this body; it ends with a plain one."""

    def run_flow(body: Body, **options: Any) -> FlowExecution:
        def first(context: ExecutionContext) -> ExecutionContext:
            ran.append("first")
            return body(context)

        def second(context: ExecutionContext) -> ExecutionContext:
            ran.append("second")
            return context

        tasks = [task(name="first", **options)(first), task(name="second")(second)]
        runner.register_flow_template(FlowTemplate("order", tasks=tasks))
        runner.schedule_flow("order")
        flow = runner.run_next()
        assert flow is not None
        assert not connection.in_atomic_block
        assert connection.get_autocommit()
        return flow

    return run_flow


def attempts() -> list[tuple[str, int, str, str]]:
    found = TaskExecution.objects.order_by("pk")
    return list(found.values_list("task_name", "attempt", "status", "error_type"))


def break_a_reference(context: ExecutionContext) -> ExecutionContext:
    """Write what is found out at the commit, where foreign keys are deferred."""
    TaskExecution.objects.create(
        flow_execution_id=999_999, task_index=0, attempt=1, claim=0, started_at=timezone.now()
    )
    return context


# An atomic task's commit


def test_i3_a_commit_that_is_refused_is_the_failure_of_its_own_task(
    run: Callable[..., FlowExecution], ran: list[str]
) -> None:
    flow = run(break_a_reference, atomic=True)
    assert (flow.status, flow.current_task_index) == (FlowStatus.FAILED, 0)
    assert attempts() == [("first", 1, "FAILED", "django.db.utils.IntegrityError")]
    assert ran == ["first"]


def raised_after_commit(error: BaseException) -> Body:
    def body(context: ExecutionContext) -> ExecutionContext:
        def hook() -> None:
            raise error

        transaction.on_commit(hook, using=connection.alias)
        return context.with_entries(charged=True)

    return body


@pytest.mark.parametrize(
    "error",
    [ConnectionError("mail"), OperationalError("database is locked"), IntegrityError("no")],
    ids=lambda error: type(error).__name__,
)
def test_i2_a_hook_that_raises_after_the_commit_changes_nothing(
    error: Exception,
    run: Callable[..., FlowExecution],
    ran: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    flow = run(raised_after_commit(error), atomic=True)
    assert flow.status == FlowStatus.SUCCEEDED
    assert flow.execution_context["charged"] is True
    assert attempts() == [("first", 1, "SUCCEEDED", ""), ("second", 1, "SUCCEEDED", "")]
    assert ran == ["first", "second"]
    (said,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "has succeeded; what came after its commit has not" in said.getMessage()


def test_what_a_hook_raises_after_the_commit_is_logged_masked(
    run: Callable[..., FlowExecution], caplog: pytest.LogCaptureFixture
) -> None:
    run(raised_after_commit(ConnectionError("no answer, password=hunter2")), atomic=True)
    assert "ConnectionError: no answer, password=" in caplog.text
    assert "in hook" in caplog.text
    assert "hunter2" not in caplog.text


def test_i2_so_does_one_of_the_last_task(
    runner: FlowRunner, caplog: pytest.LogCaptureFixture
) -> None:
    last = task(name="last", atomic=True)(raised_after_commit(ConnectionError("mail")))
    runner.register_flow_template(FlowTemplate("order", tasks=[last]))
    runner.schedule_flow("order")
    seen: list[TaskStatus] = []
    flow = runner.run_next(on_task=lambda run, name, status: seen.append(status))
    assert flow is not None
    assert flow.status == FlowStatus.SUCCEEDED
    assert seen == [TaskStatus.SUCCEEDED]
    assert "last of flow" in caplog.text
    assert "failed" not in caplog.text


# Transactions that are left open


def rows_in_a_block() -> Iterator[int]:
    with transaction.atomic(using=connection.alias):
        yield from range(3)


def stop_in_the_middle(context: ExecutionContext) -> ExecutionContext:
    rows = rows_in_a_block()
    for row in rows:
        raise ValueError(f"row {row} is bad")
    return context


@pytest.mark.parametrize("atomic", [True, False])
def test_an_error_in_the_middle_of_a_generators_block_is_stored_as_it_is(
    run: Callable[..., FlowExecution], atomic: bool
) -> None:
    flow = run(stop_in_the_middle, atomic=atomic)
    assert flow.status == FlowStatus.FAILED
    assert attempts() == [("first", 1, "FAILED", "ValueError")]
    assert "row 0 is bad" in TaskExecution.objects.get().output


def begin_a_block(context: ExecutionContext) -> ExecutionContext:
    transaction.atomic(using=connection.alias).__enter__()
    FlowExecution.objects.update(priority=7)
    return context


def turn_autocommit_off(context: ExecutionContext) -> ExecutionContext:
    connection.set_autocommit(False)
    FlowExecution.objects.update(priority=7)
    return context


@pytest.mark.parametrize(
    ("body", "atomic"),
    [(begin_a_block, True), (begin_a_block, False), (turn_autocommit_off, False)],
)
def test_what_a_task_leaves_open_is_undone_and_the_task_has_failed(
    run: Callable[..., FlowExecution], ran: list[str], body: Body, atomic: bool
) -> None:
    flow = run(body, atomic=atomic)
    assert (flow.status, flow.priority) == (FlowStatus.FAILED, 0)
    assert attempts() == [("first", 1, "FAILED", "TransactionLeftOpen")]
    assert "left a transaction open on the database" in TaskExecution.objects.get().output
    assert ran == ["first"]


@pytest.mark.parametrize("way", ["run_next", "run_flow", "run_flow_execution"])
def test_nothing_is_run_where_nothing_would_be_committed(runner: FlowRunner, way: str) -> None:
    runner.register_flow_template(FlowTemplate("order", tasks=[task(lambda context: context)]))
    flow = runner.schedule_flow("order")
    connection.set_autocommit(False)
    try:
        with pytest.raises(OuterTransaction, match="while autocommit is off on the database"):
            getattr(runner, way)(*([flow] if way == "run_flow_execution" else []))
    finally:
        connection.set_autocommit(True)
    flow.refresh_from_db()
    assert (flow.status, flow.claim) == (FlowStatus.SCHEDULED, 0)


def test_a_block_that_ended_with_its_task_ends_no_other_one(runner: FlowRunner) -> None:
    held: list[Any] = []

    def hold_a_block(context: ExecutionContext) -> ExecutionContext:
        held.append(rows_in_a_block())
        next(held[0])
        return context

    def write(context: ExecutionContext) -> ExecutionContext:
        FlowExecution.objects.update(priority=7)
        with pytest.raises(ConnectionDoesNotExist, match="was ended with the task"):
            held[0].close()
        return context

    for name, body in {"holds": hold_a_block, "writes": write}.items():
        runner.register_flow_template(
            FlowTemplate(name, tasks=[task(name=name, atomic=name == "writes")(body)])
        )
        runner.schedule_flow(name)
    statuses = [flow.status for flow in iter(runner.run_next, None)]
    assert statuses == [FlowStatus.FAILED, FlowStatus.SUCCEEDED]
    assert set(FlowExecution.objects.values_list("priority", flat=True)) == {7}


def test_a_block_that_is_entered_twice_and_again_elsewhere_stays_usable(
    run: Callable[..., FlowExecution],
) -> None:
    block = transaction.atomic(using=connection.alias)

    def enter_twice(context: ExecutionContext) -> ExecutionContext:
        block.__enter__()
        block.__enter__()
        return context

    assert run(enter_twice).status == FlowStatus.FAILED
    with block:
        assert FlowExecution.objects.count() == 1


def stop_in_a_helper(context: ExecutionContext) -> ExecutionContext:
    try:
        stop_in_the_middle(context)
    except ValueError as error:
        raise RuntimeError("the helper failed") from error
    return context


def take_too_long(context: ExecutionContext) -> ExecutionContext:
    rows = rows_in_a_block()
    for _ in rows:
        time.sleep(30)
    return context


@pytest.mark.parametrize(
    ("body", "options", "error"),
    [
        (stop_in_a_helper, {}, "RuntimeError"),
        (take_too_long, {"timeout": 0.2}, "TaskTimeout"),
    ],
)
@pytest.mark.parametrize("atomic", [True, False])
def test_a_block_that_only_an_error_holds_is_ended_with_its_task(
    runner: FlowRunner,
    run: Callable[..., FlowExecution],
    body: Body,
    options: dict[str, Any],
    error: str,
    atomic: bool,
) -> None:
    gc.disable()
    try:
        flow = run(body, atomic=atomic, **options)
        assert flow.status == FlowStatus.FAILED
        assert [attempt[3] for attempt in attempts()] == [error]

        def collect(context: ExecutionContext) -> ExecutionContext:
            FlowExecution.objects.update(priority=7)
            # What was kept alive by nothing but itself goes now, in the middle of a transaction.
            gc.collect()
            return context

        late = task(name="late", atomic=True)(collect)
        runner.register_flow_template(FlowTemplate("late", tasks=[late]))
        runner.schedule_flow("late")
        assert runner.run_next().status == FlowStatus.SUCCEEDED  # type: ignore[union-attr]
        assert set(FlowExecution.objects.values_list("priority", flat=True)) == {7}
    finally:
        gc.enable()


def test_a_commit_that_is_refused_keeps_what_the_task_logged(
    run: Callable[..., FlowExecution],
) -> None:
    def log_and_break(context: ExecutionContext) -> ExecutionContext:
        context.log.info("seen before the commit")
        return break_a_reference(context)

    run(log_and_break, atomic=True)
    assert "seen before the commit" in TaskExecution.objects.get().log


# Others are in the way


@contextmanager
def in_the_way(statement: str, times: int) -> Iterator[list[str]]:
    """Have the database refuse a statement some times for another transaction's sake."""
    refused: list[str] = []

    def refuse(execute: Any, sql: str, parameters: Any, many: bool, context: Any) -> Any:
        if sql.lstrip().startswith(statement) and len(refused) < times:
            refused.append(sql)
            raise OperationalError("database is locked")
        return execute(sql, parameters, many, context)

    with connection.execute_wrapper(refuse):
        yield refused


def test_a_claim_waits_for_whoever_is_in_its_way(runner: FlowRunner) -> None:
    runner.register_flow_template(FlowTemplate("order", tasks=[task(lambda context: context)]))
    runner.schedule_flow("order")
    claim = "WITH seen" if connection.vendor == "postgresql" else "BEGIN"
    with in_the_way(claim, 3) as refused:
        flow = runner.run_next()
    assert len(refused) == 3
    assert flow is not None
    assert flow.status == FlowStatus.SUCCEEDED


def test_a_worker_that_is_to_stop_does_not_wait_for_them(runner: FlowRunner) -> None:
    runner.register_flow_template(FlowTemplate("order", tasks=[task(lambda context: context)]))
    runner.schedule_flow("order")
    claim = "WITH seen" if connection.vendor == "postgresql" else "BEGIN"
    with in_the_way(claim, 3) as refused:
        assert runner.run_next(stop=lambda: True) is None
    assert len(refused) == 1


@pytest.mark.skipif(connection.vendor != "sqlite", reason="only SQLite waits for writers to begin")
def test_an_atomic_task_that_cannot_begin_has_lost_nothing(
    run: Callable[..., FlowExecution], ran: list[str], settings: Any
) -> None:
    begun: list[str] = []

    def refuse(execute: Any, sql: str, parameters: Any, many: bool, context: Any) -> Any:
        # The first one is the claim's own.
        if sql.startswith("BEGIN"):
            begun.append(sql)
            if 2 <= len(begun) <= 5:
                raise OperationalError("database is locked")
        return execute(sql, parameters, many, context)

    with connection.execute_wrapper(refuse):
        flow = run(lambda context: context, atomic=True)
    assert flow.status == FlowStatus.SUCCEEDED
    assert [attempt[1:] for attempt in attempts()] == [(1, "SUCCEEDED", "")] * 2
    assert ran == ["first", "second"]


def test_i2_a_hook_and_a_lost_connection_together_fail_no_task_that_did_not_run(
    run: Callable[..., FlowExecution], ran: list[str]
) -> None:
    commits: list[str] = []

    def hook() -> None:
        raise ConnectionError("mail")

    def body(context: ExecutionContext) -> ExecutionContext:
        transaction.on_commit(hook, using=connection.alias)
        return context

    real = connection.commit

    def commit() -> None:
        real()
        # The first one is the step's, the second one that of whoever asks what became of it.
        commits.extend(ran)
        if commits == ["first", "first"]:
            raise OperationalError("the answer was lost")

    connection.commit = commit
    try:
        flow = run(body, atomic=True)
    finally:
        del connection.commit
    assert flow.status == FlowStatus.SUCCEEDED
    assert [attempt[:3] for attempt in attempts()] == [
        ("first", 1, "SUCCEEDED"),
        ("second", 1, "SUCCEEDED"),
    ]
    assert ran == ["first", "second"]


@pytest.mark.parametrize("change", ["reschedule", "cancel"])
def test_a_change_of_many_that_is_made_again_is_made_to_all(
    runner: FlowRunner, change: str
) -> None:
    def fail(context: ExecutionContext) -> ExecutionContext:
        raise ValueError("no")

    runner.register_flow_template(FlowTemplate("order", tasks=[task(fail)]))
    flows = runner.schedule_flows("order", [None] * 3)
    while runner.run_next():
        pass
    with in_the_way("SELECT", 1) as refused:
        done = getattr(runner, f"{change}_flow_executions")(flow.pk for flow in flows)
    assert refused
    assert done == [flow.pk for flow in flows]


@pytest.mark.parametrize("statement", ["DELETE", "SELECT"])
def test_pruning_is_repeated_when_another_transaction_is_in_its_way(
    runner: FlowRunner, statement: str
) -> None:
    runner.register_flow_template(FlowTemplate("order", tasks=[task(lambda context: context)]))
    runner.schedule_flows("order", [None] * 3)
    while runner.run_next():
        pass
    began: list[None] = []

    def refuse(execute: Any, sql: str, *arguments: Any) -> Any:
        # The first look for what is to be pruned is made outside of the transaction.
        if connection.in_atomic_block and sql.startswith(statement) and not began:
            began.append(None)
            raise OperationalError("database is locked")
        return execute(sql, *arguments)

    with connection.execute_wrapper(refuse):
        assert runner.service.prune_finished(timedelta(0)) == 3
    assert began
    assert not FlowExecution.objects.exists()


# A connection that is lost


@pytest.mark.skipif(connection.vendor == "sqlite", reason="SQLite has no connection to lose")
def test_a_connection_that_is_lost_in_an_atomic_task_costs_no_retry(
    runner: FlowRunner, run: Callable[..., FlowExecution], ran: list[str]
) -> None:
    def lose_it_once(context: ExecutionContext) -> ExecutionContext:
        if ran == ["first"]:
            from django.db import connections

            with connection.cursor() as cursor:
                own = "CONNECTION_ID()" if connection.vendor == "mysql" else "pg_backend_pid()"
                cursor.execute(f"SELECT {own}")
                (number,) = cursor.fetchone()
            other = connections.create_connection(connection.alias)
            with other.cursor() as cursor:
                if connection.vendor == "mysql":
                    cursor.execute(f"KILL {number}")
                else:
                    cursor.execute("SELECT pg_terminate_backend(%s)", [number])
            other.close()
            FlowExecution.objects.count()
        return context

    flow = run(lose_it_once, atomic=True, retry=Retry(attempts=1))
    assert flow.status == FlowStatus.RESCHEDULED
    ended = runner.run_next()
    assert ended is not None
    assert ended.status == FlowStatus.SUCCEEDED
    assert ran == ["first", "first", "second"]


class InATestCase(TestCase):
    """A project's tests run within a transaction, which a failing task must not break."""

    databases = frozenset({connection.alias, "default"})

    def fail_by(self, body: Any, **options: Any) -> FlowExecution:
        runner = FlowRunner()
        runner.register_flow_template(
            FlowTemplate("order", tasks=[task(name="first", **options)(body)])
        )
        return runner.run_flow_execution(runner.schedule_flow("order"))

    def test_an_integrity_error_is_stored(self) -> None:
        def twice(context: ExecutionContext) -> ExecutionContext:
            now = timezone.now()
            for _ in range(2):
                WorkerProcess.objects.create(name="w", started_at=now, seen_at=now)
            return context

        for atomic in (False, True):
            flow = self.fail_by(twice, atomic=atomic)
            assert flow.status == FlowStatus.FAILED
            assert attempts()[-1][3] == "django.db.utils.IntegrityError"

    def test_a_bad_statement_is_stored(self) -> None:
        def ask(context: ExecutionContext) -> ExecutionContext:
            with connection.cursor() as cursor:
                cursor.execute("SELECT no_such_column")
            return context

        for atomic in (False, True):
            assert self.fail_by(ask, atomic=atomic).status == FlowStatus.FAILED
            assert "no_such_column" in TaskExecution.objects.latest("pk").output

    def test_an_error_that_was_caught_outside_of_a_block_is_named(self) -> None:
        def twice(context: ExecutionContext) -> ExecutionContext:
            now = timezone.now()
            with suppress(IntegrityError):
                for _ in range(2):
                    WorkerProcess.objects.create(name="w", started_at=now, seen_at=now)
            return context

        assert self.fail_by(twice).status == FlowStatus.FAILED
        assert "catch it around an atomic() block" in TaskExecution.objects.get().output
