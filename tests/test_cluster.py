"""Real django-q2 clusters on the test's own database: in time, and through kills and losses."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from django.db import connection
from django.utils import timezone
from django_q.models import OrmQ

from ebbs_and_flows import FlowStatus, flow_runner
from ebbs_and_flows.models import FlowExecution, TaskExecution

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.processes]

Start = Callable[[], "subprocess.Popen[str]"]


def redis_is_there() -> bool:
    host, port = os.environ.get("REDIS_HOST", "127.0.0.1"), os.environ.get("REDIS_PORT", "6379")
    address = (host, int(port))
    try:
        socket.create_connection(address, timeout=1).close()
    except OSError:
        return False
    return True


@pytest.fixture(params=["orm", "redis"])
def broker(request: pytest.FixtureRequest) -> str:
    if request.param == "redis" and not redis_is_there():
        pytest.skip("no Redis answers")
    return str(request.param)


@pytest.fixture
def environment(broker: str) -> dict[str, str]:
    from django.conf import settings

    return {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "tests.settings",
        "EBBS_TEST_DATABASE_NAME": str(connection.settings_dict["NAME"]),
        "EBBS_TEST_LEASE_SECONDS": "2",
        "EBBS_TEST_BROKER": broker,
        "EBBS_TEST_CLUSTER": str(settings.Q_CLUSTER["name"]),
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }


@pytest.fixture
def start_cluster(environment: dict[str, str], tmp_path: Path) -> Iterator[Start]:
    """Start `qcluster`; its log is shown when the test fails."""
    started: list[subprocess.Popen[str]] = []
    log = tmp_path / "cluster.log"

    def start() -> subprocess.Popen[str]:
        with log.open("a") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "django", "qcluster"],
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
                # Its own group, so that the whole of it can be killed.
                start_new_session=True,
            )
        started.append(process)
        return process

    yield start
    for process in started:
        end(process)
    print(log.read_text() if log.exists() else "")


def end(process: subprocess.Popen[str]) -> None:
    """End a cluster: kindly, then for certain, with all its processes."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def schedule(environment: dict[str, str], template: str, folder: Path, *more: str) -> None:
    """Schedule as another process would, which enqueues with the broker under test."""
    subprocess.run(
        [
            *(sys.executable, "-m", "django", "scheduleflow", template),
            *("--entry", f"folder={folder}"),
            *more,
        ],
        env=environment,
        check=True,
        capture_output=True,
        timeout=60,
    )


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.05)


def all_ended() -> bool:
    unfinished = FlowExecution.objects.exclude(status=FlowStatus.SUCCEEDED)
    return FlowExecution.objects.exists() and not unfinished.exists()


def started_tasks(folder: Path) -> Counter[str]:
    file = folder / "log"
    lines = file.read_text().splitlines() if file.exists() else []
    return Counter(" ".join(line.split()[:2]) for line in lines)


def test_a_scheduled_flow_runs_by_itself_and_a_later_one_not_before_its_time(
    start_cluster: Start, environment: dict[str, str], tmp_path: Path
) -> None:
    cluster = start_cluster()
    schedule(environment, "shop-quick", tmp_path)
    schedule(environment, "shop-quick", tmp_path, "--at", "3s", "--key", "later")
    until(all_ended, "both flows")
    later = FlowExecution.objects.get(key="later")
    assert later.started_at is not None
    assert later.started_at >= later.run_at
    assert set(started_tasks(tmp_path).values()) == {1}
    cluster.terminate()
    assert cluster.wait(30) == 0


def test_i1_i2_lost_and_repeated_messages_do_no_harm(
    start_cluster: Start, environment: dict[str, str], tmp_path: Path, broker: str
) -> None:
    if broker == "orm":
        lost = flow_runner.schedule_flow("shop-quick", {"folder": str(tmp_path)})
        OrmQ.objects.all().delete()
        # One flow, many messages.
        flow_runner.schedule_flow("shop-quick", {"folder": str(tmp_path)})
        payload = OrmQ.objects.get()
        for _ in range(5):
            OrmQ.objects.create(key=payload.key, payload=payload.payload, lock=timezone.now())
        assert lost.pk
    else:
        # This process has no Redis broker: its messages go where no cluster looks.
        for _ in range(2):
            flow_runner.schedule_flow("shop-quick", {"folder": str(tmp_path)})
    start_cluster()
    until(all_ended, "the flows")
    assert set(started_tasks(tmp_path).values()) == {1}
    assert TaskExecution.objects.count() == 4


def test_i1_i2_a_killed_worker_and_a_killed_cluster_lose_nothing(
    start_cluster: Start, environment: dict[str, str], tmp_path: Path
) -> None:
    schedule(environment, "shop-killed", tmp_path)
    schedule(environment, "shop-waits", tmp_path)
    cluster = start_cluster()
    until(lambda: any("wait_for_file" in line for line in started_tasks(tmp_path)), "the wait")
    os.killpg(cluster.pid, signal.SIGKILL)
    cluster.wait()
    (tmp_path / "go").touch()
    start_cluster()
    until(all_ended, "both flows")
    for flow in FlowExecution.objects.all():
        succeeded = TaskExecution.objects.filter(flow_execution=flow, status="SUCCEEDED")
        assert Counter(succeeded.values_list("task_index", flat=True)) == {0: 1, 1: 1, 2: 1}
        # A succeeded task was started once; the interrupted ones may have been more often.
        counts = {
            name.split()[1]: count
            for name, count in started_tasks(tmp_path).items()
            if name.split()[0] == str(flow.pk)
        }
        assert counts["first"] == counts["last"] == 1


def test_two_clusters_do_one_backlog_with_no_flow_run_twice(
    start_cluster: Start, environment: dict[str, str], tmp_path: Path, broker: str
) -> None:
    for _ in range(30):
        flow_runner.schedule_flow("shop-quick", {"folder": str(tmp_path)})
    start_cluster()
    start_cluster()
    until(all_ended, "the backlog")
    assert len(started_tasks(tmp_path)) == 60
    assert set(started_tasks(tmp_path).values()) == {1}
