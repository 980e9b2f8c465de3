"""Signals: each committed transition and each ended attempt is told once, after the commit."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from django.db import OperationalError, connections
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from ebbs_and_flows import (
    ExecutionContext,
    FlowRunner,
    FlowStatus,
    FlowTemplate,
    Retry,
    task,
)
from ebbs_and_flows.models import FlowExecution, FlowTransition, TaskExecution
from ebbs_and_flows.signals import flow_status_changed, task_finished
from tests.test_runner import Script, flow_of

from .databases import atomic, connection

pytestmark = pytest.mark.django_db(transaction=True)

Told = list[dict[str, Any]]


@pytest.fixture
def changes() -> Iterator[Told]:
    """What `flow_status_changed` told, each looked at from another connection."""
    told: Told = []

    def receive(sender: Any, **named: Any) -> None:
        assert sender is FlowExecution
        assert not connection.in_atomic_block
        told.append({**named, "seen": elsewhere(named["flow_execution"].pk)})

    flow_status_changed.connect(receive, sender=FlowExecution)
    yield told
    flow_status_changed.disconnect(receive, sender=FlowExecution)


@pytest.fixture
def ends() -> Iterator[Told]:
    told: Told = []

    def receive(sender: Any, **named: Any) -> None:
        assert sender is TaskExecution
        assert not connection.in_atomic_block
        told.append(named)

    task_finished.connect(receive, sender=TaskExecution)
    yield told
    task_finished.disconnect(receive, sender=TaskExecution)


def elsewhere(pk: int) -> str:
    """Return the status of a flow as another session sees it."""
    seen: list[str] = []

    def look() -> None:
        try:
            seen.extend(FlowExecution.objects.filter(pk=pk).values_list("status", flat=True))
        finally:
            connections.close_all()

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return seen[0]


def stored(flow: FlowExecution) -> list[tuple[str, ...]]:
    rows = FlowTransition.objects.filter(flow_execution=flow).order_by("pk")
    return [(row.from_status, row.to_status, row.actor, row.reason) for row in rows]


def told_of(changes: Told, flow: FlowExecution) -> list[tuple[str, ...]]:
    names = ("from_status", "to_status", "actor", "reason")
    own = [item for item in changes if item["flow_execution"].pk == flow.pk]
    return [tuple(str(item[name]) for name in names) for item in own]


def moves(changes: Told) -> list[str]:
    return [f"{item['from_status']}->{item['to_status']}" for item in changes]


@pytest.mark.parametrize("atomic", [False, True])
def test_a_flow_tells_of_each_transition_and_each_attempt(
    runner: FlowRunner, changes: Told, ends: Told, atomic: bool
) -> None:
    flow_of(runner, Script("a", atomic=atomic), Script("b", atomic=atomic))
    flow = runner.schedule_flow("billing", actor="ada")
    assert moves(changes) == ["->CREATED", "CREATED->SCHEDULED"]
    runner.run_flow()
    assert moves(changes)[2:] == ["SCHEDULED->RUNNING", "RUNNING->SUCCEEDED"]
    assert told_of(changes, flow) == stored(flow)
    # By then everybody sees it.
    assert [item["seen"] for item in changes[2:]] == ["RUNNING", "SUCCEEDED"]
    assert [item["task_execution"].task_name for item in ends] == ["a", "b"]
    assert {item["task_execution"].status for item in ends} == {"SUCCEEDED"}
    assert {item["error"] for item in ends} == {None}
    assert ends[0]["task_execution"].flow_execution.pk == flow.pk


def test_a_failure_tells_its_exception_and_its_retry(
    runner: FlowRunner, changes: Told, ends: Told
) -> None:
    error = OSError("down")
    retry = Retry(attempts=2, delay=600, max_delay=600, jitter=False)
    flow_of(runner, Script("a", error, retry=retry))
    flow = runner.schedule_flow("billing")
    runner.run_flow()
    assert moves(changes)[3:] == ["RUNNING->FAILED", "FAILED->RESCHEDULED"]
    assert told_of(changes, flow) == stored(flow)
    (end,) = ends
    assert end["error"] is error
    assert end["task_execution"].status == "FAILED"


def test_what_operators_do_is_told_as_it_is_stored(
    runner: FlowRunner, changes: Told, ends: Told
) -> None:
    flow_of(runner, Script("a", ValueError("no"), ValueError("no")), Script("b"))
    flow = runner.schedule_flow("billing", key="k")
    runner.schedule_flow("billing", key="k")
    runner.run_flow()
    runner.reschedule_flow_execution(flow, actor="ada", reason="mended")
    runner.re_run_flow()
    runner.complete_failed_task(flow, reason="by phone", actor="ada")
    fork = runner.fork_flow_execution(flow, actor="bob")
    runner.cancel_flow_execution(flow, actor="ada", reason="enough")
    (many,) = runner.schedule_flows("billing", [{}], actor="eve")
    for item in (flow, fork, many):
        assert told_of(changes, item) == stored(item)
    assert moves(changes)[-1] == "CREATED->SCHEDULED"
    assert [item["task_execution"].status for item in ends] == ["FAILED", "FAILED", "SUCCEEDED"]


def test_a_flow_that_lost_its_worker_or_is_cancelled_meanwhile_is_told_of(
    runner: FlowRunner, changes: Told, ends: Told
) -> None:
    def lose(context: ExecutionContext) -> ExecutionContext:
        long_ago = timezone.now() - timedelta(seconds=1)
        FlowExecution.objects.filter(pk=flow.pk).update(lease_expires_at=long_ago)
        assert runner.service.recover_expired() == 1
        return context

    def cancel(context: ExecutionContext) -> ExecutionContext:
        runner.cancel_flow_execution(flow, actor="ada")
        return context

    flow_of(runner, Script("a", lose, cancel), Script("b"))
    flow = runner.schedule_flow("billing")
    runner.run_flow()
    runner.re_run_flow()
    assert moves(changes)[3:] == [
        "RUNNING->FAILED",
        "FAILED->RESCHEDULED",
        "RESCHEDULED->RUNNING",
        "RUNNING->CANCELLED",
    ]
    assert told_of(changes, flow) == stored(flow)
    assert [item["task_execution"].status for item in ends] == ["FAILED", "SUCCEEDED"]


def test_what_was_rolled_back_is_never_told(runner: FlowRunner, changes: Told) -> None:
    flow_of(runner, Script("a"))
    with pytest.raises(ZeroDivisionError), atomic():
        runner.schedule_flow("billing")
        raise ZeroDivisionError
    with atomic():
        runner.schedule_flow("billing")
        assert changes == []
    assert moves(changes) == ["->CREATED", "CREATED->SCHEDULED"]


def test_a_receiver_that_raises_is_logged_and_harms_nothing(
    runner: FlowRunner, caplog: pytest.LogCaptureFixture
) -> None:
    def explode(**_: Any) -> None:
        raise RuntimeError("a bad receiver")

    received: list[Any] = []

    def receive(**named: Any) -> None:
        received.append(named["signal"])

    for signal, sender in ((flow_status_changed, FlowExecution), (task_finished, TaskExecution)):
        signal.connect(explode, sender=sender)
        signal.connect(receive, sender=sender)
    try:
        flow_of(runner, Script("a", atomic=True), Script("b", ValueError("no"), None))
        flow = runner.schedule_flow("billing")
        assert runner.run_flow().status == FlowStatus.FAILED  # type: ignore[union-attr]
        runner.reschedule_flow_execution(flow)
        assert runner.re_run_flow().status == FlowStatus.SUCCEEDED  # type: ignore[union-attr]
    finally:
        for signal, sender in (
            (flow_status_changed, FlowExecution),
            (task_finished, TaskExecution),
        ):
            signal.disconnect(explode, sender=sender)
            signal.disconnect(receive, sender=sender)
    assert received.count(flow_status_changed) == len(stored(flow))
    assert received.count(task_finished) == 3
    assert "RuntimeError: a bad receiver" in caplog.text


def test_without_receivers_nothing_is_read(runner: FlowRunner) -> None:
    def count() -> int:
        runner.schedule_flow("t")
        with CaptureQueriesContext(connection) as captured:
            runner.run_flow()
        table = TaskExecution._meta.db_table
        statements = [query["sql"] for query in captured.captured_queries]
        return sum(sql.startswith("SELECT") and table in sql for sql in statements)

    def receive(**_: Any) -> None:
        pass

    runner.register_flow_template(FlowTemplate("t", tasks=[task(name="a")(lambda c: c)]))
    count()
    without = count()
    task_finished.connect(receive, sender=TaskExecution)
    try:
        assert count() == without + 1
    finally:
        task_finished.disconnect(receive, sender=TaskExecution)


def test_a_step_whose_commit_was_not_reported_is_told_once(
    runner: FlowRunner, changes: Told, ends: Told
) -> None:
    flow_of(runner, Script("first"), Script("last"))
    flow = runner.schedule_flow("billing")
    changes.clear()
    lost: list[str] = []

    def lose_the_answer(execute: Any, sql: str, parameters: Any, many: bool, context: Any) -> Any:
        result = execute(sql, parameters, many, context)
        if not lost and elsewhere(flow.pk) == FlowStatus.SUCCEEDED:
            lost.append(sql)
            raise OperationalError("server closed the connection")
        return result

    with connection.execute_wrapper(lose_the_answer):
        ended = runner.run_flow()
    assert lost
    assert ended is not None
    assert ended.status == FlowStatus.SUCCEEDED
    assert [(told["from_status"], told["to_status"]) for told in changes] == [
        ("SCHEDULED", "RUNNING"),
        ("RUNNING", "SUCCEEDED"),
    ]
    assert [told["task_execution"].task_name for told in ends] == ["first", "last"]
