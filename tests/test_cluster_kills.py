"""A cluster any of whose processes is killed works on, and stops when it is told to.

`EBBS_TEST_KILLS` is how often each process is killed; `make kill-cluster` kills each 20 times.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from django.db.models import F

from ebbs_and_flows import FlowStatus
from ebbs_and_flows.models import FlowExecution, WorkerProcess

from . import cluster_processes as processes
from .test_cluster import (
    Start,
    all_ended,
    assert_nothing_was_repeated,
    broker,
    environment,
    running_worker,
    schedule,
    start_cluster,
    started_tasks,
    until,
)

__all__ = ["broker", "environment", "start_cluster"]

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.processes,
    pytest.mark.skipif(sys.platform != "linux", reason="finds the processes by /proc"),
]

KILLS = int(os.environ.get("EBBS_TEST_KILLS", "1"))
LEASE = 30
"""Seconds; the default."""


def found(cluster: subprocess.Popen[str], role: str) -> int:
    """Return the process of an idle cluster that has a role, as soon as there is one."""
    seen: list[int] = []

    def is_there() -> bool:
        seen[:] = [pid for pid in [processes.find(cluster.pid, role)] if pid is not None]
        return bool(seen)

    until(is_there, f"the {role}")
    return seen[0]


def ready(cluster: subprocess.Popen[str]) -> None:
    """Wait until all of a cluster's processes live and its workers are idle."""
    found(cluster, "pusher")
    found(cluster, "reader")
    until(lambda: WorkerProcess.objects.count() >= 2, "the workers")


def assert_due_flows_were_met() -> None:
    late = FlowExecution.objects.filter(started_at__gt=F("run_at") + timedelta(seconds=LEASE + 2))
    assert not late.exists()


@pytest.mark.parametrize("role", ["reader", "worker", "monitor", "pusher", "guard"])
@pytest.mark.parametrize("trial", range(KILLS))
def test_i1_due_flows_run_when_a_process_of_an_idle_cluster_was_killed(
    start_cluster: Start, environment: dict[str, str], tmp_path: Path, role: str, trial: int
) -> None:
    cluster = start_cluster()
    ready(cluster)
    processes.kill(found(cluster, role))
    schedule(environment, "shop-quick", tmp_path, 6)
    until(all_ended, "the flows")
    assert_due_flows_were_met()
    assert set(started_tasks(tmp_path).values()) == {1}
    # Nothing but the cluster itself has started it again.
    assert cluster.poll() is None
    cluster.terminate()
    # The signal itself ends one that is just being started again.
    assert cluster.wait(60) in (0, -signal.SIGTERM)
    until(lambda: not processes.members_of(cluster.pid), "the end of the others")


@pytest.mark.parametrize("trial", range(KILLS))
def test_i1_nothing_is_left_of_a_cluster_whose_main_process_was_killed(
    start_cluster: Start, environment: dict[str, str], tmp_path: Path, trial: int
) -> None:
    schedule(environment, "shop-paced", tmp_path, 12)
    cluster = start_cluster()
    running_worker()
    processes.kill(cluster.pid)
    cluster.wait()
    until(lambda: not processes.members_of(cluster.pid), "the end of the others")
    # What they had in progress was handed over, not lost until its lease expires.
    assert not FlowExecution.objects.filter(lease_expires_at__isnull=False).exists()
    # As a supervisor would.
    start_cluster()
    until(all_ended, "the backlog")
    assert_nothing_was_repeated(tmp_path)


@pytest.mark.parametrize("role", ["worker", "monitor", "pusher", "guard"])
@pytest.mark.parametrize("trial", range(KILLS))
def test_i1_i2_a_backlog_is_done_when_a_process_of_a_busy_cluster_was_killed(
    start_cluster: Start, environment: dict[str, str], tmp_path: Path, role: str, trial: int
) -> None:
    environment["EBBS_TEST_LEASE_SECONDS"] = "5"
    schedule(environment, "shop-paced", tmp_path, 12)
    cluster = start_cluster()
    victim = running_worker()
    processes.kill(victim if role == "worker" else found(cluster, role))
    until(all_ended, "the backlog")
    assert_nothing_was_repeated(tmp_path)
    assert cluster.poll() is None


@pytest.mark.parametrize("broker", ["orm"], indirect=True)
def test_i2_a_task_in_progress_is_finished_while_its_cluster_is_started_again(
    start_cluster: Start, environment: dict[str, str], tmp_path: Path
) -> None:
    cluster = start_cluster()
    ready(cluster)
    schedule(environment, "shop-waits", tmp_path)
    until(lambda: len(started_tasks(tmp_path)) == 2, "the task that waits")
    guard = found(cluster, "guard")
    processes.kill(found(cluster, "reader"))
    schedule(environment, "shop-quick", tmp_path, 3)
    until(lambda: len(started_tasks(tmp_path)) == 8, "the other flows")
    assert found(cluster, "guard") != guard
    (tmp_path / "go").touch()
    until(all_ended, "the flow whose task waited")
    assert set(started_tasks(tmp_path).values()) == {1}
    cluster.terminate()
    assert cluster.wait(60) == 0
    until(lambda: not processes.members_of(cluster.pid), "the end of all")


@pytest.mark.parametrize("role", ["reader", "monitor"])
def test_sigterm_ends_a_cluster_whose_queue_is_locked(start_cluster: Start, role: str) -> None:
    cluster = start_cluster()
    ready(cluster)
    processes.kill(found(cluster, role))
    cluster.terminate()
    assert cluster.wait(60) == 0
    until(lambda: not processes.members_of(cluster.pid), "the end of the others")


@pytest.mark.parametrize("trial", range(3 * KILLS))
def test_sigterm_to_all_of_its_processes_ends_a_cluster_in_order(
    start_cluster: Start, environment: dict[str, str], tmp_path: Path, trial: int
) -> None:
    # Longer than the test: what goes on, goes on because it was handed over.
    environment["EBBS_TEST_LEASE_SECONDS"] = "600"
    cluster = start_cluster()
    ready(cluster)
    if trial % 3:
        schedule(environment, "shop-long", tmp_path, trial % 3)
        until(lambda: len(started_tasks(tmp_path)) > 1, "the flows in progress")
    os.killpg(cluster.pid, signal.SIGTERM)
    assert cluster.wait(60) == 0
    assert not processes.members_of(cluster.pid)
    assert not FlowExecution.objects.filter(lease_expires_at__isnull=False).exists()
    assert not FlowExecution.objects.filter(status=FlowStatus.FAILED).exists()
    assert not WorkerProcess.objects.exists()


@pytest.mark.parametrize("broker", ["orm"], indirect=True)
def test_sigterm_to_one_worker_has_it_replaced_after_the_task_in_progress(
    start_cluster: Start, environment: dict[str, str], tmp_path: Path
) -> None:
    environment["EBBS_TEST_LEASE_SECONDS"] = "600"
    schedule(environment, "shop-long", tmp_path)
    cluster = start_cluster()
    worker = running_worker()
    os.kill(worker, signal.SIGTERM)
    until(lambda: worker not in processes.members_of(cluster.pid), "the end of the worker")
    until(all_ended, "the flow")
    assert set(started_tasks(tmp_path).values()) == {1}
