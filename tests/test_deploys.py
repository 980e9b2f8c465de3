"""Processes of two releases on one database, in both orders and side by side."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ebbs_and_flows import FlowStatus
from ebbs_and_flows.integrity import IntegrityCheck
from ebbs_and_flows.models import FlowExecution, FlowTransition, TaskExecution

from .databases import database_names

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.processes]

CHANGES = {
    "insert": ("abc@1", "anbc@1"),
    "append": ("abc@1", "abcn@1"),
    "remove": ("abc@1", "ac@2"),
    "move": ("abc@1", "acb@2"),
    "rename": ("abc@1", "axc@2"),
}
"""The tasks, a letter each, and the version of the old release and of the new one."""

changes = pytest.mark.parametrize(("old", "new"), CHANGES.values(), ids=list(CHANGES))


def start(release: str, command: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "django", command, *arguments],
        env={
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "tests.settings",
            **database_names(),
            "EBBS_TEST_RELEASE": release,
            "PYTHONPATH": str(Path(__file__).parent.parent),
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(release: str, command: str, *arguments: str, code: int = 0) -> str:
    process = start(release, command, *arguments)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, out + err
    return out + err


def succeeded(flow: FlowExecution) -> str:
    attempts = TaskExecution.objects.filter(flow_execution=flow, status="SUCCEEDED")
    return "".join(attempts.order_by("pk").values_list("task_name", flat=True))


def findings() -> list[str]:
    return [str(item) for item in IntegrityCheck().findings()]


def check_ended(flow: FlowExecution, release: str) -> None:
    """Fail unless the flow has succeeded with each task of the release, once and in order."""
    flow.refresh_from_db()
    assert flow.status == FlowStatus.SUCCEEDED
    assert succeeded(flow) == "".join(flow.task_names) == release[:-2]
    assert findings() == []


@changes
def test_an_old_worker_leaves_what_new_code_has_scheduled(old: str, new: str) -> None:
    run(new, "scheduleflow", "release")
    said = run(old, "runflows")
    flow = FlowExecution.objects.get()
    assert (flow.status, flow.claim) == (FlowStatus.SCHEDULED, 0)
    assert "left to workers with other code" in said
    assert "1 due flow of template 'release' does not fit the code here" in said
    run(new, "runflows")
    check_ended(flow, new)


@changes
def test_a_new_worker_goes_on_where_old_code_has_failed(old: str, new: str) -> None:
    run(old, "scheduleflow", "release", "--entry", "fails=true")
    run(old, "runflows", code=1)
    flow = FlowExecution.objects.get()
    assert (flow.status, succeeded(flow)) == (FlowStatus.FAILED, "a")
    run(new, "rerunflow", str(flow.pk))
    run(new, "runflows")
    check_ended(flow, new)


@changes
def test_both_releases_side_by_side_skip_and_fail_nothing(old: str, new: str) -> None:
    workers = [start(release, "runflows", "--watch") for release in (old, new)]
    try:
        for release in (old, new):
            run(release, "scheduleflow", "release")
            run(release, "scheduleflow", "release")
        left = FlowExecution.objects.exclude(status=FlowStatus.SUCCEEDED)
        until = time.monotonic() + 60
        while left.exists():
            assert time.monotonic() < until, list(left.values())
            time.sleep(0.1)
    finally:
        for worker in workers:
            worker.send_signal(signal.SIGTERM)
        for worker in workers:
            worker.communicate(timeout=60)
    for flow in FlowExecution.objects.all():
        assert succeeded(flow) == "".join(flow.task_names)
        assert succeeded(flow) in (old[:-2], new[:-2])
    assert not TaskExecution.objects.exclude(status="SUCCEEDED").exists()
    assert findings() == []


def test_after_a_rollback_an_operator_gives_flows_the_old_plan() -> None:
    old, new = CHANGES["rename"]
    run(new, "scheduleflow", "release")
    assert "has 'x' as task 1" in run(old, "runflows")
    assert "FITS THIS CODE" in run(old, "showflows", "--plans")
    adopt = ["adoptflows", "--template", "release", "--reason", "rolled back"]
    assert "1 flow of template 'release' would get the plan" in run(old, *adopt, "--dry-run")
    assert "has now the plan of version 1: a, b, c." in run(old, *adopt)
    run(old, "runflows")
    flow = FlowExecution.objects.get()
    assert (flow.status, succeeded(flow)) == (FlowStatus.SUCCEEDED, "abc")
    reasons = FlowTransition.objects.filter(flow_execution=flow).values_list("reason", flat=True)
    assert "Adopted the plan of version 1: rolled back" in reasons
    assert findings() == []
