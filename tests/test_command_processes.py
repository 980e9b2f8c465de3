"""Commands as real processes: signals, kills, several workers, a terminal, a closed pipe."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ebbs_and_flows import FlowStatus, flow_runner
from ebbs_and_flows.integrity import IntegrityCheck
from ebbs_and_flows.models import FlowExecution

from .databases import database_names

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.processes]

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a command on the test's own database; ended with the test."""
    started: list[subprocess.Popen[str]] = []

    def popen(
        *arguments: str, command: str = "runflows", unbuffered: str = "1", **options: Any
    ) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "django", command, *arguments],
            env={
                **os.environ,
                "DJANGO_SETTINGS_MODULE": "tests.settings",
                **database_names(),
                "EBBS_TEST_LEASE_SECONDS": "2",
                "PYTHONPATH": str(Path(__file__).parent.parent),
                "PYTHONUNBUFFERED": unbuffered,
            },
            stdin=subprocess.DEVNULL,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options},
        )
        started.append(process)
        return process

    yield popen
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def until(condition: Callable[[], bool], what: str, seconds: float = 40) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited in vain: {what}"
        time.sleep(0.05)


def log(folder: Path) -> list[str]:
    file = folder / "log"
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("watch", [True, False])
def test_a_signal_finishes_the_task_in_progress_and_hands_the_flow_back(
    start: Start, tmp_path: Path, number: int, watch: bool
) -> None:
    flow = flow_runner.schedule_flow("shop-waits", {"folder": str(tmp_path)})
    process = start(*(["--watch"] if watch else []))
    until(lambda: any("wait_for_file" in line for line in log(tmp_path)), "the second task")
    process.send_signal(number)
    (tmp_path / "go").touch()
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert "1 handed back" in out
    flow.refresh_from_db()
    assert (flow.status, flow.lease_expires_at, flow.claimed_by) == ("RUNNING", None, "")
    assert flow.current_task_index == 2
    # At once: no lease to wait for.
    ended = flow_runner.run_next()
    assert ended is not None
    assert ended.status == FlowStatus.SUCCEEDED
    assert [line.split()[1] for line in log(tmp_path)] == ["first", "wait_for_file", "last"]


def test_i2_a_killed_worker_loses_nothing_and_repeats_no_succeeded_task(
    start: Start, tmp_path: Path
) -> None:
    flow = flow_runner.schedule_flow("shop-killed", {"folder": str(tmp_path)})
    assert start().wait(30) == -signal.SIGKILL
    flow.refresh_from_db()
    assert flow.status == FlowStatus.RUNNING
    process = start("--watch")
    until(lambda: flow_runner.service.get_flow_execution(flow).is_finished, "the recovery")
    process.terminate()
    assert process.wait(30) == 0
    flow.refresh_from_db()
    assert flow.status == FlowStatus.SUCCEEDED
    assert [line.split()[1] for line in log(tmp_path)] == [
        "first",
        "kill_once",
        "kill_once",
        "last",
    ]
    attempts = flow_runner.service.get_flow_task_execution_history(flow)
    interrupted = [row for row in attempts if row.error_type == "TaskInterrupted"]
    assert [(row.task_name, row.attempt) for row in interrupted] == [("kill_once", 1)]


def test_workers_share_a_backlog_and_run_each_flow_once(start: Start, tmp_path: Path) -> None:
    for _ in range(30):
        flow_runner.schedule_flow("shop-quick", {"folder": str(tmp_path)})
    process = start("--workers", "2", "--limit", "25", "--json")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    lines = [json.loads(line) for line in out.splitlines()]
    assert lines[-1]["succeeded"] == 25
    assert len({line["id"] for line in lines[:-1]}) == 25
    assert set(Counter(log(tmp_path)).values()) == {1}
    assert len(log(tmp_path)) == 50
    assert flow_runner.count_due() == 5


def test_watching_workers_pick_up_what_comes_and_end_on_sigterm(
    start: Start, tmp_path: Path
) -> None:
    process = start("--workers", "2", "--watch")
    flows = [flow_runner.schedule_flow("shop-quick", {"folder": str(tmp_path)}) for _ in range(4)]
    done = FlowExecution.objects.filter(status=FlowStatus.SUCCEEDED)
    until(lambda: done.count() == len(flows), "the flows")
    process.terminate()
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert "4 flows ran: 4 succeeded." in out


def test_a_task_that_kills_its_workers_is_given_up_and_holds_nobody_up(
    start: Start, tmp_path: Path
) -> None:
    deadly = flow_runner.schedule_flow("shop-deadly", {"folder": str(tmp_path)})
    process = start("--workers", "2", "--watch")
    until(lambda: any("kill_always" in line for line in log(tmp_path)), "the first death")
    flows = [flow_runner.schedule_flow("shop-quick", {"folder": str(tmp_path)}) for _ in range(4)]
    done = FlowExecution.objects.filter(status=FlowStatus.SUCCEEDED)
    until(lambda: done.count() == len(flows), "the other flows")
    until(lambda: flow_runner.service.get_flow_execution(deadly).is_finished, "the end of it", 90)
    process.terminate()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    deadly.refresh_from_db()
    assert deadly.status == FlowStatus.FAILED
    # Three times it is continued: MAX_INTERRUPTIONS.
    assert [line.split()[1] for line in log(tmp_path)].count("kill_always") == 4
    attempts = flow_runner.service.get_flow_task_execution_history(deadly)
    last = attempts[-1]
    assert [row.attempt for row in attempts if row.task_name == "kill_always"] == [1, 2, 3, 4]
    assert last.output.startswith("interrupted: worker ")
    assert "It has now lost its worker 4 times, so the flow is not continued by" in last.output
    assert "find out what ends the worker, then reschedule it." in last.output
    assert "A worker process ended unexpectedly, with exit code -9" in err
    assert list(IntegrityCheck().findings()) == []


def test_a_failed_flow_makes_the_exit_code_1_with_workers_too(start: Start) -> None:
    flow_runner.schedule_flow("shop-fails")
    process = start("--workers", "2")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    assert "1 flow ran: 1 failed (shop-fails #" in out


def test_a_terminal_gets_a_live_bar(start: Start, tmp_path: Path) -> None:
    for _ in range(3):
        flow_runner.schedule_flow("shop-quick", {"folder": str(tmp_path)})
    ours, theirs = pty.openpty()
    process = start(stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""
    # Until the process has closed its end; it may have to wait for a processor meanwhile.
    while select.select([ours], [], [], 60)[0]:
        try:
            chunk = os.read(ours, 4096)
        except OSError:
            break
        if not chunk:
            break
        seen += chunk
    os.close(ours)
    assert process.wait(30) == 0
    text = seen.decode()
    assert "3/3" in text
    assert "3 flows ran: 3 succeeded." in text


# What is buffered fails at the end only.
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_goes_away_ends_a_command_quietly(start: Start, unbuffered: str) -> None:
    process = start("--skip-checks", command="showflows", unbuffered=unbuffered)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    said = process.stderr.read()
    assert "BrokenPipe" not in said
    assert "Traceback" not in said
    assert process.wait(30) == 128 + signal.SIGPIPE
