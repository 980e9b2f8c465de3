"""The heartbeat: one thread a process renews leases and writes progress, come what may."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from django.db import OperationalError, connections

from ebbs_and_flows import ExecutionContext, FlowRunner, FlowStatus, FlowTemplate, task
from ebbs_and_flows.heartbeat import Heartbeat, WatchedRun
from ebbs_and_flows.models import FlowExecution
from ebbs_and_flows.repository import FlowRepository

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
            with heart.watch(FlowRepository(), Run()):  # type: ignore[arg-type]
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


@pytest.mark.parametrize(
    "said",
    [("x",), (None,), (float("nan"),), (1, "ten"), (1, 2, None), (object(),), (True,)],
    ids=["text", "None", "NaN", "total", "message", "object", "bool"],
)
def test_progress_that_cannot_be_shown_is_one_sentence(
    runner: FlowRunner, said: tuple[Any, ...]
) -> None:
    def count(context: ExecutionContext) -> ExecutionContext:
        context.progress(*said)
        return context

    schedule(runner, count)
    flow = runner.run_flow()
    assert flow is not None
    (attempt,) = flow.task_executions.all()
    assert attempt.error_type == "InvalidArgument"
    assert "progress" in attempt.output.splitlines()[0]


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
