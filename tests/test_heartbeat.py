"""The heartbeat: one thread a process renews leases and writes progress, come what may."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from django.db import OperationalError, connections

from ebbs_and_flows import ExecutionContext, FlowRunner, FlowStatus, FlowTemplate, task
from ebbs_and_flows.heartbeat import Heartbeat, WatchedRun
from ebbs_and_flows.models import FlowExecution
from ebbs_and_flows.repository import FlowRepository
from ebbs_and_flows.service import FlowService

from .databases import connection

pytestmark = pytest.mark.django_db(transaction=True)


def eventually(condition: Callable[[], Any], seconds: float = 20) -> bool:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def lease(flow: FlowExecution) -> Any:
    return FlowExecution.objects.values_list("lease_expires_at", flat=True).get(pk=flow.pk)


def schedule(runner: FlowRunner, body: Callable[..., Any]) -> FlowExecution:
    runner.register_flow_template(FlowTemplate("long", tasks=[task(name="long")(body)]))
    return runner.schedule_flow("long")


def beats() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "flow-heartbeat"]


def test_many_runs_that_begin_at_once_share_one_thread_and_none_is_forgotten(
    request: pytest.FixtureRequest,
) -> None:
    request.addfinalizer(partial(sys.setswitchinterval, sys.getswitchinterval()))
    sys.setswitchinterval(1e-6)

    class Run:
        task_execution_id = 1

    for _ in range(50):
        heart, before = Heartbeat(), len(beats())
        barrier, go = threading.Barrier(8), threading.Event()

        def watch(heart: Heartbeat = heart, go: Any = go, barrier: Any = barrier) -> None:
            barrier.wait(10)
            with heart.watch(FlowService(), Run()):  # type: ignore[arg-type]
                barrier.wait(10)
                go.wait(10)

        threads = [threading.Thread(target=watch) for _ in range(7)]
        for thread in threads:
            thread.start()
        barrier.wait(10)
        barrier.wait(10)
        assert len(heart._runs) == 7
        assert len(beats()) == before + 1
        go.set()
        for thread in threads:
            thread.join()
        assert not heart._runs


def test_a_beat_that_fails_in_any_way_is_followed_by_the_next(
    runner: FlowRunner, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.EBBS_AND_FLOWS = {"LEASE_SECONDS": 2}
    errors: list[Exception] = [OperationalError("gone"), ValueError("a driver's own")]
    real = WatchedRun.beat

    def beat(watched: WatchedRun) -> None:
        if errors:
            raise errors.pop(0)
        real(watched)

    monkeypatch.setattr(WatchedRun, "beat", beat)

    def wait(context: ExecutionContext) -> ExecutionContext:
        first = lease(flow)
        return context.with_entries(renewed=eventually(lambda: lease(flow) != first))

    flow = schedule(runner, wait)
    runner.run_flow()
    assert errors == []
    assert FlowExecution.objects.get().execution_context["renewed"] is True


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_has_a_heartbeat_of_its_own(runner: FlowRunner, settings: Any) -> None:
    settings.EBBS_AND_FLOWS = {"LEASE_SECONDS": 2}

    def wait(context: ExecutionContext) -> ExecutionContext:
        first = lease(flow)
        renewed = eventually(lambda: lease(flow) != first)
        return context.with_entries(renewed=renewed, process=os.getpid())

    # The parent has its thread, which a fork does not copy.
    runner.register_flow_template(FlowTemplate("short", tasks=[task(name="s")(lambda c: c)]))
    runner.run_flow_execution(runner.schedule_flow("short"))
    assert beats()
    flow = schedule(runner, wait)
    connections.close_all()
    child = os.fork()
    if not child:
        try:
            runner.run_flow()
            connections.close_all()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    context = FlowExecution.objects.get(pk=flow.pk).execution_context
    assert dict(context) == {"renewed": True, "process": child}


def test_progress_is_written_and_renews_the_lease(runner: FlowRunner) -> None:
    def count(context: ExecutionContext) -> ExecutionContext:
        first = lease(flow)
        context.progress(3, 10, "a\x00 <b> \ud800")
        assert eventually(lambda: FlowExecution.objects.get(pk=flow.pk).task_progress)
        # Long before the heartbeat would have renewed it.
        assert lease(flow) != first
        said = json.loads(FlowExecution.objects.get(pk=flow.pk).task_progress)
        return context.with_entries(said=said)

    flow = schedule(runner, count)
    runner.run_flow()
    ended = FlowExecution.objects.get()
    assert ended.status == FlowStatus.SUCCEEDED
    (attempt,) = ended.task_executions.all()
    assert ended.execution_context["said"] == {
        "task_execution": attempt.pk,
        "done": 3,
        "total": 10,
        "message": "a\\x00 <b> \\ud800",
    }


def test_progress_is_written_once_a_second_at_most(
    runner: FlowRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    real = FlowRepository.report_progress

    def report(self: FlowRepository, run: Any, progress: str, lease: Any) -> bool:
        written.append(progress)
        return real(self, run, progress, lease)

    monkeypatch.setattr(FlowRepository, "report_progress", report)
    took: list[float] = []

    def count(context: ExecutionContext) -> ExecutionContext:
        began = time.monotonic()
        for done in range(1000):
            context.progress(done, 1000)
        eventually(lambda: written)
        context.progress(1000, 1000)
        eventually(lambda: '"done": 1000' in written[-1])
        took.append(time.monotonic() - began)
        return context

    schedule(runner, count)
    runner.run_flow()
    assert '"done": 1000' in written[-1]
    assert len(written) <= 2 + took[0]


class Mute:
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    "said",
    [("x",), (None,), (float("nan"),), (1, "ten"), (10**5000,), (object(),), (True,), (Mute(),)],
    ids=["text", "None", "NaN", "total", "huge", "object", "bool", "mute"],
)
def test_progress_that_cannot_be_shown_is_a_warning_and_fails_no_task(
    runner: FlowRunner, said: tuple[Any, ...]
) -> None:
    def count(context: ExecutionContext) -> ExecutionContext:
        context.progress(*said)
        return context

    schedule(runner, count)
    flow = runner.run_flow()
    assert flow is not None
    (attempt,) = flow.task_executions.all()
    assert attempt.status == "SUCCEEDED"
    (line,) = map(json.loads, attempt.log.splitlines())
    assert line["level"] == "WARNING"
    assert line["message"].startswith("The progress cannot be shown")


def test_outside_of_a_task_progress_is_nothing_and_no_cancel_is_requested() -> None:
    context = ExecutionContext({"a": 1})
    context.progress(1, 2, "half")
    assert context.cancel_requested is False


@pytest.mark.parametrize("is_async", [False, True])
def test_a_task_learns_that_its_flow_is_to_be_cancelled(
    runner: FlowRunner, is_async: bool
) -> None:
    def look(context: ExecutionContext) -> ExecutionContext:
        before = context.cancel_requested
        cancel = threading.Thread(target=ask)
        cancel.start()
        cancel.join()
        # It is asked for at most once a second.
        after = eventually(lambda: context.cancel_requested)
        return context.with_entries(said=[before, after])

    def ask() -> None:
        try:
            runner.cancel_flow_execution(flow)
        finally:
            connections.close_all()

    async def alook(context: ExecutionContext) -> ExecutionContext:
        return look(context)

    flow = schedule(runner, alook if is_async else look)
    runner.run_flow()
    ended = FlowExecution.objects.get()
    assert ended.status == FlowStatus.CANCELLED
    assert ended.execution_context["said"] == [False, True]
    assert connection.is_usable()


# A claim that is lost


def elsewhere(action: Callable[[], Any]) -> None:
    """Do it over another connection, as another process would."""

    def act() -> None:
        try:
            action()
        finally:
            connections.close_all()

    thread = threading.Thread(target=act)
    thread.start()
    thread.join()


def take_back(runner: FlowRunner, flow: FlowExecution) -> None:
    """Let the lease expire and have another worker take the flow back."""
    past = runner.service.repository.now() - timedelta(seconds=1)
    FlowExecution.objects.filter(pk=flow.pk).update(lease_expires_at=past)
    assert runner.service.recover_expired() == 1


def lost_claims(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [text for text in caplog.messages if text.startswith("ClaimLost: ")]


@pytest.mark.parametrize("is_reporting", [False, True], ids=["silent", "reports progress"])
def test_i6_a_task_learns_that_its_worker_has_lost_the_claim(
    runner: FlowRunner, settings: Any, caplog: pytest.LogCaptureFixture, is_reporting: bool
) -> None:
    settings.EBBS_AND_FLOWS = {"LEASE_SECONDS": 2}
    seen: list[Any] = []

    def work_on(context: ExecutionContext) -> ExecutionContext:
        before = context.cancel_requested
        elsewhere(lambda: take_back(runner, flow))

        def is_told() -> bool:
            if is_reporting:
                context.progress(1)
            return context.cancel_requested

        seen.extend([before, eventually(is_told), lost_claims(caplog)])
        return context.with_entries(written="too late")

    flow = schedule(runner, work_on)
    caplog.set_level(logging.INFO, logger="ebbs_and_flows")
    runner.run_flow()
    before, after, logged = seen
    assert (before, after) == (False, True)
    # Once, and while the task was still running.
    assert logged == lost_claims(caplog)
    assert len(logged) == 1
    assert f"Flow {flow.pk} is no longer held under claim 1" in logged[0]
    assert "what it returned is thrown away" in caplog.text
    flow.refresh_from_db()
    assert (flow.status, dict(flow.execution_context)) == (FlowStatus.RESCHEDULED, {})


@pytest.mark.parametrize("is_atomic", [False, True])
def test_a_flow_that_is_deleted_while_it_runs_ends_that_run_and_no_more(
    runner: FlowRunner, settings: Any, caplog: pytest.LogCaptureFixture, is_atomic: bool
) -> None:
    settings.EBBS_AND_FLOWS = {"LEASE_SECONDS": 2}
    told: list[bool] = []

    def delete(context: ExecutionContext) -> ExecutionContext:
        if is_atomic:
            # Over another connection the deletion would wait for this transaction on SQLite.
            FlowExecution.objects.get(pk=flow.pk).delete()
        else:
            elsewhere(lambda: FlowExecution.objects.get(pk=flow.pk).delete())
            told.append(eventually(lambda: context.cancel_requested))
        return context

    flow = schedule(runner, delete)
    runner.register_flow_template(FlowTemplate("next", tasks=[task(name="n")(lambda c: c)]))
    following = runner.schedule_flow("next", priority=-1)
    ran = runner.run_next()
    assert told == ([] if is_atomic else [True])
    (logged,) = lost_claims(caplog)
    assert f"Flow {flow.pk} was deleted while it ran" in logged
    # The worker goes on with the next flow.
    assert ran is not None
    assert (ran.pk, ran.status) == (following.pk, FlowStatus.SUCCEEDED)


def test_the_end_of_a_run_is_not_mistaken_for_a_lost_claim(runner: FlowRunner) -> None:
    service = runner.service
    template = FlowTemplate("short", tasks=[task(name="s")(lambda c: c)])
    runner.register_flow_template(template)
    flow = runner.schedule_flow("short")
    run = service.claim_flow(flow, template, "a worker")
    assert run is not None
    attempt = run.task_execution_id
    assert service.succeed_step(run, {}, None) is False
    # The heartbeat comes when the step has just ended the flow.
    service.renew_lease(run, attempt)


# What a task asks the database never fails it


def end_connections() -> None:
    """Have the server end this process's other connections to the tests' database."""
    if connection.vendor == "postgresql":
        sql = (
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        with connection.cursor() as cursor:
            cursor.execute(sql)
    elif connection.vendor == "mysql":
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT id FROM information_schema.processlist"
                " WHERE db = DATABASE() AND id <> CONNECTION_ID()"
            )
            for (number,) in cursor.fetchall():
                cursor.execute(f"KILL {number}")


@pytest.mark.skipif("connection.vendor == 'sqlite'", reason="SQLite has no connection to lose")
@pytest.mark.parametrize("is_async", [False, True])
def test_a_task_that_asks_whether_it_is_cancelled_survives_a_lost_connection(
    runner: FlowRunner, is_async: bool
) -> None:
    def look(context: ExecutionContext) -> ExecutionContext:
        answers = [context.cancel_requested]
        for _ in range(2):
            elsewhere(end_connections)
            time.sleep(1.05)
            answers.append(context.cancel_requested)
        elsewhere(lambda: runner.cancel_flow_execution(flow))
        return context.with_entries(
            answers=answers, told=eventually(lambda: context.cancel_requested)
        )

    async def alook(context: ExecutionContext) -> ExecutionContext:
        return look(context)

    flow = schedule(runner, alook if is_async else look)
    ended = runner.run_flow()
    assert ended is not None
    assert [row.error_type for row in ended.task_executions.all()] == [""]
    assert dict(ended.execution_context) == {"answers": [False] * 3, "told": True}


def test_a_question_that_the_database_refuses_keeps_the_last_answer(
    runner: FlowRunner, caplog: pytest.LogCaptureFixture
) -> None:
    refused: list[str] = []

    def refuse(execute: Any, sql: str, parameters: Any, many: bool, context: Any) -> Any:
        if "cancel_requested" in sql and len(refused) < 1:
            refused.append(sql)
            raise OperationalError("the database system is shutting down")
        return execute(sql, parameters, many, context)

    def look(context: ExecutionContext) -> ExecutionContext:
        with connection.execute_wrapper(refuse):
            first = context.cancel_requested
            elsewhere(lambda: runner.cancel_flow_execution(flow))
            return context.with_entries(
                first=first, then=eventually(lambda: context.cancel_requested)
            )

    flow = schedule(runner, look)
    ended = runner.run_flow()
    assert ended is not None
    assert len(refused) == 1
    assert dict(ended.execution_context) == {"first": False, "then": True}
    assert "whether flow" in caplog.text


@pytest.mark.skipif("connection.vendor != 'postgresql'", reason="an error aborts a transaction")
@pytest.mark.parametrize("is_atomic", [False, True])
def test_a_question_that_is_refused_does_not_abort_the_transaction_of_an_atomic_task(
    runner: FlowRunner, is_atomic: bool
) -> None:
    def look(context: ExecutionContext) -> ExecutionContext:
        with connection.cursor() as cursor:
            # A role that may not read the flows.
            cursor.execute("SET ROLE pg_monitor")
            answer = context.cancel_requested
            cursor.execute("RESET ROLE")
        return context.with_entries(answer=answer)

    asks = task(name="long", atomic=is_atomic)(look)
    runner.register_flow_template(FlowTemplate("long", tasks=[asks]))
    runner.schedule_flow("long")
    ended = runner.run_flow()
    assert ended is not None
    assert (ended.status, dict(ended.execution_context)) == ("SUCCEEDED", {"answer": False})


@pytest.fixture
def watched(runner: FlowRunner) -> WatchedRun:
    """A run that a worker has just claimed, with a lease of 300 s."""
    template = runner.register_flow_template(FlowTemplate("long", tasks=[task(name="a")(id)]))
    run = runner.service.claim_flow(runner.schedule_flow("long"), template, "a worker")
    assert run is not None
    return WatchedRun(runner.service, run, timedelta(seconds=300))


def at_the_earliest(watched: WatchedRun, act: Callable[[], Any], seconds: float) -> bool:
    """Whether after the act the next beat is that many seconds away."""
    before = time.monotonic()
    act()
    return before + seconds <= watched.next_beat <= time.monotonic() + seconds


def test_i6_a_lease_is_renewed_three_times_before_it_ends(watched: WatchedRun) -> None:
    again = partial(
        watched.__init__,  # type: ignore[misc]
        watched.service,
        watched.run,
        timedelta(seconds=300),
    )
    assert at_the_earliest(watched, again, 100)
    assert at_the_earliest(watched, watched.beat, 100)


def test_i6_a_beat_that_failed_is_repeated_soon_and_reported_once(watched: WatchedRun) -> None:
    assert at_the_earliest(watched, watched.put_off, 1)
    assert watched.put_off() is None
    watched.beat()
    left = watched.put_off()
    assert left is not None
    assert 0 < left <= 300
    brief = WatchedRun(watched.service, watched.run, timedelta(seconds=3))
    assert at_the_earliest(brief, brief.put_off, 0.5)


def test_the_next_progress_waits_for_a_second_after_the_last(watched: WatchedRun) -> None:
    watched.report(1, None, "")
    assert watched.next_beat <= time.monotonic()
    watched.beat()
    assert not watched.has_news
    before = time.monotonic()
    watched.report(2, None, "")
    assert before < watched.next_beat <= before + 1


def test_a_fork_forgets_the_runs_of_any_heartbeat_and_the_thread_ends_with_its_process(
    watched: WatchedRun,
) -> None:
    heart = Heartbeat()
    heart.begin(watched)
    assert all(thread.daemon for thread in beats())
    pid = os.fork()
    if pid == 0:
        os._exit(1 if heart._runs or heart._is_beating else 0)
    assert os.waitpid(pid, 0)[1] == 0
    heart.end(watched)
    assert not heart._runs
