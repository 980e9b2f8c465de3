"""SIGTERM before each statement of a worker's housekeeping, and of its look for flows.

Recovery, dispatch, recurring flows, pruning: whatever the worker does when it is stopped, it ends
in order, nothing is half done, and the next worker does the rest.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from functools import partial
from itertools import count
from typing import Any

import pytest
from django.core.management import call_command
from django.db import connections
from django.db.backends.signals import connection_created

from ebbs_and_flows import ExecutionContext, FlowStatus, FlowTemplate, flow_runner, task
from ebbs_and_flows.engines import get_engine
from ebbs_and_flows.integrity import IntegrityCheck
from ebbs_and_flows.management.stopping import StopRequest
from ebbs_and_flows.models import FlowExecution, PacemakerBeat, TaskExecution, WorkerProcess
from ebbs_and_flows.pacemaker import Pacemaker
from ebbs_and_flows.testing import freeze_clock, move_clock

from .chaos.processes import in_a_process
from .databases import connection

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.processes]

DONE, NEVER_CAME = 0, 3
"""The exit codes of a worker that was stopped, and of one that makes no such statement."""
OLD = 2
"""How many flows are to be deleted."""
PACEMAKER, MAIN = "flow-pacemaker", "MainThread"


@task(name="first")
def first(context: ExecutionContext) -> ExecutionContext:
    return context.with_entries(first=context.attempt)


@task(name="last")
def last(context: ExecutionContext) -> ExecutionContext:
    return context.with_entries(last=context.attempt)


@pytest.fixture
def house(settings: Any) -> Iterator[None]:
    """The project's own runner, with a template whose old flows are deleted."""
    template = FlowTemplate("kept", tasks=[first, last], keep_days=1, cron="* * * * *")
    flow_runner.register_flow_template(template)
    flow_runner.register_flow_template(FlowTemplate("idle", tasks=[first]))
    yield
    for name in ("kept", "idle"):
        flow_runner._templates.pop(name)
    flow_runner._recurrences.clear()


def leave_work() -> FlowExecution:
    """Leave something to each duty; return the flow whose worker was lost."""
    FlowExecution.objects.all().delete()
    PacemakerBeat.objects.all().delete()
    WorkerProcess.objects.all().delete()
    for _ in range(OLD):
        flow_runner.run_flow_execution(flow_runner.schedule_flow("kept"))
    move_clock(timedelta(days=2))
    template = flow_runner.get_flow_template("kept")
    lost = flow_runner.schedule_flow("kept")
    assert flow_runner.service.claim_flow(lost, template, "lost") is not None
    move_clock(timedelta(hours=1))
    # One that was due later, and is due now.
    later = flow_runner.service.repository.now() + timedelta(hours=1)
    flow_runner.schedule_flow("kept", run_at=later)
    move_clock(timedelta(hours=1, seconds=1))
    engine = get_engine()
    engine.sync_recurring({})
    with freeze_clock(flow_runner.service.repository.now() - timedelta(minutes=1)):
        engine.sync_recurring(flow_runner.recurrences)
    return lost


class Stop:
    """Sends SIGTERM to this process at the n-th statement of one of its threads."""

    def __init__(self, thread: str, number: int, seconds: float) -> None:
        self.done = False
        self.left = number
        self._thread, self._seconds = thread, seconds
        connection_created.connect(self._watch)

    def _watch(self, connection: Any, **_: Any) -> None:
        if threading.current_thread().name == self._thread:
            connection.execute_wrappers.append(self._at)
            # A commit is no statement to Django's wrappers.
            connection._commit = partial(self._at, connection._commit)

    def _at(self, act: Callable[..., Any], *given: Any) -> Any:
        self.left -= 1
        if not self.left:
            self.done = True
            # A worker that has only just begun has no handler yet, and is ended by the signal.
            while signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(self._seconds)
        return act(*given)


def work(command: str, thread: str, number: int, seconds: float) -> int:
    """Be a worker that is stopped there, or later if it makes no such statement."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    stop = Stop(thread, number, seconds)

    def or_end(method: Callable[..., Any]) -> Callable[..., Any]:
        rounds = 0

        def act(*given: Any) -> Any:
            nonlocal rounds
            if rounds and stop.left > 0:
                stop.left = 0
                os.kill(os.getpid(), signal.SIGTERM)
            rounds += 1
            return method(*given)

        return act

    # The second call begins a round in which nothing is left to be done.
    if thread == PACEMAKER:
        Pacemaker.beat = or_end(Pacemaker.beat)  # type: ignore[method-assign]
    else:
        StopRequest.wait = or_end(StopRequest.wait)  # type: ignore[method-assign]
    try:
        call_command(*command.split())
    except SystemExit as ended:
        if ended.code:
            return int(ended.code)
    return DONE if stop.done else NEVER_CAME


def check(lost: FlowExecution, *, left_in_order: bool) -> None:
    """Nothing is half done; what is left is done by the next worker."""
    assert list(IntegrityCheck().findings()) == []
    for flow in FlowExecution.objects.exclude(pk__gte=lost.pk):
        # Deleted altogether, or not at all.
        assert flow.task_executions.count() == len(flow.execution_context) == 2
    if left_in_order:
        assert not WorkerProcess.objects.exists()
    PacemakerBeat.objects.all().delete()
    Pacemaker(flow_runner).beat()
    while flow_runner.run_next() is not None:
        pass
    assert list(IntegrityCheck().findings()) == []
    flows = FlowExecution.objects.all()
    assert not flows.filter(pk__lt=lost.pk).exists()
    assert set(flows.values_list("status", flat=True)) == {FlowStatus.SUCCEEDED}
    attempts = TaskExecution.objects.filter(flow_execution=lost.pk, task_name="first")
    assert list(attempts.order_by("attempt").values_list("status", "error_type")) == [
        ("FAILED", "TaskInterrupted"),
        ("SUCCEEDED", ""),
    ]
    others = TaskExecution.objects.exclude(flow_execution=lost.pk)
    assert set(others.values_list("attempt", flat=True)) == {1}


FOREGROUND = "ebbs_and_flows.engines.foreground.ForegroundEngine"
DJANGO_TASKS = "ebbs_and_flows.engines.django_tasks.DjangoTasksEngine"


@pytest.mark.parametrize(
    ("engine", "command", "thread", "numbers", "is_left"),
    [
        (
            DJANGO_TASKS,
            "withpacemaker runflows --watch --template idle",
            PACEMAKER,
            count(3, 8),
            False,
        ),
        # The main thread runs no flows here, which would wait for what the other one has locked.
        (FOREGROUND, "runflows --watch --template idle", PACEMAKER, count(1, 4), True),
        # What it does after that is to run flows.
        (FOREGROUND, "runflows --watch", MAIN, range(1, 16, 5), False),
    ],
    ids=["finished", "left", "main thread"],
)
def test_i1_i2_a_stop_at_any_statement_of_the_housekeeping_leaves_nothing_half_done(
    house: None,
    settings: Any,
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
    command: str,
    thread: str,
    numbers: Iterable[int],
    is_left: bool,
) -> None:
    """Also where a statement takes too long, so that the process ends in the middle."""
    settings.EBBS_AND_FLOWS = {"ENGINE": engine, "PACEMAKER_SECONDS": 0.1}
    if is_left:
        monkeypatch.setattr("ebbs_and_flows.presence._LONGEST_LEAVE", 0.05)
        if connection.vendor == "sqlite":
            monkeypatch.setitem(connection.settings_dict["OPTIONS"], "timeout", 0.05)
    stopped = 0
    for number in numbers:
        lost = leave_work()
        connections.close_all()
        seconds = 3600 if is_left else 0.05
        code = in_a_process(partial(work, command, thread, number, seconds))
        if code == NEVER_CAME:
            break
        assert code == DONE, f"statement {number}"
        check(lost, left_in_order=not is_left)
        stopped += 1
    assert stopped > 2
