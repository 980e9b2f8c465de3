"""What the database must be like is refused in a sentence: by the checks, and where flows run."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.core.checks import run_checks
from django.core.management import CommandError, call_command
from django.db import OperationalError, connections
from django.db.backends.postgresql import psycopg_any

from ebbs_and_flows import FlowRunner, FlowStatus, FlowTemplate, UnsupportedDatabase, task
from ebbs_and_flows import requirements as required
from ebbs_and_flows.models import FlowExecution
from ebbs_and_flows.repository import is_contention

from .databases import FLOWS, atomic, connection
from .test_command_processes import until
from .test_outages import as_administrator, limited_role, start

pytestmark = pytest.mark.django_db(transaction=True)
Start = Callable[..., "subprocess.Popen[str]"]
__all__ = ["start"]


@pytest.fixture(autouse=True)
def options() -> Iterator[dict[str, Any]]:
    """The options of the database, put back in the end; the process has asked nothing yet."""
    settings = connection.settings_dict
    kept = {**settings, "OPTIONS": dict(settings["OPTIONS"])}
    required._accepted.clear()
    yield settings["OPTIONS"]
    settings.update(kept)
    required._accepted.clear()
    connection.close()


def ids(**arguments: Any) -> set[str]:
    return {str(item.id) for item in run_checks(**arguments) if "ebbs_and_flows" in str(item.id)}


def refused(**arguments: Any) -> set[str]:
    """Return what the checks find that is new here."""
    return ids(**arguments) & {f"ebbs_and_flows.E01{n}" for n in range(1, 7)} | (
        ids(**arguments) & {"ebbs_and_flows.W012"}
    )


LEVELS = {
    "postgresql": [(3, "REPEATABLE READ"), (4, "SERIALIZABLE")],
    "mysql": [
        ("read uncommitted", "READ UNCOMMITTED"),
        ("repeatable read", "REPEATABLE READ"),
        ("serializable", "SERIALIZABLE"),
    ],
}.get(connection.vendor, [])


def raise_level(name: str) -> None:
    """Have the server say another isolation level in this session."""
    sql = f"SET SESSION TRANSACTION ISOLATION LEVEL {name}"
    if connection.vendor == "postgresql":
        sql = f"SET default_transaction_isolation = '{name.lower()}'"
    with connection.cursor() as cursor:
        cursor.execute(sql)


def test_the_tests_own_database_is_accepted() -> None:
    assert refused() == set()
    assert refused(databases=[FLOWS]) == set()


@pytest.mark.skipif("connection.vendor == 'sqlite'", reason="SQLite has one isolation level")
@pytest.mark.parametrize(("option", "name"), LEVELS)
def test_an_isolation_level_in_the_options_is_an_error(
    options: dict[str, Any], runner: FlowRunner, option: Any, name: str
) -> None:
    options["isolation_level"] = option
    assert refused() == {"ebbs_and_flows.E014"}
    with pytest.raises(UnsupportedDatabase, match="Flows need the isolation level READ COMMITTED"):
        runner.run_flow()


@pytest.mark.skipif("connection.vendor == 'sqlite'", reason="SQLite has one isolation level")
@pytest.mark.parametrize(("option", "name"), LEVELS)
def test_an_isolation_level_of_the_servers_is_refused_by_whatever_runs_flows(
    runner: FlowRunner, option: Any, name: str
) -> None:
    runner.register_flow_template(FlowTemplate("order", tasks=[task(lambda context: context)]))
    flow = runner.schedule_flow("order")
    raise_level(name)
    sentence = f"says that its isolation level is {name}. Flows need"
    for run in (
        runner.run_flow,
        runner.re_run_flow,
        runner.run_next,
        lambda: runner.run_flow_execution(flow),
    ):
        with pytest.raises(UnsupportedDatabase, match=sentence):
            run()
    for arguments in ([], ["--watch"], ["--watch", "--workers", "2"]):
        with pytest.raises(CommandError, match=sentence):
            call_command("runflows", *arguments, stdout=StringIO())
    assert refused() == set()
    assert refused(databases=[FLOWS]) == {"ebbs_and_flows.E016"}
    flow.refresh_from_db()
    assert (flow.status, flow.claim) == (FlowStatus.SCHEDULED, 0)


def test_the_server_is_asked_once(runner: FlowRunner) -> None:
    asked: list[str] = []

    def note(execute: Any, sql: str, *arguments: Any) -> Any:
        if sql.startswith("SHOW"):
            asked.append(sql)
        return execute(sql, *arguments)

    with connection.execute_wrapper(note):
        for _ in range(3):
            assert runner.run_next() is None
    assert len(asked) == (0 if connection.vendor == "sqlite" else 1)


@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        (True, set()),
        ({}, set()),
        ({"min_size": 1, "max_size": 1}, {"ebbs_and_flows.E015"}),
        ({"min_size": 1}, {"ebbs_and_flows.E015"}),
        ({"min_size": 1, "max_size": 2}, {"ebbs_and_flows.W012"}),
        ({"min_size": 1, "max_size": 3}, set()),
    ],
)
def test_a_pool_without_a_connection_for_the_heartbeat_is_found(
    options: dict[str, Any], pool: Any, expected: set[str]
) -> None:
    options["pool"] = pool
    found = {item.id for item in required.check_configuration(FLOWS)}
    assert found == expected


@pytest.mark.parametrize("zone", ["Europe/Berlin", "Etc/GMT-1"])
def test_a_time_zone_of_the_database_is_an_error_where_times_are_stored_without_one(
    runner: FlowRunner, zone: str
) -> None:
    connection.settings_dict["TIME_ZONE"] = zone
    knows_zones = connection.vendor == "postgresql"
    assert refused() == (set() if knows_zones else {"ebbs_and_flows.E013"})
    if not knows_zones:
        with pytest.raises(UnsupportedDatabase, match="Leave TIME_ZONE out of its settings"):
            runner.run_flow()
    connection.settings_dict["TIME_ZONE"] = "UTC"
    assert refused() == set()


@pytest.mark.skipif("connection.vendor != 'postgresql'", reason="a driver of PostgreSQL")
def test_psycopg2_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    # As where only psycopg2 is installed.
    monkeypatch.setattr(psycopg_any, "is_psycopg3", False)
    assert refused() == {"ebbs_and_flows.E012"}


def test_another_kind_of_database_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections[FLOWS], "vendor", "oracle")
    (found,) = required.check_configuration(FLOWS)
    assert found.id == "ebbs_and_flows.E011"


@pytest.mark.skipif("connection.vendor != 'mysql'", reason="a setting of MariaDB")
def test_a_row_that_changed_since_the_snapshot_is_contention(runner: FlowRunner) -> None:
    runner.register_flow_template(FlowTemplate("order", tasks=[task(lambda context: context)]))
    flow = runner.schedule_flow("order")
    with connection.cursor() as cursor:
        cursor.execute("SELECT @@innodb_snapshot_isolation")
        cursor.execute("SET SESSION innodb_snapshot_isolation = ON")
    raise_level("REPEATABLE READ")
    another = connections.create_connection(FLOWS)
    table = FlowExecution._meta.db_table
    try:
        with pytest.raises(OperationalError) as caught, atomic():
            assert FlowExecution.objects.get(pk=flow.pk).priority == 0
            with another.cursor() as cursor:
                cursor.execute(f"UPDATE {table} SET priority = 1 WHERE id = %s", [flow.pk])
            FlowExecution.objects.filter(pk=flow.pk).update(priority=2)
    finally:
        another.close()
    assert caught.value.args[0] == 1020
    assert is_contention(caught.value)


# Real workers


@pytest.mark.processes
@pytest.mark.skipif("connection.vendor != 'postgresql'", reason="a setting of PostgreSQL")
def test_real_workers_refuse_an_isolation_level_until_it_is_right(
    start: Start, tmp_path: Path
) -> None:
    from ebbs_and_flows import flow_runner

    name = connection.settings_dict["NAME"]
    flow = flow_runner.schedule_flow("shop-quick", {"folder": str(tmp_path)})
    level = "default_transaction_isolation"
    as_administrator(f"ALTER DATABASE \"{name}\" SET {level} = 'repeatable read'")
    try:
        for command in ("runflows", "runflows --watch --workers 2"):
            process = start(*command.split())
            _out, err = process.communicate(timeout=60)
            assert process.returncode == 1
            assert "isolation level is REPEATABLE READ" in err
            assert "Traceback" not in err
        cluster = start("qcluster")
        assert cluster.stderr is not None
        said = ""
        while "This worker runs no flows" not in said:
            said = cluster.stderr.readline()
            assert said, "the cluster ended"
        flow.refresh_from_db()
        assert flow.status == FlowStatus.SCHEDULED
    finally:
        as_administrator(f'ALTER DATABASE "{name}" RESET {level}')
    until(lambda: flow_runner.service.get_flow_execution(flow).is_finished, "the flow's end", 60)
    cluster.send_signal(signal.SIGTERM)
    cluster.communicate(timeout=60)


@pytest.mark.processes
@pytest.mark.skipif("connection.vendor != 'postgresql'", reason="a limit of PostgreSQL")
def test_a_worker_that_gets_no_second_connection_refuses_to_start(start: Start) -> None:
    with limited_role() as role:
        as_administrator(f"ALTER ROLE {role} CONNECTION LIMIT 1")
        process = start("runflows", "--watch", PGUSER=role)
        _out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "cannot open a second connection to the database" in err
    assert "too many connections for role" in err
    assert os.linesep.join(err.splitlines()[-1:]).startswith("CommandError")
