"""The database that refuses for a while: a finished result is kept, and no worker ends by it.

The faults are a server's own: it is made read-only, out of connections, stopped and started.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from django.db import DatabaseError, InterfaceError, InternalError, OperationalError

from ebbs_and_flows import ExecutionContext, FlowRunner, FlowStatus, FlowTemplate, task
from ebbs_and_flows.engines.slices import run_slice
from ebbs_and_flows.management.foreground import Choice, run_due
from ebbs_and_flows.management.stopping import StopRequest
from ebbs_and_flows.models import FlowExecution
from ebbs_and_flows.repository import is_contention, is_outage

from .chaos.server import can_be_private
from .databases import connection, database_names
from .mariadb_server import SharedMariaDB, shared_mariadb
from .test_command_processes import log, until

pytestmark = pytest.mark.django_db(transaction=True)

ON_POSTGRESQL = pytest.mark.skipif(
    "connection.vendor != 'postgresql'", reason="a fault of PostgreSQL"
)


# What an error says


def raised(cause: BaseException) -> BaseException:
    """Return what Django makes of a driver's error."""
    try:
        with connection.wrap_database_errors:
            raise cause
    except BaseException as error:  # noqa: BLE001 - that is what is asked for
        return error


@ON_POSTGRESQL
@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("25006", True),
        ("25P03", True),
        ("25P04", True),
        ("53100", True),
        ("53300", True),
        ("57P01", True),
        ("57P02", True),
        ("57P03", True),
        ("57P05", True),
        ("08006", True),
        ("40001", True),
        ("25P02", False),
        ("23505", False),
        ("22001", False),
        ("42501", False),
        ("XX000", False),
    ],
)
def test_what_postgresql_refuses_for_a_while_is_told_from_what_it_refuses(
    state: str, expected: bool
) -> None:
    from psycopg import errors

    error = raised(errors.lookup(state)("refused"))
    assert isinstance(error, DatabaseError)
    assert is_outage(error) is expected


@pytest.mark.skipif("connection.vendor != 'mysql'", reason="errors of MariaDB")
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (1290, True),
        (1836, True),
        (1792, True),
        (1040, True),
        (1203, True),
        (1226, True),
        (1053, True),
        (1927, True),
        (2006, True),
        (2013, True),
        (1020, True),
        (1062, False),
        (1406, False),
        (1064, False),
    ],
)
def test_what_mariadb_refuses_for_a_while_is_told_from_what_it_refuses(
    code: int, expected: bool
) -> None:
    from pymysql.err import raise_mysql_exception

    packet = b"\xff" + code.to_bytes(2, "little") + b"#HY000refused"
    with pytest.raises(Exception, match="refused") as caught:
        raise_mysql_exception(packet)
    error = raised(caught.value)
    assert is_outage(error) is expected
    assert is_contention(error) is (code == 1020)


# PostgreSQL, in this process


def as_administrator(*statements: str) -> None:
    """Make statements over a connection to another database of the server."""
    import psycopg

    settings = connection.settings_dict
    with psycopg.connect(
        host=settings["HOST"],
        port=settings["PORT"],
        user=settings["USER"],
        password=settings["PASSWORD"],
        dbname="postgres",
        autocommit=True,
    ) as admin:
        for statement in statements:
            admin.execute(statement)  # type: ignore[call-overload]


def end_connections() -> None:
    as_administrator(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        f" WHERE datname = '{connection.settings_dict['NAME']}'"
    )


@contextmanager
def read_only() -> Iterator[None]:
    """Demote the database, as a failover does."""
    name = connection.settings_dict["NAME"]
    as_administrator(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
    try:
        end_connections()
        yield
    finally:
        as_administrator(f'ALTER DATABASE "{name}" RESET default_transaction_read_only')


@contextmanager
def for_a_while(fault: Any, seconds: float) -> Iterator[None]:
    """Begin a fault, which ends in the background after those seconds."""
    begun, failed = threading.Event(), []

    def be_at_fault() -> None:
        try:
            with fault():
                begun.set()
                time.sleep(seconds)
        except Exception as error:  # noqa: BLE001 - shown below
            failed.append(error)
            begun.set()

    thread = threading.Thread(target=be_at_fault)
    thread.start()
    begun.wait(30)
    try:
        yield
    finally:
        thread.join()
        assert failed == []


def run_with(
    runner: FlowRunner, body: Callable[[ExecutionContext], ExecutionContext], *, atomic: bool
) -> FlowExecution:
    tasks = [task(name="first", atomic=atomic)(body), task(name="second")(lambda c: c)]
    runner.register_flow_template(FlowTemplate("order", tasks=tasks))
    flow = runner.schedule_flow("order")
    while runner.run_next() is not None:
        pass
    return runner.service.get_flow_execution(flow)


@ON_POSTGRESQL
def test_i2_a_finished_result_is_kept_while_the_database_is_read_only(runner: FlowRunner) -> None:
    ran: list[int] = []

    def body(context: ExecutionContext) -> ExecutionContext:
        ran.append(context.attempt)
        faults.__enter__()
        return context.with_entries(charged=True)

    faults = for_a_while(read_only, 2)
    flow = run_with(runner, body, atomic=False)
    faults.__exit__(None, None, None)
    assert (flow.status, ran) == (FlowStatus.SUCCEEDED, [1])
    assert flow.execution_context["charged"] is True
    assert list(flow.task_executions.values_list("attempt", "status")) == [(1, "SUCCEEDED")] * 2


@ON_POSTGRESQL
def test_i2_an_atomic_task_is_repeated_once_the_database_can_be_written_to(
    runner: FlowRunner,
) -> None:
    ran: list[int] = []

    def body(context: ExecutionContext) -> ExecutionContext:
        ran.append(context.attempt)
        if context.attempt == 1:
            # As of a demotion that ends no session.
            with connection.cursor() as cursor:
                cursor.execute("SET SESSION default_transaction_read_only = on")
                cursor.execute("SET TRANSACTION READ ONLY")
        return context.with_entries(charged=context.attempt)

    flow = run_with(runner, body, atomic=True)
    assert (flow.status, ran) == (FlowStatus.SUCCEEDED, [1, 2])
    assert flow.execution_context["charged"] == 2


@ON_POSTGRESQL
def test_a_transaction_that_was_idle_for_too_long_costs_no_retry(runner: FlowRunner) -> None:
    ran: list[int] = []

    def body(context: ExecutionContext) -> ExecutionContext:
        ran.append(context.attempt)
        if context.attempt == 1:
            with connection.cursor() as cursor:
                cursor.execute("SET LOCAL idle_in_transaction_session_timeout = '50ms'")
            time.sleep(0.5)
        return context

    flow = run_with(runner, body, atomic=True)
    assert (flow.status, ran) == (FlowStatus.SUCCEEDED, [1, 2])
    first = flow.task_executions.order_by("pk")[0]
    assert first.status == "FAILED"


@ON_POSTGRESQL
def test_a_watching_worker_outlives_each_kind_of_refusal(
    runner: FlowRunner, caplog: pytest.LogCaptureFixture
) -> None:
    errors = iter(
        [InternalError("read-only"), OperationalError("too many"), InterfaceError("closed")]
    )
    states = iter(["25006", "53300", "08006"])
    tried: list[str] = []

    def refuse(execute: Any, sql: str, parameters: Any, many: bool, context: Any) -> Any:
        from psycopg import errors as drivers

        if (error := next(errors, None)) is not None:
            tried.append(type(error).__name__)
            raise error from drivers.lookup(next(states))("refused")
        stop.request()
        return execute(sql, parameters, many, context)

    with StopRequest() as stop, connection.execute_wrapper(refuse):
        run_due(Choice(watch=True), stop, lambda outcome: None)
    assert tried == ["InternalError", "OperationalError", "InterfaceError"]


@ON_POSTGRESQL
def test_a_message_of_a_queue_ends_quietly_while_the_database_refuses(
    caplog: pytest.LogCaptureFixture,
) -> None:
    handed_on: list[None] = []

    def refuse(*_: Any) -> Any:
        from psycopg import errors as drivers

        raise InternalError("read-only") from drivers.ReadOnlySqlTransaction("read-only")

    with connection.execute_wrapper(refuse):
        run_slice(lambda: False, lambda: handed_on.append(None))
    assert handed_on == []
    assert "The database refuses (read-only)" in caplog.text


# Real workers


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a command; it is ended with the test."""
    started: list[subprocess.Popen[str]] = []

    def popen(*arguments: str, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "django", *arguments],
            env={
                **os.environ,
                "DJANGO_SETTINGS_MODULE": "tests.settings",
                **database_names(),
                "PYTHONPATH": str(Path(__file__).parent.parent),
                "PYTHONUNBUFFERED": "1",
                **environment,
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield popen
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def run_through(
    start: Start,
    folder: Path,
    begin: Callable[[], None],
    end: Callable[[], None],
    *,
    seconds: float = 3,
    command: str = "runflows --watch",
    **environment: str,
) -> tuple[dict[str, Any], str]:
    """Have a worker finish a task in the middle of a fault; return the flow and its log."""
    environment = {"EBBS_TEST_LEASE_SECONDS": "30", **environment}
    said = start(
        "scheduleflow", "shop-waits", "--entry", f"folder={folder}", "--json", **environment
    ).communicate(timeout=60)[0]
    number = str(json.loads(said)["id"])
    worker = start(*command.split(), **environment)
    until(lambda: any("wait_for_file" in line for line in log(folder)), "the second task")
    begin()
    try:
        (folder / "go").touch()
        time.sleep(seconds)
        assert worker.poll() is None, worker.communicate()
    finally:
        end()
    until(lambda: any(" last " in line for line in log(folder)), "the last task")

    def found() -> dict[str, Any]:
        shown = start("showflows", "--json", **environment).communicate(timeout=60)[0]
        flows = [json.loads(line) for line in shown.splitlines()]
        return next(flow for flow in flows if str(flow["id"]) == number)

    until(lambda: found()["status"] == "SUCCEEDED", "the end")
    assert worker.poll() is None
    worker.send_signal(signal.SIGTERM)
    _out, err = worker.communicate(timeout=60)
    assert worker.returncode == 0, err
    return found(), err


def ran(folder: Path) -> list[str]:
    return [line.split()[1] for line in log(folder)]


@contextmanager
def limited_role() -> Iterator[str]:
    """Make a role of the tests' database whose connections can be limited."""
    role = f"ebbs_limited_{os.getpid()}"
    as_administrator(f"CREATE ROLE {role} LOGIN")
    with connection.cursor() as cursor:
        cursor.execute(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}")
        cursor.execute(f"GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO {role}")
    try:
        yield role
    finally:
        end_connections()
        connection.close()
        with connection.cursor() as cursor:
            cursor.execute(f"DROP OWNED BY {role}")
        as_administrator(f"DROP ROLE {role}")


@pytest.mark.processes
@ON_POSTGRESQL
@pytest.mark.parametrize("command", ["runflows --watch", "qcluster"])
@pytest.mark.parametrize("fault", ["read-only", "out of connections"])
def test_i2_a_worker_keeps_a_result_through_a_fault_of_postgresql(
    start: Start, tmp_path: Path, command: str, fault: str
) -> None:
    name = connection.settings_dict["NAME"]
    with limited_role() as role:

        def begin() -> None:
            if fault == "read-only":
                as_administrator(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
            else:
                as_administrator(f"ALTER ROLE {role} CONNECTION LIMIT 0")
            end_connections()

        def end() -> None:
            as_administrator(
                f'ALTER DATABASE "{name}" RESET default_transaction_read_only',
                f"ALTER ROLE {role} CONNECTION LIMIT -1",
            )

        environment = {"PGUSER": role}
        flow, said = run_through(start, tmp_path, begin, end, command=command, **environment)
        connection.close()
    assert ran(tmp_path) == ["first", "wait_for_file", "last"]
    assert flow["done"] == 3
    assert "Flow" in said


@pytest.mark.processes
@ON_POSTGRESQL
def test_i2_a_watching_worker_outlives_a_fault_that_outlasts_its_lease(
    start: Start, tmp_path: Path
) -> None:
    with limited_role() as role:

        def begin() -> None:
            as_administrator(f"ALTER ROLE {role} CONNECTION LIMIT 0")
            end_connections()

        flow, _said = run_through(
            start,
            tmp_path,
            begin,
            lambda: as_administrator(f"ALTER ROLE {role} CONNECTION LIMIT -1"),
            seconds=6,
            PGUSER=role,
            EBBS_TEST_LEASE_SECONDS="2",
        )
    # The result was dropped with the lease, and the task in progress is what is repeated.
    assert ran(tmp_path) == ["first", "wait_for_file", "wait_for_file", "last"]
    assert flow["done"] == 3


@pytest.fixture(scope="module")
def mariadb() -> Iterator[SharedMariaDB]:
    """A server of the tests' own, with the tables."""
    with shared_mariadb() as server:
        subprocess.run(
            [sys.executable, "-m", "django", "migrate", "--verbosity=0"],
            env={
                **os.environ,
                "DJANGO_SETTINGS_MODULE": "tests.settings",
                "PYTHONPATH": str(Path(__file__).parent.parent),
                **server.settings(),
            },
            check=True,
            timeout=120,
        )
        yield server


@pytest.mark.processes
@pytest.mark.skipif("connection.vendor != 'mysql'", reason="a fault of MariaDB")
@pytest.mark.skipif(not can_be_private("mariadb"), reason="MariaDB's server is not installed here")
@pytest.mark.parametrize("fault", ["read-only", "out of connections", "restarted"])
def test_i2_a_worker_keeps_a_result_through_a_fault_of_mariadb(
    start: Start, tmp_path: Path, mariadb: SharedMariaDB, fault: str
) -> None:
    taken: list[Any] = []

    def begin() -> None:
        if fault == "read-only":
            mariadb.execute("SET GLOBAL read_only = 1")
        elif fault == "restarted":
            mariadb.stop()
        else:
            mariadb.execute("SET GLOBAL max_connections = 10")
            until(take_all, "each connection is taken")

    def take_all() -> bool:
        mariadb.end_connections()
        with suppress(OSError, DatabaseError, Exception):
            while len(taken) < 10:
                taken.append(mariadb.connect())
        return len(taken) >= 10

    def end() -> None:
        if fault == "restarted":
            mariadb.start()
        for item in taken:
            item.close()
        mariadb.execute("SET GLOBAL read_only = 0", "SET GLOBAL max_connections = 151")

    flow, said = run_through(start, tmp_path, begin, end, **mariadb.settings())
    assert ran(tmp_path) == ["first", "wait_for_file", "last"]
    assert flow["done"] == 3
    assert "Flow" in said
