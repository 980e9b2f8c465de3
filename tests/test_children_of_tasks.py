"""The processes that tasks start: they never act for the worker, and end when they are told to."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from django.db import connections

from ebbs_and_flows import FlowStatus, flow_runner
from ebbs_and_flows.child_processes import NoFork, SameProcess
from ebbs_and_flows.integrity import IntegrityCheck
from ebbs_and_flows.models import FlowExecution
from ebbs_and_flows.presence import Presence

from .databases import FLOWS
from .shop.flows import FORKS
from .test_cluster import Start as StartCluster
from .test_cluster import environment, start_cluster  # noqa: F401
from .test_command_processes import Start, log, start, until  # noqa: F401

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.processes]

EXIT_CODES = {"returns": 0, "exits": 7, "raises": 1, "closes": 0, "queries": 9}


@pytest.fixture
def broker() -> str:
    return "orm"


def schedule_forks(folder: Path) -> dict[int, int]:
    """Schedule a flow for each form of task and each end of a child; return their exit codes."""
    return {
        flow_runner.schedule_flow(template, {"folder": str(folder), "child": child}).pk: code
        for template in FORKS
        for child, code in EXIT_CODES.items()
    }


def check_forks(expected: dict[int, int], folder: Path) -> None:
    flows = FlowExecution.objects.filter(pk__in=expected)
    assert {flow.status for flow in flows} == {FlowStatus.SUCCEEDED}
    assert {flow.pk: flow.execution_context["exit_code"] for flow in flows} == expected
    # Each task ran once, and no child went on as a second worker.
    assert set(Counter(log(folder)).values()) == {1}
    assert list(IntegrityCheck().findings()) == []


def are_finished(expected: dict[int, int]) -> bool:
    return not FlowExecution.objects.filter(pk__in=expected, finished_at=None).exists()


def test_i3_a_forked_child_of_a_task_never_writes_for_its_worker(
    start: Start,  # noqa: F811
    tmp_path: Path,
) -> None:
    expected = schedule_forks(tmp_path)
    process = start("--watch")
    until(lambda: are_finished(expected), "the flows", 90)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "ValueError: only in the child" in err
    # The worker's own connection has outlived those of its children.
    assert "does not answer" not in err
    check_forks(expected, tmp_path)


def test_i3_a_forked_child_never_writes_for_the_worker_of_a_cluster(
    start_cluster: StartCluster,  # noqa: F811
    tmp_path: Path,
) -> None:
    expected = schedule_forks(tmp_path)
    start_cluster()
    until(lambda: are_finished(expected), "the flows", 90)
    check_forks(expected, tmp_path)


@pytest.mark.parametrize("arguments", [["--watch"], ["--watch", "--workers", "2"]])
def test_processes_and_pools_of_a_task_end_at_terminate(
    start: Start,  # noqa: F811
    tmp_path: Path,
    arguments: list[str],
) -> None:
    flow = flow_runner.schedule_flow("shop-children", {"folder": str(tmp_path)})
    process = start(*arguments)
    until(lambda: are_finished({flow.pk: 0}), "the flow")
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    flow.refresh_from_db()
    assert flow.status == FlowStatus.SUCCEEDED
    assert flow.execution_context["exit_code"] == -signal.SIGTERM


class BusyPresence(Presence):
    """A thread of a worker that uses the database all the time."""

    def beat(self) -> float:
        self._show()
        connections.close_all()
        return 0.0


def fork() -> int:
    """Fork a child that uses the database, and return how it ended."""
    with SameProcess():
        child = os.fork()
        if child:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        signal.alarm(20)
        FlowExecution.objects.using(FLOWS).exists()
    raise AssertionError("a child goes on")


def test_a_forked_child_inherits_no_lock_of_a_worker_s_own_thread() -> None:
    with BusyPresence():
        for number in range(60):
            assert fork() == 0, number


def test_a_fork_waits_for_a_long_statement_only_for_a_while() -> None:
    with NoFork():
        # It must not wait for itself.
        assert fork() == 0
    until_forked: list[int] = []

    class StuckPresence(Presence):
        def beat(self) -> float:
            is_stuck.append(True)
            while not until_forked:
                time.sleep(0.01)
            return 60.0

    is_stuck: list[bool] = []
    with StuckPresence():
        until(lambda: bool(is_stuck), "the thread")
        until_forked.append(fork())
    assert until_forked == [0]
