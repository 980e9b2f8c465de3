"""Flows for the tests that start processes; they speak with the test through files."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from ebbs_and_flows import ExecutionContext, FlowTemplate, Task, flow_runner, task


def note(context: ExecutionContext, what: str) -> None:
    """Append a line to the test's log, on the disk before anything else happens."""
    with Path(context["folder"], "log").open("a") as log:
        log.write(f"{context.flow_execution_id} {context.task_name} {what}\n")
        log.flush()
        os.fsync(log.fileno())


@task
def first(context: ExecutionContext) -> ExecutionContext:
    note(context, "start")
    return context.with_entries(first=1)


@task
def wait_for_file(context: ExecutionContext) -> ExecutionContext:
    """Say that it runs, and go on when the test says so."""
    note(context, "start")
    go = Path(context["folder"], "go")
    until = time.monotonic() + 30
    while not go.exists() and time.monotonic() < until:
        time.sleep(0.02)
    return context.with_entries(waited=True)


@task
def kill_once(context: ExecutionContext) -> ExecutionContext:
    """End its process at the first attempt, as a power cut would."""
    note(context, "start")
    if context.attempt == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return context


@task
def kill_always(context: ExecutionContext) -> ExecutionContext:
    """End its process each time, as one does that takes all of the memory."""
    note(context, "start")
    os.kill(os.getpid(), signal.SIGKILL)
    return context


@task
def last(context: ExecutionContext) -> ExecutionContext:
    note(context, "start")
    return context


@task
def fail(context: ExecutionContext) -> ExecutionContext:
    raise ValueError("the card is bad")


def pace(number: int) -> Task:
    """One of many tasks that take a little while each."""

    @task(name=f"pace-{number}")
    def pace(context: ExecutionContext) -> ExecutionContext:
        note(context, "start")
        time.sleep(0.1)
        return context

    return pace


flow_runner.register_flow_template(FlowTemplate("shop-paced", tasks=map(pace, range(5))))
flow_runner.register_flow_template(FlowTemplate("shop-long", tasks=map(pace, range(40))))
flow_runner.register_flow_template(FlowTemplate("shop-quick", tasks=[first, last]))
flow_runner.register_flow_template(FlowTemplate("shop-waits", tasks=[first, wait_for_file, last]))
flow_runner.register_flow_template(FlowTemplate("shop-killed", tasks=[first, kill_once, last]))
flow_runner.register_flow_template(FlowTemplate("shop-deadly", tasks=[first, kill_always, last]))
flow_runner.register_flow_template(FlowTemplate("shop-fails", tasks=[fail]))
