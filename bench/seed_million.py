"""Fills a database with 1,000,000 flow executions and 10,000,000 attempts, as a busy year leaves.

    EBBS_TEST_DATABASE=sqlite python -m bench.seed_million            # or postgresql

The database is one of its own, made anew: `ebbs_million`, or what `--name` gives.
`bench.admin_pages` then measures the admin's pages on it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

TASKS = 10
TEMPLATES = 40
DAYS = 90
DEFAULT_NAMES = {
    "sqlite": str(Path(tempfile.gettempdir()) / "ebbs-million.sqlite3"),
    "postgresql": "ebbs_million",
}


def choose_database(name: str | None) -> str:
    """Set the environment for `tests.settings`; return which database it is."""
    database = os.environ.setdefault("EBBS_TEST_DATABASE", "sqlite")
    if database not in DEFAULT_NAMES:
        sys.exit(f"EBBS_TEST_DATABASE is {database!r}: give sqlite or postgresql.")
    os.environ["EBBS_TEST_DATABASE_NAME"] = name or DEFAULT_NAMES[database]
    os.environ["DJANGO_SETTINGS_MODULE"] = "tests.settings"
    return database


def make_empty(database: str) -> None:
    name = os.environ["EBBS_TEST_DATABASE_NAME"]
    if database == "sqlite":
        for ending in ("", "-wal", "-shm"):
            Path(name + ending).unlink(missing_ok=True)
        return
    import psycopg

    with psycopg.connect(
        host=os.environ.get("PGHOST", "127.0.0.1"),
        port=os.environ.get("PGPORT", "5432"),
        user=os.environ.get("PGUSER", "postgres"),
        password=os.environ.get("PGPASSWORD", ""),
        dbname="postgres",
        autocommit=True,
    ) as connection:
        connection.execute(f'DROP DATABASE IF EXISTS "{name}"')
        connection.execute(f'CREATE DATABASE "{name}"')


def statements(flows: int, database: str) -> list[tuple[str, str]]:
    """Return a title and an SQL statement for each step; every row is a function of its number."""
    now = time.time()
    step = DAYS * 86400 / flows
    if database == "sqlite":
        series = (
            "(WITH RECURSIVE s(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM s WHERE n < {})"
            " SELECT n FROM s)"
        )
        at = "strftime('%Y-%m-%d %H:%M:%f', {}, 'unixepoch')"
        names = "'[" + ", ".join(f'"step_{n}"' for n in range(TASKS)) + "]'"
        padded = "printf('%02d', {})"
    else:
        series = "(SELECT generate_series(1, {}) AS n)"
        at = "to_timestamp({})"
        names = "'[" + ", ".join(f'"step_{n}"' for n in range(TASKS)) + "]'::jsonb"
        padded = "lpad(({})::text, 2, '0')"
    rows, tasks = series.format(flows), series.format(TASKS)
    # Small numbers are far more frequent among the templates than large ones.
    number = f"(n % {TEMPLATES}) * (n / {TEMPLATES} % {TEMPLATES}) / {TEMPLATES}"
    template = f"'seed-' || {padded.format(number)}"
    created = f"{now - DAYS * 86400:.0f} + n * {step:.6f}"
    newest = flows - n if (n := flows // 500) else flows
    status = f"""CASE
        WHEN n > {newest} AND n % 50 = 0 THEN 'RUNNING'
        WHEN n > {newest} AND n % 9 = 0 THEN 'RESCHEDULED'
        WHEN n > {newest} THEN 'SCHEDULED'
        WHEN n % 40 = 0 OR n BETWEEN {flows // 10} AND {flows // 9} THEN 'FAILED'
        WHEN n % 170 = 0 THEN 'CANCELLED'
        ELSE 'SUCCEEDED' END"""
    false = "0" if database == "sqlite" else "false"
    over = "status IN ('SUCCEEDED', 'FAILED', 'CANCELLED')"
    waiting = "status IN ('SCHEDULED', 'RESCHEDULED')"
    index = f"""CASE status WHEN 'SUCCEEDED' THEN {TASKS} WHEN 'SCHEDULED' THEN 0
        ELSE 1 + n % {TASKS - 1} END"""
    insert_flows = f"""
        INSERT INTO ebbs_and_flows_flowexecution (
            template_name, task_names, template_version, plan_digest,
            first_task_index, current_task_index, status, key,
            priority, run_at, ready_rank, claim, claimed_by, lease_expires_at, cancel_requested,
            cancel_requested_by, forgiven_attempts, interruptions, task_progress, traceparent,
            created_at, started_at, finished_at, created_by)
        SELECT {template}, {names}, 1, '', 0, {index}, status,
            CASE WHEN n % 3 = 0 THEN 'order-' || n END, 0, {at.format(created)},
            CASE WHEN {waiting} THEN 0 END, 1,
            CASE WHEN status = 'RUNNING' THEN 'worker-1' ELSE '' END,
            CASE WHEN status = 'RUNNING' THEN {at.format(f"{now + 86400 * 365:.0f}")} END, {false},
            '', 0, 0, '', '', {at.format(created)},
            CASE WHEN status <> 'SCHEDULED' THEN {at.format(f"{created} + 1")} END,
            CASE WHEN {over} THEN {at.format(f"{created} + 2 + n % 97")} END, 'seed'
        FROM (SELECT n, {status} AS status FROM {rows} AS numbered) AS planned ORDER BY n"""
    insert_attempts = f"""
        INSERT INTO ebbs_and_flows_taskexecution (
            flow_execution_id, task_index, task_name, attempt, claim, status, started_at,
            finished_at, output, log, error_type, error_message, traceback)
        SELECT id, n - 1, 'step_' || (n - 1), 1, 1, of_task, started_at,
            CASE WHEN of_task <> 'RUNNING' THEN COALESCE(finished_at, started_at) END,
            CASE WHEN of_task = 'FAILED' THEN '{OUTPUT}' ELSE '' END, '',
            CASE WHEN of_task = 'FAILED' THEN 'ValueError' ELSE '' END,
            CASE WHEN of_task = 'FAILED' THEN '{MESSAGE}' ELSE '' END,
            CASE WHEN of_task = 'FAILED' THEN '{TRACEBACK}' ELSE '' END
        FROM (
            SELECT flow.id, flow.started_at, flow.finished_at, task.n,
                CASE WHEN task.n - 1 < flow.current_task_index THEN 'SUCCEEDED'
                    WHEN flow.status = 'RUNNING' THEN 'RUNNING' ELSE 'FAILED' END AS of_task
            FROM ebbs_and_flows_flowexecution AS flow
            JOIN {tasks} AS task ON task.n - 1 < flow.current_task_index
                OR (task.n - 1 = flow.current_task_index
                    AND flow.status IN ('FAILED', 'RESCHEDULED', 'RUNNING'))
            WHERE flow.status <> 'SCHEDULED'
        ) AS planned
        ORDER BY id, n"""
    insert_entries = """
        INSERT INTO ebbs_and_flows_executioncontextentry (
            flow_execution_id, name, value, task_execution_id)
        SELECT flow.id, 'order_id', CAST(flow.id AS text), NULL
        FROM ebbs_and_flows_flowexecution AS flow
        ORDER BY flow.id"""
    insert_results = """
        INSERT INTO ebbs_and_flows_executioncontextentry (
            flow_execution_id, name, value, task_execution_id)
        SELECT flow_execution_id, 'receipt', '"R-' || flow_execution_id || '"', id
        FROM ebbs_and_flows_taskexecution WHERE task_index = 0 AND status = 'SUCCEEDED'"""
    insert_transitions = f"""
        INSERT INTO ebbs_and_flows_flowtransition (
            flow_execution_id, from_status, to_status, at, actor, reason)
        SELECT flow.id, CASE step.n WHEN 1 THEN '' WHEN 2 THEN 'CREATED' ELSE 'SCHEDULED' END,
            CASE step.n WHEN 1 THEN 'CREATED' WHEN 2 THEN 'SCHEDULED' ELSE 'RUNNING' END,
            flow.created_at, 'seed', ''
        FROM ebbs_and_flows_flowexecution AS flow
        JOIN {series.format(3)} AS step ON step.n < 3 OR flow.status <> 'SCHEDULED'
        ORDER BY flow.id"""
    return [
        ("flow executions", insert_flows),
        ("attempts", insert_attempts),
        ("entries at scheduling", insert_entries),
        ("entries of tasks", insert_results),
        ("transitions", insert_transitions),
    ]


MESSAGE = "the card was refused"
TRACEBACK = (
    "Traceback (most recent call last):\n"
    + "".join(f'  File "shop/flows.py", line {n}, in run\n    charge(card)\n' for n in range(20))
    + f"ValueError: {MESSAGE}"
)
OUTPUT = f"ValueError: {MESSAGE}\n\n{TRACEBACK}"


def _fill_in_digests() -> None:
    from ebbs_and_flows.models import FlowExecution
    from ebbs_and_flows.plans import Plan

    names = [f"step_{number}" for number in range(TASKS)]
    for number in range(TEMPLATES):
        plan = Plan.of(f"seed-{number:02d}", 1, names)
        FlowExecution.objects.filter(template_name=plan.template_name).update(
            plan_digest=plan.digest
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--flows", type=int, default=1_000_000)
    parser.add_argument("--name", help="the database's name, or the file of SQLite")
    arguments = parser.parse_args()
    database = choose_database(arguments.name)
    make_empty(database)

    import django
    from django.core.management import call_command
    from django.db import connection

    django.setup()
    call_command("migrate", verbosity=0)
    with connection.cursor() as cursor:
        for title, sql in statements(arguments.flows, database):
            started = time.monotonic()
            cursor.execute(sql)
            print(
                f"{cursor.rowcount:>12,} {title} in {time.monotonic() - started:.0f} s", flush=True
            )
        _fill_in_digests()
        # SQLite is left without statistics, as its users' databases are.
        if database == "postgresql":
            cursor.execute("VACUUM ANALYZE")
    print(f"In {os.environ['EBBS_TEST_DATABASE_NAME']}.")


if __name__ == "__main__":
    main()
