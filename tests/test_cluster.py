"""Real django-q2 clusters on the test's own database: in time, and through kills and losses."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from django.utils import timezone
from django_q.models import OrmQ
from django_q.tasks import async_task

from ebbs_and_flows import FlowStatus, flow_runner
from ebbs_and_flows.models import FlowExecution, TaskExecution, WorkerProcess

from .databases import database_names

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


def lose_redis_messages() -> bool:
    """Delete the tests' queue, and nothing else; return whether there was anything in it."""
    import redis
    from django.conf import settings

    host, port = os.environ.get("REDIS_HOST", "127.0.0.1"), os.environ.get("REDIS_PORT", "6379")
    with redis.Redis(host=host, port=int(port)) as server:
        return bool(server.delete(f"django_q:{settings.Q_CLUSTER['name']}:q"))


@pytest.fixture(params=["orm", "redis"])
def broker(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "redis" and not redis_is_there():
        pytest.skip("no Redis answers")
    yield str(request.param)
    if request.param == "redis":
        lose_redis_messages()


@pytest.fixture
def environment(broker: str) -> dict[str, str]:
    from django.conf import settings

    return {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "tests.settings",
        **database_names(),
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


SCHEDULE = """
import json, sys
from datetime import timedelta
import django
django.setup()
from django.utils import timezone
from ebbs_and_flows import flow_runner

template, folder, number, seconds = json.loads(sys.argv[1])
for _ in range(number):
    run_at = timezone.now() + timedelta(seconds=seconds) if seconds else None
    flow_runner.schedule_flow(template, {"folder": folder}, run_at=run_at)
"""


def schedule(
    environment: dict[str, str], template: str, folder: Path, number: int = 1, *, after: float = 0
) -> None:
    """Schedule flows as another process would, which enqueues with the broker under test."""
    given = json.dumps([template, str(folder), number, after])
    subprocess.run(
        [sys.executable, "-c", SCHEDULE, given],
        env=environment,
        check=True,
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


def assert_nothing_was_repeated(folder: Path) -> None:
    """I2, by the records and by what the tasks themselves have noted."""
    attempts = TaskExecution.objects.order_by("flow_execution", "task_index", "attempt")
    made: dict[str, list[str]] = defaultdict(list)
    for attempt in attempts:
        made[f"{attempt.flow_execution_id} {attempt.task_name}"].append(attempt.status)
    started = started_tasks(folder)
    for task, statuses in made.items():
        assert statuses.count("SUCCEEDED") == 1, task
        assert statuses[-1] == "SUCCEEDED", task
        # An attempt whose worker was killed may not have come to its note.
        assert started[task] <= len(statuses), task
    for flow in FlowExecution.objects.all():
        succeeded = flow.task_executions.filter(status="SUCCEEDED")
        assert succeeded.count() == len(flow.task_names)


def running_worker() -> int:
    """Return the process id of a worker that is within a task."""
    found: list[int] = []

    def is_one() -> bool:
        running = FlowExecution.objects.filter(
            status=FlowStatus.RUNNING, current_task_index__gte=1
        )
        found[:] = [int(flow.claimed_by.rpartition(":")[2]) for flow in running]
        return bool(found)

    until(is_one, "a worker in the middle of a flow")
    return found[0]


def parent_of(pid: int) -> int:
    shown = subprocess.run(
        ["ps", "-o", "ppid=", "-p", str(pid)], check=True, capture_output=True, text=True
    )
    return int(shown.stdout)


def test_a_scheduled_flow_runs_by_itself_and_a_later_one_not_before_its_time(
    start_cluster: Start, environment: dict[str, str], tmp_path: Path
) -> None:
    cluster = start_cluster()
    schedule(environment, "shop-quick", tmp_path)
    schedule(environment, "shop-quick", tmp_path, after=3)
    until(all_ended, "both flows")
    later = FlowExecution.objects.latest("run_at")
    assert later.started_at is not None
    assert later.started_at >= later.run_at
    assert set(started_tasks(tmp_path).values()) == {1}
    cluster.terminate()
    assert cluster.wait(30) == 0


def test_the_workers_of_a_cluster_are_listed_while_they_live(start_cluster: Start) -> None:
    cluster = start_cluster()
    until(lambda: WorkerProcess.objects.count() == 2, "two workers")
    for worker in WorkerProcess.objects.all():
        assert parent_of(parent_of(int(worker.name.rpartition(":")[2]))) == cluster.pid
    cluster.terminate()
    cluster.wait(30)
    assert not WorkerProcess.objects.exists()


@pytest.mark.parametrize("broker", ["orm"], indirect=True)
def test_a_worker_is_busy_with_another_task_of_the_queue_too(start_cluster: Start) -> None:
    async_task("time.sleep", 40)
    start_cluster()
    busy = WorkerProcess.objects.filter(idle_since=None)
    until(lambda: busy.count() == 1 and WorkerProcess.objects.count() == 2, "one busy worker")
    assert WorkerProcess.objects.exclude(idle_since=None).count() == 1


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
    environment["EBBS_TEST_LEASE_SECONDS"] = "2"
    schedule(environment, "shop-killed", tmp_path)
    schedule(environment, "shop-waits", tmp_path)
    cluster = start_cluster()
    until(lambda: any("wait_for_file" in line for line in started_tasks(tmp_path)), "the wait")
    os.killpg(cluster.pid, signal.SIGKILL)
    cluster.wait()
    (tmp_path / "go").touch()
    start_cluster()
    until(all_ended, "both flows")
    assert_nothing_was_repeated(tmp_path)


@pytest.mark.parametrize("killed", ["worker", "sentinel", "cluster"])
def test_i1_i2_kill_9_in_the_middle_of_a_backlog_repeats_nothing_that_succeeded(
    start_cluster: Start, environment: dict[str, str], tmp_path: Path, killed: str
) -> None:
    environment["EBBS_TEST_LEASE_SECONDS"] = "2"
    schedule(environment, "shop-paced", tmp_path, 12)
    cluster = start_cluster()
    worker = running_worker()
    if killed == "worker":
        os.kill(worker, signal.SIGKILL)
    elif killed == "sentinel":
        # The cluster starts itself again.
        os.kill(parent_of(worker), signal.SIGKILL)
    else:
        os.killpg(cluster.pid, signal.SIGKILL)
        cluster.wait(30)
        start_cluster()
    until(all_ended, "the backlog")
    assert_nothing_was_repeated(tmp_path)


@pytest.mark.parametrize("broker", ["redis"], indirect=True)
def test_i1_i2_a_queue_that_is_flushed_loses_no_flow(
    start_cluster: Start, environment: dict[str, str], tmp_path: Path
) -> None:
    schedule(environment, "shop-paced", tmp_path, 12)
    start_cluster()
    running_worker()
    assert lose_redis_messages()
    until(all_ended, "the backlog")
    assert_nothing_was_repeated(tmp_path)


def test_sigterm_stops_a_cluster_in_the_middle_of_flows_that_go_on_elsewhere(
    start_cluster: Start, environment: dict[str, str], tmp_path: Path
) -> None:
    # Longer than the test: what goes on, goes on because it was handed over.
    environment["EBBS_TEST_LEASE_SECONDS"] = "600"
    schedule(environment, "shop-long", tmp_path, 4)
    cluster = start_cluster()
    running_worker()
    cluster.terminate()
    assert cluster.wait(60) == 0
    # Neither did it run to their end what it had begun, nor what was queued within it.
    assert not FlowExecution.objects.filter(status=FlowStatus.SUCCEEDED).exists()
    assert not FlowExecution.objects.filter(lease_expires_at__isnull=False).exists()
    start_cluster()
    until(all_ended, "the flows")
    assert set(started_tasks(tmp_path).values()) == {1}
    assert set(TaskExecution.objects.values_list("attempt", flat=True)) == {1}


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
