"""The processes that run flows are listed while they live."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from ebbs_and_flows.models import WorkerProcess

from .test_cluster import environment, until

__all__ = ["environment"]

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.processes]

Watch = Callable[[int], "subprocess.Popen[bytes]"]


@pytest.fixture
def broker() -> str:
    return "orm"


@pytest.fixture
def watch(environment: dict[str, str]) -> Iterator[Watch]:
    """Start `runflows --watch` with so many workers."""
    started = []

    def start(workers: int) -> subprocess.Popen[bytes]:
        command = ["runflows", "--watch", "--workers", str(workers)]
        process = subprocess.Popen([sys.executable, "-m", "django", *command], env=environment)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def listed() -> set[int]:
    names = WorkerProcess.objects.values_list("name", flat=True)
    return {int(name.rpartition(":")[2]) for name in names}


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_a_watching_process_is_listed_until_it_is_stopped(
    watch: Watch, ending: signal.Signals
) -> None:
    process = watch(1)
    until(lambda: listed() == {process.pid}, "the process")
    process.send_signal(ending)
    assert process.wait(30) == 0
    assert listed() == set()


def test_each_worker_of_several_is_listed(watch: Watch) -> None:
    process = watch(2)
    until(lambda: len(listed()) == 2, "both workers")
    assert process.pid not in listed()
    process.terminate()
    assert process.wait(30) == 0
    assert listed() == set()


def test_a_process_that_was_killed_stays_listed_with_when_it_was_last_seen(watch: Watch) -> None:
    process = watch(1)
    until(lambda: listed() == {process.pid}, "the process")
    process.kill()
    process.wait()
    assert listed() == {process.pid}
