"""The limits: what the database alone takes, through the driver's own cursor.

L1 is one autocommit `UPDATE` of one row. L2 is the statements of a step of ours, over our own
tables, in one transaction: the fenced `UPDATE` of the flow, the `UPDATE` of the finished attempt,
the `INSERT` of its entry and the `INSERT` of the next attempt.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

import django

from bench.harness.contender import Order, main, stamp

L1 = "UPDATE ebbs_and_flows_flowexecution SET lease_expires_at = {later} WHERE id = {p}"
ADVANCE = """
UPDATE ebbs_and_flows_flowexecution
SET current_task_index = {p}, forgiven_attempts = 0, interruptions = 0, lease_expires_at = {later}
WHERE id = {p} AND claim = 1 AND status = 'RUNNING' AND NOT cancel_requested
"""
FINISH = """
UPDATE ebbs_and_flows_taskexecution SET status = 'SUCCEEDED', finished_at = {now}
WHERE id = {p} AND status = 'RUNNING'
"""
ADD = """
INSERT INTO ebbs_and_flows_executioncontextentry
    (flow_execution_id, name, value, task_execution_id)
VALUES ({p}, {p}, {p}, {p})
"""
START = """
INSERT INTO ebbs_and_flows_taskexecution (flow_execution_id, task_index, task_name, attempt, claim,
    status, started_at, output, log, error_type)
VALUES ({p}, {p}, {p}, 1, 1, 'RUNNING', {now}, '', '', '') RETURNING id
"""
L2 = (ADVANCE, FINISH, ADD, START)
POSTGRESQL = {
    "p": "%s",
    "now": "STATEMENT_TIMESTAMP()",
    "later": "STATEMENT_TIMESTAMP() + interval '30 s'",
}


def setup(order: Order) -> None:
    """Make our tables."""
    from django.core.management import call_command

    call_command("migrate", verbosity=0)


def schedule(order: Order, flows: Iterable[int]) -> None:
    """Store the flows as a claim leaves them: RUNNING, with a first attempt."""
    from ebbs_and_flows.models import FlowExecution, TaskExecution

    now = datetime.now(UTC)
    # Those of an earlier sample are over.
    FlowExecution.objects.filter(status="RUNNING").update(
        status="SUCCEEDED", finished_at=now, lease_expires_at=None
    )
    made = FlowExecution.objects.bulk_create(
        FlowExecution(
            template_name="W10",
            task_names=[f"step_{task}" for task in range(order.tasks)],
            status="RUNNING",
            claim=1,
            claimed_by="limits",
            run_at=now,
            created_at=now,
            started_at=now,
            lease_expires_at=now + timedelta(seconds=30),
        )
        for _ in flows
    )
    TaskExecution.objects.bulk_create(
        TaskExecution(
            flow_execution=flow,
            task_index=0,
            task_name="step_0",
            attempt=1,
            claim=1,
            started_at=now,
        )
        for flow in made
    )


FLOWS = (
    "SELECT f.id, a.id FROM ebbs_and_flows_flowexecution f JOIN ebbs_and_flows_taskexecution a"
    " ON a.flow_execution_id = f.id AND a.task_index = 0 WHERE f.status = 'RUNNING' ORDER BY f.id"
)


def _run(
    order: Order,
    execute: Callable[..., Any],
    statements: list[str],
    times: Callable[[], list[Any]],
    begin: Callable[[], Any],
    commit: Callable[[], Any],
) -> None:
    is_l1 = order.variant.endswith("-L1")
    for number, (flow, attempt) in enumerate(execute(FLOWS).fetchall()):
        for task in range(order.tasks):
            stamp(number, task)
            # SQLite's moments are parameters; PostgreSQL has them in its text.
            now, later = times()
            if is_l1:
                execute(statements[0], [*later, flow])
                continue
            begin()
            update, finish, add, start = statements
            execute(update, [task + 1, *later, flow])
            execute(finish, [*now, attempt])
            execute(add, [flow, f"value_{task}", f'"value {task}"', attempt])
            # As many rows as a flow's: the attempt after the last one stands for its transition.
            row = execute(start, [flow, task + 1, f"step_{task + 1}", *now]).fetchone()
            attempt = row[0]
            commit()


def work(order: Order) -> None:
    """Run the statements of each flow's steps."""
    texts = [L1] if order.variant.endswith("-L1") else list(L2)
    if order.variant.startswith("postgresql"):
        import psycopg

        statements = [text.format(**POSTGRESQL) for text in texts]
        with psycopg.connect(order.url, autocommit=True) as connection:
            cursor = connection.cursor()
            _run(
                order,
                cursor.execute,
                statements,
                lambda: [[], []],
                lambda: cursor.execute("BEGIN"),
                lambda: cursor.execute("COMMIT"),
            )
        return
    statements = [text.format(p="?", now="?", later="?") for text in texts]
    connection = sqlite3.connect(order.url, isolation_level=None)
    # Foreign keys are what Django turns on.
    connection.executescript(
        "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA foreign_keys=ON"
    )
    cursor = connection.cursor()

    def times() -> list[Any]:
        now = datetime.now(UTC).replace(tzinfo=None)
        return [[str(now)], [str(now + timedelta(seconds=30))]]

    _run(
        order,
        cursor.execute,
        statements,
        times,
        lambda: cursor.execute("BEGIN IMMEDIATE"),
        lambda: cursor.execute("COMMIT"),
    )
    connection.close()


if __name__ == "__main__":
    os.environ["DJANGO_SETTINGS_MODULE"] = "bench.ours.settings"
    django.setup()
    main(setup, schedule, work)
