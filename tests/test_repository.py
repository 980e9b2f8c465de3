"""The hot path: counted statements and transactions, the fence, leases and recovery."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

import pytest
from django.db import IntegrityError, connections
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from ebbs_and_flows import (
    ExecutionContext,
    FlowRunner,
    FlowStatus,
    FlowTemplate,
    Task,
    context_type,
    task,
)
from ebbs_and_flows.models import ExecutionContextEntry, FlowExecution, TaskExecution
from ebbs_and_flows.service import FlowService
from ebbs_and_flows.worker import Worker

from .databases import atomic, connection


class Write(Task):
    def run(self, context: ExecutionContext) -> ExecutionContext:
        return context.with_entries(**{self.name: len(context)})


def ten_tasks(runner: FlowRunner) -> FlowTemplate:
    tasks = [Write(name=f"task_{number}") for number in range(10)]
    return runner.register_flow_template(FlowTemplate("ten", tasks=tasks))


def statements(captured: CaptureQueriesContext) -> list[str]:
    return [query["sql"] for query in captured.captured_queries]


def is_boundary(sql: str, *words: str) -> bool:
    return sql.upper().startswith(words)


@pytest.mark.django_db(transaction=True)
def test_w10_takes_n_plus_one_transactions_and_four_statements_a_step(
    runner: FlowRunner,
) -> None:
    ten_tasks(runner)
    runner.schedule_flow("ten")
    with CaptureQueriesContext(connection) as captured:
        flow = runner.run_flow()
    assert flow is not None
    assert flow.status == FlowStatus.SUCCEEDED
    transactions: list[list[str]] = []
    reads, inside = 0, False
    for sql in statements(captured):
        assert not is_boundary(sql, "SAVEPOINT", "ROLLBACK")
        if is_boundary(sql, "BEGIN"):
            transactions.append([])
            inside = True
        elif is_boundary(sql, "COMMIT"):
            inside = False
        elif inside:
            transactions[-1].append(sql)
        elif is_boundary(sql, "SELECT"):
            reads += 1
        else:
            # A statement that writes is a transaction of its own.
            transactions.append([sql])
    assert len(transactions) == 11
    in_one = connection.vendor == "postgresql"
    assert max(len(step) for step in transactions[1:]) <= (1 if in_one else 4), transactions
    assert len(transactions[0]) <= (1 if in_one else 6)
    # Beside them, what is due or has lost its worker, and the flow as it ended.
    assert reads <= (0 if in_one else 2)


@pytest.mark.django_db(transaction=True)
def test_a_step_reads_nothing_of_the_context_again(runner: FlowRunner) -> None:
    ten_tasks(runner)
    runner.schedule_flow("ten", {"big": "x" * 100_000})
    with CaptureQueriesContext(connection) as captured:
        runner.run_flow()
    table = ExecutionContextEntry._meta.db_table
    made = statements(captured)
    first_step = next(number for number, sql in enumerate(made) if "'SUCCEEDED'" in sql)
    reads = [number for number, sql in enumerate(made) if f"FROM {table}" in sql.replace('"', "")]
    assert reads
    assert max(reads) < first_step


@context_type
@dataclass
class Report:
    pages: str
    made: ClassVar[int] = 0

    def __post_init__(self) -> None:
        Report.made += 1


@pytest.mark.django_db
def test_a_big_entry_is_decoded_by_the_task_that_reads_it_alone(runner: FlowRunner) -> None:
    def reads(context: ExecutionContext) -> ExecutionContext:
        return context.with_entries(length=len(context["report"].pages))

    def adds(context: ExecutionContext) -> ExecutionContext:
        return context.with_entries(**{f"by_{context.task_name}": "report" in context})

    tasks = [task(name="before")(adds), task(name="reader")(reads), task(name="after")(adds)]
    runner.register_flow_template(FlowTemplate("big", tasks=tasks))
    runner.schedule_flow("big", {"report": Report("x" * 1_000_000)})
    before = Report.made
    flow = runner.run_flow()
    assert flow is not None
    assert flow.execution_context["length"] == 1_000_000
    assert Report.made == before + 1


@pytest.mark.django_db
def test_looking_when_nothing_is_due_writes_nothing(runner: FlowRunner) -> None:
    ten_tasks(runner)
    with CaptureQueriesContext(connection) as captured:
        assert runner.run_flow() is None
    made = [sql for sql in statements(captured) if not is_boundary(sql, "SAVEPOINT", "RELEASE")]
    assert len(made) == 1
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            # A transaction has a number of its own from its first write on.
            cursor.execute("SELECT pg_current_xact_id_if_assigned()")
            assert cursor.fetchone() == (None,)
    else:
        assert made[0].startswith("SELECT")


@pytest.mark.django_db
@pytest.mark.parametrize(
    "value",
    [
        "a\x00b",
        "\ud83d lone",
        2**70,
        -(2**5000),
        math.inf,
        "x" * (1024 * 1024 - 2),
        "ä😀\u2028" * 1000,
        {1: "a", None: "b", (2, "x"): {3.5: b"\x00\xff"}},
        {"a": [True, None, 1.5]},
    ],
    ids=lambda value: repr(value)[:20],
)
def test_odd_values_come_back_equal_from_the_database(runner: FlowRunner, value: Any) -> None:
    ten_tasks(runner)
    flow = runner.schedule_flow("ten", {"odd": value})
    back = runner.service.get_flow_execution(flow).execution_context["odd"]
    assert back == value
    assert type(back) is type(value)


@pytest.mark.django_db
@pytest.mark.parametrize("name", ["ä", "A", "a", "a ", "😀", "日本"])
def test_names_that_a_collation_might_confuse_are_told_apart(
    runner: FlowRunner, name: str
) -> None:
    ten_tasks(runner)
    name = name.strip()
    flow = runner.schedule_flow("ten", {"x": 0, name: 1, name + "\u0301": 2, name + "1": 3})
    assert len(runner.service.get_flow_execution(flow).execution_context) == 4


@pytest.mark.django_db
@pytest.mark.parametrize(
    "values",
    [
        {"status": "LOST"},
        {"priority": 101},
        {"first_task_index": 3},
        {"lease_expires_at": datetime(2026, 1, 1, tzinfo=UTC)},
        {"cancel_requested": True},
    ],
    ids=lambda values: next(iter(values)),
)
def test_the_database_itself_refuses_an_impossible_flow(
    runner: FlowRunner, values: dict[str, Any]
) -> None:
    ten_tasks(runner)
    flow = runner.schedule_flow("ten")
    with pytest.raises(IntegrityError), atomic():
        FlowExecution.objects.filter(pk=flow.pk).update(**values)


@pytest.mark.django_db
def test_the_database_itself_refuses_a_second_attempt_and_a_second_entry(
    runner: FlowRunner,
) -> None:
    ten_tasks(runner)
    runner.schedule_flow("ten")
    flow = runner.run_flow()
    for model in (TaskExecution, ExecutionContextEntry):
        row = model.objects.filter(flow_execution=flow).first()
        assert row is not None
        row.pk = None
        with pytest.raises(IntegrityError), atomic():
            row.save(force_insert=True)


def take_over(flow: FlowExecution) -> None:
    FlowExecution.objects.filter(pk=flow.pk).update(
        lease_expires_at=timezone.now() - timedelta(seconds=1)
    )


@pytest.mark.django_db
def test_i6_a_worker_that_lost_its_claim_writes_nothing_more(runner: FlowRunner) -> None:
    def slow(context: ExecutionContext) -> ExecutionContext:
        if context.attempt == 1:
            # Paused for longer than its lease, while another worker took the flow and ended it.
            take_over(flow)
            assert runner.run_next() is not None
        return context.with_entries(by=context.attempt)

    runner.register_flow_template(FlowTemplate("slow", tasks=[task(name="slow")(slow)]))
    flow = runner.schedule_flow("slow")
    ended = runner.run_flow()
    assert ended is not None
    assert ended.status == FlowStatus.SUCCEEDED
    assert dict(ended.execution_context) == {"by": 2}
    attempts = runner.service.get_flow_task_execution_history(flow)
    assert [str(row.status) for row in attempts] == ["FAILED", "SUCCEEDED"]
    assert attempts[0].error_type == "TaskInterrupted"
    assert attempts[0].output.startswith("interrupted: worker ")
    assert "last seen" in attempts[0].output


@pytest.mark.django_db
def test_i6_a_lost_claim_undoes_the_body_of_an_atomic_task(
    runner: FlowRunner, service: FlowService, caplog: pytest.LogCaptureFixture
) -> None:
    from tests.shop.models import Order

    def body(context: ExecutionContext) -> ExecutionContext:
        Order.objects.create(number="42")
        FlowExecution.objects.filter(pk=flow.pk).update(claim=99)
        return context

    template = FlowTemplate("paid", tasks=[task(name="pay", atomic=True)(body)])
    runner.register_flow_template(template)
    flow = runner.schedule_flow("paid")
    run = service.claim_flow(service.get_flow_execution(flow), template, "worker")
    assert run is not None
    with caplog.at_level("WARNING", "ebbs_and_flows"):
        Worker(service).run(run, template)
    assert f"Flow {flow.pk} is no longer held under claim 1" in caplog.text
    assert Order.objects.count() == 0


@pytest.mark.django_db
def test_a_task_that_ends_its_workers_does_so_four_times_and_no_more(
    runner: FlowRunner, service: FlowService
) -> None:
    template = ten_tasks(runner)
    flow = runner.schedule_flow("ten")
    for interruption in range(1, 5):
        run = service.claim([template], "worker")
        assert run is not None
        assert service.recover_expired() == 0
        take_over(flow)
        assert service.recover_expired() == 1
        assert service.recover_expired() == 0
        flow = service.get_flow_execution(flow)
        assert flow.interruptions == interruption
        assert flow.is_finished == (interruption == 4)
    assert flow.status == FlowStatus.FAILED
    assert "lost its worker 4 times" in service.get_flow_task_execution_history(flow)[-1].output
    runner.reschedule_flow_execution(flow)
    assert runner.re_run_flow().status == FlowStatus.SUCCEEDED  # type: ignore[union-attr]


@pytest.mark.django_db
def test_i3_a_flow_that_was_claimed_meanwhile_is_not_claimed_again(
    runner: FlowRunner, service: FlowService
) -> None:
    template = ten_tasks(runner)
    seen = runner.schedule_flow("ten")
    assert service.claim_flow(seen, template, "first") is not None
    assert service.claim_flow(seen, template, "second") is None
    assert service.get_flow_execution(seen).claimed_by == "first"
    runner.cancel_flow_execution(runner.schedule_flow("ten", key="k"))
    cancelled = service.get_flow_execution(FlowExecution.objects.get(key="k"))
    assert service.claim_flow(cancelled, template, "worker") is None


@pytest.mark.django_db
def test_i6_a_worker_that_gave_a_sign_of_life_is_not_interrupted(
    runner: FlowRunner, service: FlowService
) -> None:
    template = ten_tasks(runner)
    flow = runner.schedule_flow("ten")
    run = service.claim([template], "worker")
    assert run is not None
    take_over(flow)
    seen = service.get_flow_execution(flow)
    assert service.repository.renew(flow.pk, run.claim, timedelta(seconds=30))
    assert not service.interrupt(seen, "interrupted")
    attempts = service.get_flow_task_execution_history(flow)
    assert [str(row.status) for row in attempts] == ["RUNNING"]


@pytest.mark.django_db
def test_a_cancelled_flow_that_lost_its_worker_is_cancelled(
    runner: FlowRunner, service: FlowService
) -> None:
    template = ten_tasks(runner)
    flow = runner.schedule_flow("ten")
    run = service.claim([template], "worker")
    assert run is not None
    runner.cancel_flow_execution(flow, actor="ada")
    take_over(flow)
    assert service.recover_expired() == 1
    assert service.get_flow_execution(flow).status == FlowStatus.CANCELLED


@pytest.mark.django_db(transaction=True)
def test_the_heartbeat_renews_the_lease_of_a_long_task(
    runner: FlowRunner, service: FlowService, settings: Any
) -> None:
    settings.EBBS_AND_FLOWS = {"LEASE_SECONDS": 2}

    def wait_for_renewal(context: ExecutionContext) -> ExecutionContext:
        first = FlowExecution.objects.get(pk=flow.pk).lease_expires_at
        for _ in range(100):
            pause.wait(0.1)
            if FlowExecution.objects.get(pk=flow.pk).lease_expires_at != first:
                return context.with_entries(renewed=True)
        return context.with_entries(renewed=False)

    pause = threading.Event()
    runner.register_flow_template(
        FlowTemplate("long", tasks=[task(name="long")(wait_for_renewal)])
    )
    flow = runner.schedule_flow("long")
    ended = runner.run_flow()
    assert ended is not None
    assert ended.execution_context["renewed"] is True
    connections["default"].ensure_connection()


@pytest.mark.django_db
def test_pruning_deletes_only_what_ended_long_ago(
    runner: FlowRunner, service: FlowService
) -> None:
    ten_tasks(runner)
    old, young, waiting = (runner.schedule_flow("ten") for _ in range(3))
    for flow in (old, young):
        runner.run_flow_execution(flow)
    long_ago = timezone.now() - timedelta(days=100)
    FlowExecution.objects.filter(pk=old.pk).update(finished_at=long_ago)
    FlowExecution.objects.filter(pk=waiting.pk).update(created_at=long_ago, run_at=long_ago)
    assert service.prune_finished(timedelta(days=90), dry_run=True) == 1
    assert FlowExecution.objects.count() == 3
    assert service.prune_finished(timedelta(days=90), batch_size=1) == 1
    assert set(FlowExecution.objects.values_list("pk", flat=True)) == {young.pk, waiting.pk}
    assert not TaskExecution.objects.filter(flow_execution=old.pk).exists()
