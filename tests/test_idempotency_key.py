"""The key by which an outside system tells a repeated call: what it is made of, and its mark."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.core.management import call_command
from django.db import connections, models, transaction
from django.db.models import F
from django.test import Client, TestCase
from django.test.utils import CaptureQueriesContext

from ebbs_and_flows import (
    ExecutionContext,
    FlowRunner,
    FlowStatus,
    FlowTemplate,
    Task,
    TaskStatus,
    task,
)
from ebbs_and_flows.exceptions import ClaimLost, InvalidArgument
from ebbs_and_flows.models import FlowExecution, TaskExecution
from ebbs_and_flows.testing import run_flow

from .databases import FLOWS, connection
from .operators import billing, failed, registered

ROOT = Path(__file__).parent.parent

Body = Callable[[ExecutionContext], object]


class Charge(Task):
    """A task that keeps the keys it reads, and fails as often as it is told."""

    def __init__(self, *, fails: int = 0, body: Body | None = None, atomic: bool = False) -> None:
        super().__init__(name="charge")
        self.atomic = atomic  # type: ignore[misc]
        self.keys: list[str] = []
        self._fails = fails
        self._body = body

    def run(self, context: ExecutionContext) -> ExecutionContext:
        if self._body is not None:
            self._body(context)
        self.keys.append(context.idempotency_key)
        if len(self.keys) <= self._fails:
            raise ConnectionError("the bank is away")
        return context


@task
def other(context: ExecutionContext) -> ExecutionContext:
    return context


@task
def broken(context: ExecutionContext) -> ExecutionContext:
    raise ValueError("no")


@task(name="first")
def first(context: ExecutionContext) -> ExecutionContext:
    return context


def runner_of(*tasks: Task) -> FlowRunner:
    """Return the code of one release."""
    runner = FlowRunner()
    runner.register_flow_template(FlowTemplate("billing", tasks=tasks))
    return runner


def key_of(flow: FlowExecution) -> str:
    """Return the key of the flow's task."""
    context = ExecutionContext.from_stored({}, token=flow.token, task_name="charge")
    return context.idempotency_key


def is_marked(flow: FlowExecution, attempt: int = 1) -> bool:
    row = TaskExecution.objects.get(flow_execution=flow, task_name="charge", attempt=attempt)
    return bool(row.used_idempotency_key)


# What it is made of


@pytest.mark.django_db
def test_a_deploy_that_puts_a_task_before_the_failed_one_keeps_its_key() -> None:
    charge = Charge(fails=1)
    before, after = runner_of(first, charge), runner_of(first, other, charge)
    flow = before.run_flow_execution(before.schedule_flow("billing"))
    after.run_flow_execution(after.reschedule_flow_execution(flow))
    assert len(charge.keys) == 2
    assert len(set(charge.keys)) == 1


DEPLOYS = {
    "insert": ["1: first charge", "1: first other charge"],
    "move": ["1: first charge other", "2: first other charge"],
    "remove": ["1: first charge other", "2: first broken charge", "3: first charge"],
    "remove a completed task and roll back": [
        "1: first other charge",
        "2: first charge",
        "3: first other charge",
    ],
    "roll back": ["2: first charge", "1: first other charge"],
}
"""Releases one after the other: a version, and the names of the tasks."""


@pytest.mark.django_db
@pytest.mark.parametrize("releases", DEPLOYS.values(), ids=list(DEPLOYS))
def test_no_deploy_changes_the_key_of_a_failed_task(releases: list[str]) -> None:
    charge = Charge(fails=1)
    tasks: dict[str, Task] = {"first": first, "other": other, "broken": broken, "charge": charge}
    flow, last_version = None, 0
    for release in releases:
        version, names = release.split(":")
        template = FlowTemplate(
            "billing", tasks=[tasks[name] for name in names.split()], version=int(version)
        )
        runner = FlowRunner()
        runner.register_flow_template(template)
        if flow is None:
            flow = runner.schedule_flow("billing")
        elif template.version < last_version:
            assert runner.service.adopt_plan(template, reason="rolled back") == 1
        last_version = template.version
        if flow.status == FlowStatus.FAILED:
            runner.reschedule_flow_execution(flow)
        flow = runner.run_flow_execution(flow)
    assert flow is not None
    assert flow.status == FlowStatus.SUCCEEDED
    assert charge.keys == [key_of(flow)] * 2


@pytest.mark.django_db
@pytest.mark.parametrize(
    "tasks", [("charge",), ("charge", "first"), ("other", "first", "charge", "other2")]
)
def test_the_place_of_a_task_is_no_part_of_its_key(tasks: tuple[str, ...]) -> None:
    # A fork of a removed or moved task starts where the task is now.
    charge = Charge()
    names = [charge if name == "charge" else task(name=name)(other.function) for name in tasks]
    runner = runner_of(*names)
    flow = runner.run_flow_execution(runner.schedule_flow("billing"))
    assert charge.keys == [key_of(flow)]


@pytest.mark.django_db
def test_a_fork_and_a_second_flow_have_keys_of_their_own() -> None:
    charge = Charge()
    runner = runner_of(charge)
    flow = runner.run_flow_execution(runner.schedule_flow("billing"))
    runner.run_flow_execution(runner.fork_flow_execution(flow))
    runner.run_flow_execution(runner.schedule_flows("billing", [{}])[0])
    assert len(set(charge.keys)) == 3


KEYS = """
import django, sys
django.setup()
from django.core.management import call_command
call_command("migrate", verbosity=0)
from ebbs_and_flows import ExecutionContext, FlowTemplate, flow_runner, task
@task
def charge(context):
    return context
flow_runner.register_flow_template(FlowTemplate("billing", tasks=[charge]))
for flow in flow_runner.schedule_flows("billing", [{}] * 5000):
    context = ExecutionContext.from_stored({}, token=flow.token, task_name="charge")
    print(context.idempotency_key)
"""


@pytest.mark.processes
@pytest.mark.one_database
def test_two_databases_migrated_from_empty_have_no_key_in_common(tmp_path: Path) -> None:
    found: list[str] = []
    for name in ("production", "staging"):
        done = subprocess.run(
            [sys.executable, "-c", KEYS],
            env={
                **os.environ,
                "DJANGO_SETTINGS_MODULE": "tests.settings",
                "EBBS_TEST_DATABASE": "sqlite",
                "EBBS_TEST_DATABASE_NAME": str(tmp_path / name),
                "EBBS_TEST_FLOWS_NAME": str(tmp_path / f"{name}-flows"),
                "EBBS_TEST_ROUTER": "",
                "PYTHONPATH": str(ROOT),
            },
            capture_output=True,
            text=True,
            check=True,
        )
        found += done.stdout.split()
    assert len(found) == len(set(found)) == 10_000


@pytest.mark.django_db
def test_a_flow_of_a_restored_dump_has_the_key_that_it_had() -> None:
    charge = Charge(fails=2)
    runner = runner_of(charge)
    flow = runner.run_flow_execution(runner.schedule_flow("billing"))
    dump = io.StringIO()
    call_command("dumpdata", "ebbs_and_flows", database=FLOWS, stdout=dump)
    # The dump is older than this attempt.
    runner.run_flow_execution(runner.reschedule_flow_execution(flow))
    FlowExecution.objects.all().delete()
    for row in json.loads(dump.getvalue()):
        restored = _model(row["model"])(pk=row["pk"])
        for field, value in row["fields"].items():
            column = restored._meta.get_field(field)
            setattr(restored, column.attname, column.to_python(value))
        restored.save(using=FLOWS, force_insert=True)
    runner.run_flow_execution(runner.reschedule_flow_execution(flow.pk))
    assert len(charge.keys) == 3
    assert len(set(charge.keys)) == 1


def _model(label: str) -> type[models.Model]:
    from django.apps import apps

    return apps.get_model(label)


@pytest.mark.parametrize("name", ["Überweisung", "a b", "x" * 200, "naïve\u200b"])
def test_a_key_fits_a_header_and_a_column_of_the_other_side(name: str) -> None:
    key = ExecutionContext.from_stored({}, token="5e" * 16, task_name=name).idempotency_key
    assert re.fullmatch("[0-9a-f]{32}", key)


def test_outside_of_a_task_there_is_no_key() -> None:
    assert ExecutionContext({"a": 1}).idempotency_key == ""
    assert ExecutionContext({"a": 1}).idempotency_key_for(7) == ""


# Several calls in one task


def task_context(name: str = "charge") -> ExecutionContext:
    return ExecutionContext.from_stored({}, token="5e" * 16, task_name=name)


def test_each_call_has_a_key_that_no_release_changes() -> None:
    key = task_context().idempotency_key_for("charge", 7)
    assert key == "0a73d340d8a5216c398f76015bc0d70b"
    assert key == task_context().copy().idempotency_key_for("charge", 7)


def test_calls_that_differ_have_keys_that_differ() -> None:
    number = uuid.UUID(int=1)
    parts: list[tuple[object, ...]] = [
        *[(1,), ("1",), (Decimal(1),), (number,), (str(number),)],
        *[(date(2026, 1, 1),), ("2026-01-01",), ("a", "b"), ("ab",), ("a,b",), ("a",)],
    ]
    keys = {task_context().idempotency_key_for(*each) for each in parts}
    keys.add(task_context().idempotency_key)
    keys |= {task_context("refund").idempotency_key_for(1)}
    assert len(keys) == len(parts) + 2


@pytest.mark.parametrize("parts", [(), (1.5,), (True,), (None,), (object(),), ([1],)])
def test_what_has_no_lasting_text_is_no_part_of_a_key(parts: tuple[object, ...]) -> None:
    with pytest.raises(InvalidArgument, match=r"idempotency_key_for\(\)"):
        task_context().idempotency_key_for(*parts)


# The mark


@pytest.mark.django_db
def test_only_an_attempt_that_read_its_key_is_marked() -> None:
    charge = Charge(fails=1)
    runner = runner_of(first, charge)
    flow = runner.run_flow_execution(runner.schedule_flow("billing"))
    unmarked = TaskExecution.objects.get(flow_execution=flow, task_name="first")
    assert not unmarked.used_idempotency_key
    assert is_marked(flow)


@pytest.mark.django_db
def test_the_mark_costs_one_statement_however_often_the_key_is_read() -> None:
    def statements(body: Body) -> int:
        runner = runner_of(task(name="reader")(lambda c: (body(c), c)[1]))  # type: ignore[arg-type, return-value]
        flow = runner.schedule_flow("billing")
        with CaptureQueriesContext(connection) as captured:
            runner.run_flow_execution(flow)
        return len(captured)

    def read(context: ExecutionContext) -> None:
        for copied in (context, context.copy(), context.with_entries(a=1)):
            assert copied.idempotency_key
            assert copied.idempotency_key_for(3)

    assert statements(read) == statements(lambda context: None) + 1


@pytest.mark.django_db
def test_a_key_that_is_read_after_the_attempt_marks_nothing() -> None:
    seen: list[ExecutionContext] = []
    runner = runner_of(task(name="charge")(lambda c: (seen.append(c), c)[1]))  # type: ignore[func-returns-value]
    flow = runner.run_flow_execution(runner.schedule_flow("billing"))
    assert seen[0].idempotency_key == key_of(flow)
    assert not is_marked(flow)


@pytest.mark.django_db(transaction=True)
def test_i6_a_worker_that_lost_its_claim_gets_no_key() -> None:
    def lose_claim(context: ExecutionContext) -> None:
        flows = FlowExecution.objects.filter(pk=context.flow_execution_id)
        flows.update(claim=F("claim") + 1)

    charge = Charge(body=lose_claim)
    runner = runner_of(charge)
    flow = runner.run_flow_execution(runner.schedule_flow("billing"))
    assert charge.keys == []
    assert not is_marked(flow)


@pytest.mark.django_db(transaction=True)
def test_i6_the_claim_that_is_lost_is_told_to_the_task() -> None:
    errors: list[BaseException] = []

    def lose_claim(context: ExecutionContext) -> None:
        flows = FlowExecution.objects.filter(pk=context.flow_execution_id)
        flows.update(claim=F("claim") + 1)
        try:
            assert context.idempotency_key
        except ClaimLost as error:
            errors.append(error)
            raise

    runner = runner_of(Charge(body=lose_claim))
    runner.run_flow_execution(runner.schedule_flow("billing"))
    assert len(errors) == 1


@pytest.mark.django_db(transaction=True)
def test_the_mark_outlives_what_an_atomic_task_rolls_back() -> None:
    charge = Charge(fails=1, atomic=True)
    runner = runner_of(charge)
    flow = runner.run_flow_execution(runner.schedule_flow("billing"))
    # On SQLite the task itself is the only writer.
    assert is_marked(flow) is (connection.vendor != "sqlite")
    runner.run_flow_execution(runner.reschedule_flow_execution(flow))
    assert is_marked(flow, attempt=2)
    assert len(set(charge.keys)) == 1


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("atomic", [False, True])
def test_an_async_task_reads_its_key(atomic: bool) -> None:
    keys: list[str] = []

    @task(name="charge", atomic=atomic)
    async def charge(context: ExecutionContext) -> ExecutionContext:
        keys.append(context.idempotency_key)
        return context

    runner = runner_of(charge)
    flow = runner.run_flow_execution(runner.schedule_flow("billing"))
    assert keys == [key_of(flow)]
    assert is_marked(flow)


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("is_async", [False, True])
def test_a_key_is_marked_in_the_middle_of_a_transaction_of_the_tasks_own(is_async: bool) -> None:
    seen: list[bool] = []

    def look(flow_id: int | None) -> None:
        seen.append(TaskExecution.objects.get(flow_execution=flow_id).used_idempotency_key)
        connections.close_all()

    def read(context: ExecutionContext) -> ExecutionContext:
        with transaction.atomic(using=FLOWS):
            assert context.idempotency_key
            thread = threading.Thread(target=look, args=[context.flow_execution_id])
            thread.start()
            thread.join()
        return context

    async def read_in_thread(context: ExecutionContext) -> ExecutionContext:
        return await sync_to_async(read)(context)

    charge = task(name="charge")(read_in_thread if is_async else read)
    runner = runner_of(charge)
    flow = runner.run_flow_execution(runner.schedule_flow("billing"))
    assert [row.output for row in flow.task_executions.all()] == [""]
    assert is_marked(flow)
    # On SQLite the task itself is the only writer.
    assert seen == [connection.vendor != "sqlite"]


class WithinATest(TestCase):
    """The transaction of a project's `TestCase`, into which no other connection can look."""

    def check(self, body: Any, *, atomic: bool = False) -> None:
        runner = runner_of(task(name="charge", atomic=atomic)(body))
        run = run_flow("billing", runner=runner).assert_succeeded()
        assert run.context["key"] == key_of(run.flow)
        assert is_marked(run.flow)

    def test_a_task_reads_its_key(self) -> None:
        def read(context: ExecutionContext) -> ExecutionContext:
            return context.with_entries(key=context.idempotency_key)

        self.check(read)
        self.check(read, atomic=True)

    def test_an_asynchronous_task_reads_its_key(self) -> None:
        async def read(context: ExecutionContext) -> ExecutionContext:
            return context.with_entries(key=context.idempotency_key)

        self.check(read)
        self.check(read, atomic=True)

    def test_a_thread_of_a_task_reads_its_key(self) -> None:
        def read(context: ExecutionContext) -> ExecutionContext:
            keys: list[str] = []
            thread = threading.Thread(target=lambda: keys.append(context.idempotency_key))
            thread.start()
            thread.join()
            return context.with_entries(key=keys[0])

        self.check(read)


@pytest.mark.django_db(transaction=True)
def test_a_connection_that_is_lost_costs_the_task_no_key() -> None:
    if connection.vendor == "sqlite":
        pytest.skip("A file has no connection to lose.")

    def cut(context: ExecutionContext) -> None:
        raw = connection.connection
        postgresql = connection.vendor == "postgresql"
        number = raw.info.backend_pid if postgresql else raw.thread_id()

        def end_it() -> None:
            sql = "SELECT pg_terminate_backend(%s)" if postgresql else "KILL CONNECTION %s"
            with connections[FLOWS].cursor() as cursor:
                cursor.execute(sql, [number])
            connections.close_all()

        thread = threading.Thread(target=end_it)
        thread.start()
        thread.join()

    charge = Charge(body=cut)
    runner = runner_of(charge)
    flow = runner.run_flow_execution(runner.schedule_flow("billing"))
    assert charge.keys == [key_of(flow)]
    attempt = TaskExecution.objects.get(flow_execution=flow)
    assert (attempt.status, attempt.used_idempotency_key) == (TaskStatus.SUCCEEDED, True)


@pytest.mark.django_db(transaction=True)
def test_a_worker_that_is_killed_just_after_has_left_its_mark() -> None:
    flow = runner_of(Charge()).schedule_flow("billing")
    connections.close_all()
    pid = os.fork()
    if not pid:
        try:
            charge = Charge(
                body=lambda c: (c.idempotency_key, os.kill(os.getpid(), signal.SIGKILL))
            )
            runner_of(charge).run_flow_execution(flow.pk)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert is_marked(flow)


# Shown


@pytest.mark.django_db(transaction=True)
def test_the_token_is_shown_nowhere_and_the_mark_in_words(
    admin_client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    with registered(billing()):
        flow = failed()
        base = "/admin/ebbs_and_flows/flowexecution/"
        page = f"{base}{flow.pk}/change/"
        words = "The task has read its idempotency key"
        assert words not in admin_client.get(page).content.decode()
        flow.task_executions.update(used_idempotency_key=True)
        assert words in admin_client.get(page).content.decode()
        attempt = flow.task_executions.latest("pk").pk
        attempts = f"/admin/ebbs_and_flows/taskexecution/{attempt}/change/"
        for address in (base, page, attempts, f"{base}{flow.pk}/delete/"):
            answer = admin_client.get(address, follow=True)
            assert answer.status_code == 200, address
            assert flow.token not in answer.content.decode(), address
        for arguments in (["showflows"], ["showflows", "--json"]):
            call_command(*arguments)
            shown = capsys.readouterr().out
            assert "billing" in shown
            assert flow.token not in shown
