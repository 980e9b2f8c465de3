"""The claim stays flat, whatever stands ahead of the flow that can run, and waits for nobody."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from django.db import connections
from django.utils import timezone

from ebbs_and_flows import FlowRunner, FlowTemplate, task
from ebbs_and_flows.bounded import oldest_due, stored_template_names
from ebbs_and_flows.models import FlowExecution
from ebbs_and_flows.repository.database import FLOW

from .databases import FLOWS, atomic, connection

ROWS = 3000


def template(name: str, **options: Any) -> FlowTemplate:
    return FlowTemplate(name, tasks=[task(name="only")(lambda context: context)], **options)


@contextmanager
def statements() -> Iterator[list[tuple[str, Any]]]:
    """Collect the statements that are made, with their parameters."""
    made: list[tuple[str, Any]] = []

    def note(execute: Any, sql: str, parameters: Any, many: bool, context: Any) -> Any:
        made.append((sql, parameters))
        return execute(sql, parameters, many, context)

    with connection.execute_wrapper(note):
        yield made


def plan(sql: str, parameters: Any) -> str:
    how = "EXPLAIN QUERY PLAN " if connection.vendor == "sqlite" else "EXPLAIN "
    with connection.cursor() as cursor:
        cursor.execute(how + sql, parameters)
        return "\n".join(str(row[-1]) for row in cursor.fetchall())


def rows_read() -> int:
    """Return how many rows and index entries this session of MariaDB has read."""
    with connection.cursor() as cursor:
        cursor.execute("SHOW SESSION STATUS LIKE 'Handler_read%%'")
        return sum(int(value) for _, value in cursor.fetchall())


@pytest.mark.django_db
@pytest.mark.skipif(connection.vendor == "mysql", reason="MariaDB's plans have another form")
@pytest.mark.parametrize("analyzed", [True, False])
@pytest.mark.parametrize("way", ["run_next", "run_flow"])
@pytest.mark.parametrize("ahead", ["later", "unknown", "paused", "full"])
def test_a_claim_is_one_index_range_whatever_stands_ahead(
    runner: FlowRunner, ahead: str, way: str, *, analyzed: bool
) -> None:
    runner.register_flow_template(template("ahead", max_running=1))
    runner.register_flow_template(template("wanted"))
    run_at = timezone.now() + timedelta(days=1) if ahead == "later" else None
    runner.schedule_flows("ahead", [None] * ROWS, priority=100, run_at=run_at)
    wanted = runner.schedule_flow("wanted", priority=-100)
    if ahead == "paused":
        runner.pause_flow_template("ahead")
    elif ahead == "full":
        first = FlowExecution.objects.order_by("pk")[0]
        assert runner.service.claim_flow(first, runner.get_flow_template("ahead"), "worker")
    elif ahead == "unknown":
        FlowExecution.objects.filter(template_name="ahead").update(
            template_name="gone", plan_digest="0" * 32
        )
    if analyzed:
        with connection.cursor() as cursor:
            cursor.execute("ANALYZE")
    with statements() as made:
        claimed = getattr(runner, way)()
    assert claimed is not None
    assert claimed.pk == wanted.pk
    plans = [
        plan(sql, parameters)
        for sql, parameters in made
        if "ebbs_and_flows_flowexecution" in sql
        and ("SELECT" in sql or "WITH" in sql)
        # What is made of a single flow is no look-up.
        and not sql.startswith("INSERT")
    ]
    text = "\n\n".join(plans)
    assert "ebbs_flow_ready" in text
    if connection.vendor == "sqlite":
        assert "SCAN ebbs_and_flows_flowexecution" not in text, text
        ranges = [line for line in text.splitlines() if "ebbs_flow_ready" in line]
        # One range for each plan, and one look-up for each plan that is there.
        bounds = ("plan_digest=? AND ready_rank<?", "(plan_digest>?)")
        assert all(any(bound in line for bound in bounds) for line in ranges), text
        # As it is the order, nothing is sorted but the best one of each template.
        assert "status=? AND ready_rank<?" not in text, text
    else:
        assert "Seq Scan on ebbs_and_flows_flowexecution" not in text, text
        assert "Bitmap" not in text, text


@pytest.mark.django_db(transaction=True)
@pytest.mark.skipif(connection.vendor != "postgresql", reason="SKIP LOCKED is PostgreSQL's here")
def test_a_claim_waits_for_no_other_worker(runner: FlowRunner) -> None:
    runner.register_flow_template(template("t"))
    best, second = runner.schedule_flow("t"), runner.schedule_flow("t")
    locked, done = threading.Event(), threading.Event()

    def hold() -> None:
        try:
            with atomic():
                FlowExecution.objects.select_for_update().get(pk=best.pk)
                locked.set()
                done.wait(20)
        finally:
            connections.close_all()

    holder = threading.Thread(target=hold)
    holder.start()
    try:
        assert locked.wait(20)
        with connection.cursor() as cursor:
            cursor.execute("SET lock_timeout = '5s'")
        claimed = runner.run_next()
    finally:
        done.set()
        holder.join()
        with connection.cursor() as cursor:
            cursor.execute("SET lock_timeout = 0")
    assert claimed is not None
    assert claimed.pk == second.pk


@pytest.mark.django_db(transaction=True)
@pytest.mark.skipif(connection.vendor != "postgresql", reason="SKIP LOCKED is PostgreSQL's here")
def test_eight_workers_claim_without_waiting_for_what_others_hold(runner: FlowRunner) -> None:
    runner.register_flow_template(template("t"))
    flows = [flow.pk for flow in runner.schedule_flows("t", [None] * 200)]
    held, free = flows[::2], flows[1::2]
    begin = threading.Barrier(8, timeout=20)
    ran: list[int] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with connection.cursor() as cursor:
                # Who waits for a flow that is held gets an error: it is held to the end.
                cursor.execute("SET lock_timeout = '5s'")
            begin.wait()
            while (flow := runner.run_next()) is not None:
                ran.append(flow.pk)
        except BaseException as error:  # noqa: BLE001 - to be shown by the test
            errors.append(error)
        finally:
            connections.close_all()

    workers = [threading.Thread(target=work) for _ in range(8)]
    with atomic():
        list(FlowExecution.objects.select_for_update().filter(pk__in=held))
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
    assert errors == []
    assert sorted(ran) == free


@pytest.mark.django_db(transaction=True)
def test_bulk_scheduling_takes_a_few_statements(runner: FlowRunner) -> None:
    runner.register_flow_template(template("t"))
    with statements() as made:
        flows = runner.schedule_flows("t", [{"a": 1}] * 1000, keys=[f"k{n}" for n in range(1000)])
    assert len({flow.pk for flow in flows}) == 1000
    # Of the flows, SQLite takes 33 in one statement. Eight of them wake a worker each.
    assert len(made) <= (60 if connection.vendor == "sqlite" else 30)


@pytest.mark.django_db
@pytest.mark.skipif(connection.vendor != "mysql", reason="the others show it by their plans")
def test_a_look_reads_few_rows_however_many_are_ready_or_over(runner: FlowRunner) -> None:
    runner.register_flow_template(template("wanted"))
    runner.schedule_flows("wanted", [None] * ROWS)
    pks = list(FlowExecution.objects.order_by("pk").values_list("pk", flat=True))
    FlowExecution.objects.filter(pk__in=pks[: ROWS // 2]).update(
        template_name="gone", plan_digest="0" * 32
    )
    FlowExecution.objects.filter(pk__in=pks[-ROWS // 3 :]).update(
        ready_rank=None, status="SUCCEEDED", finished_at=timezone.now()
    )

    runner.has_work()
    before = rows_read()
    due = runner.service.look(runner.templates.values())
    read = rows_read() - before
    assert due.ready
    assert len(due.plans) == 2
    assert read < ROWS // 10


# ANALYZE TABLE of MariaDB commits what is there.
@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("look", ["names", "oldest"])
def test_health_reads_few_rows_however_many_flows_there_are(runner: FlowRunner, look: str) -> None:
    names = {"busy", "over", "later"}
    for name in names:
        runner.register_flow_template(template(name))
    for priority in (0, 1, 2):
        runner.schedule_flows("busy", [None] * (ROWS // 6), priority=priority)
    pks = [flow.pk for flow in runner.schedule_flows("over", [None] * (ROWS // 2))]
    FlowExecution.objects.filter(pk__in=pks).update(
        ready_rank=None, status="SUCCEEDED", finished_at=timezone.now()
    )
    later = timezone.now() + timedelta(days=1)
    runner.schedule_flows("later", [None] * (ROWS // 2), run_at=later)
    with connection.cursor() as cursor:
        is_mysql = connection.vendor == "mysql"
        cursor.execute(f"ANALYZE {f'TABLE {FLOW}' if is_mysql else ''}")
    before = rows_read() if is_mysql else 0
    with statements() as made:
        if look == "names":
            assert stored_template_names(FLOWS) == names
        else:
            assert oldest_due(names, FLOWS) is not None
    if is_mysql:
        assert rows_read() - before < ROWS // 10
        return
    ((sql, parameters),) = made
    steps = plan(sql, parameters)
    assert f"Seq Scan on {FLOW}" not in steps
    assert f"SCAN {FLOW}" not in steps
    if look == "oldest":
        assert "ebbs_flow_ready" in steps
        assert "ebbs_flow_template" not in steps
        assert "ebbs_flow_list" not in steps
