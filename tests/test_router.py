"""Flows on a database of their own, by a router: what still commits together, and what does not.

`EBBS_TEST_ROUTER=1` has the whole suite run so.
"""

from __future__ import annotations

from typing import Any

import pytest
from django.contrib.auth.models import Group
from django.db import connections, transaction
from django_q.models import OrmQ

from ebbs_and_flows import (
    ExecutionContext,
    FlowRunner,
    FlowStatus,
    FlowTemplate,
    OuterTransaction,
    task,
)
from ebbs_and_flows.models import FlowExecution
from tests.shop.models import Order

from .databases import FLOWS, atomic, connection

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.skipif(FLOWS == "default", reason="EBBS_TEST_ROUTER is not set"),
]


def flow_of(runner: FlowRunner, run: Any, **options: Any) -> FlowExecution:
    runner.register_flow_template(FlowTemplate("two", tasks=[task(name="only", **options)(run)]))
    return runner.schedule_flow("two")


def test_the_apps_tables_are_where_the_router_says() -> None:
    assert FLOWS == "flows"
    assert FlowExecution._meta.db_table not in connections["default"].introspection.table_names()
    assert Group._meta.db_table not in connection.introspection.table_names()


def test_an_atomic_task_is_atomic_on_the_flows_database_alone(runner: FlowRunner) -> None:
    def write(context: ExecutionContext) -> ExecutionContext:
        Order.objects.create(number="42")
        Group.objects.create(name="42")
        raise ValueError

    flow = runner.run_flow_execution(flow_of(runner, write, atomic=True))
    assert flow.status == FlowStatus.FAILED
    assert not Order.objects.exists()
    assert Group.objects.exists()


def test_a_flow_commits_with_the_transaction_on_its_own_database(runner: FlowRunner) -> None:
    with pytest.raises(ZeroDivisionError), atomic():
        flow_of(runner, lambda context: context)
        1 / 0  # noqa: B018
    assert not FlowExecution.objects.exists()
    assert not OrmQ.objects.using(FLOWS).exists()
    with pytest.raises(ZeroDivisionError), transaction.atomic(using="default"):
        runner.schedule_flow("two")
        1 / 0  # noqa: B018
    assert FlowExecution.objects.count() == OrmQ.objects.using(FLOWS).count() == 1


def test_running_inside_a_transaction_on_another_database_is_refused(runner: FlowRunner) -> None:
    flow = flow_of(runner, lambda context: context)
    for run in (runner.run_flow, lambda: runner.run_flow_execution(flow)):
        with (
            pytest.raises(OuterTransaction, match="outside of atomic"),
            transaction.atomic(using="default"),
        ):
            run()
    assert runner.run_flow_execution(flow).status == FlowStatus.SUCCEEDED


@pytest.mark.skipif(connection.vendor == "sqlite", reason="SQLite has no connection to lose")
def test_a_connection_of_tasks_that_was_lost_is_opened_anew_for_the_next_flow(
    runner: FlowRunner,
) -> None:
    def count(context: ExecutionContext) -> ExecutionContext:
        return context.with_entries(groups=Group.objects.count())

    flow_of(runner, count)
    runner.schedule_flow("two")
    is_mysql = connection.vendor == "mysql"
    with connections["default"].cursor() as cursor:
        cursor.execute("SELECT CONNECTION_ID()" if is_mysql else "SELECT pg_backend_pid()")
        (number,) = cursor.fetchone()
    with connection.cursor() as cursor:
        cursor.execute("KILL %s" if is_mysql else "SELECT pg_terminate_backend(%s)", [number])
    lost, found = runner.run_next(), runner.run_next()
    assert lost is not None
    assert found is not None
    assert [lost.status, found.status] == [FlowStatus.FAILED, FlowStatus.SUCCEEDED]
