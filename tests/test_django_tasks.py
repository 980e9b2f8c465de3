"""The same over django.tasks: a real worker of its database backend on the test's database."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.core.checks import run_checks
from django.core.management import CommandError, call_command
from django.utils import timezone
from django_tasks_db.models import DBTaskResult

from ebbs_and_flows import FlowRunner, FlowStatus, FlowTemplate, flow_runner, task
from ebbs_and_flows.models import TaskExecution, WorkerProcess

from .test_cluster import all_ended, environment, running_worker, started_tasks, until

__all__ = ["environment"]

pytestmark = [pytest.mark.django_db(transaction=True)]


@pytest.fixture(autouse=True)
def engine(settings: Any) -> None:
    settings.EBBS_AND_FLOWS = {
        "ENGINE": "ebbs_and_flows.engines.django_tasks.DjangoTasksEngine",
    }


@pytest.fixture
def broker() -> str:
    return "orm"


@pytest.fixture
def worker(environment: dict[str, str], tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """`manage.py withpacemaker db_worker`; its log is shown when the test fails."""
    log = tmp_path / "worker.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "django", "withpacemaker"),
                *("db_worker", "--interval", "0.1", "--no-startup-delay"),
            ],
            env={**environment, "EBBS_TEST_ENGINE": "django_tasks"},
            stdout=out,
            stderr=subprocess.STDOUT,
            text=True,
        )
    yield process
    process.kill()
    process.wait()
    print(log.read_text())


@pytest.mark.processes
def test_a_worker_runs_what_is_scheduled_now_later_and_by_nobody_told(
    worker: subprocess.Popen[str], tmp_path: Path
) -> None:
    entries = {"folder": str(tmp_path)}
    now = flow_runner.schedule_flow("shop-quick", entries)
    assert DBTaskResult.objects.count() == 1
    later = flow_runner.schedule_flow(
        "shop-quick", entries, run_at=timezone.now() + timedelta(seconds=3)
    )
    assert DBTaskResult.objects.filter(status="READY").count() <= 1
    until(all_ended, "both flows")
    for flow in (now, later):
        flow.refresh_from_db()
        assert flow.started_at is not None
        assert flow.started_at >= flow.run_at
    assert set(started_tasks(tmp_path).values()) == {1}

    lost = flow_runner.schedule_flow("shop-quick", entries)
    DBTaskResult.objects.all().delete()
    until(all_ended, f"flow {lost.pk}, whose message was lost")


@pytest.mark.processes
def test_sigterm_stops_a_worker_after_the_task_in_progress(
    worker: subprocess.Popen[str], tmp_path: Path
) -> None:
    flow = flow_runner.schedule_flow("shop-long", {"folder": str(tmp_path)})
    assert running_worker() == worker.pid
    assert WorkerProcess.objects.get().name.endswith(f":{worker.pid}")
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(30) == 0
    assert not WorkerProcess.objects.exists()
    flow.refresh_from_db()
    assert (flow.status, flow.lease_expires_at) == (FlowStatus.RUNNING, None)
    assert flow.current_task_index < len(flow.task_names)
    assert not TaskExecution.objects.exclude(status="SUCCEEDED").exists()
    # It has left a message for the next worker.
    assert DBTaskResult.objects.filter(status="READY").exists()


def test_a_flow_that_is_rolled_back_leaves_no_message(runner: FlowRunner) -> None:
    runner.register_flow_template(FlowTemplate("t", tasks=[task(lambda context: context)]))
    with pytest.raises(ZeroDivisionError), runner.service.repository.atomic():
        runner.schedule_flow("t")
        raise ZeroDivisionError
    assert not DBTaskResult.objects.exists()
    runner.schedule_flow("t")
    assert DBTaskResult.objects.count() == 1


def test_a_backend_that_wakes_nobody_is_warned_about(settings: Any) -> None:
    def found() -> set[str | None]:
        return {message.id for message in run_checks()}

    assert "ebbs_and_flows.W020" not in found()
    settings.TASKS = {"default": {"BACKEND": "django_tasks.backends.immediate.ImmediateBackend"}}
    assert "ebbs_and_flows.W020" in found()


def test_a_command_that_is_not_there_is_one_sentence() -> None:
    with pytest.raises(CommandError, match="Unknown command: 'no_worker'"):
        call_command("withpacemaker", "no_worker")
    assert not WorkerProcess.objects.exists()
