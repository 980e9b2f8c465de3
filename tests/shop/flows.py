"""Flows for the tests that start processes; they speak with the test through files."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from django.db import connections, router, transaction

from ebbs_and_flows import ExecutionContext, FlowTemplate, Task, flow_runner, task
from ebbs_and_flows.models import FlowExecution

FLOWS = router.db_for_write(FlowExecution)


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


def _forks(context: ExecutionContext) -> ExecutionContext:
    """Fork, and have the child end as the flow's context says."""
    note(context, "start")
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return context.with_entries(exit_code=os.waitstatus_to_exitcode(status))
    match context["child"]:
        case "exits":
            sys.exit(7)
        case "raises":
            raise ValueError("only in the child")
        case "closes":
            connections.close_all()
        case "queries":
            # On SQLite an atomic task is the one writer, and it waits for the child here.
            is_read_only = connections[FLOWS].vendor == "sqlite"
            with nullcontext() if is_read_only else transaction.atomic(using=FLOWS):
                FlowExecution.objects.using(FLOWS).filter(pk=context.flow_execution_id).exists()
            sys.exit(9)
    return context.with_entries(exit_code="the child's own")


@task
async def forks_in_a_loop(context: ExecutionContext) -> ExecutionContext:
    return _forks(context)


def _sleep(seconds: float) -> None:
    time.sleep(seconds)


@task
def ends_children(context: ExecutionContext) -> ExecutionContext:
    """Start a process and a pool, and end them long before they are done."""
    note(context, "start")
    fork = multiprocessing.get_context("fork")
    child = fork.Process(target=_sleep, args=(60,))
    child.start()
    child.terminate()
    child.join(30)
    with fork.Pool(2) as pool:
        pool.map_async(_sleep, [60, 60])
    pool.join()
    return context.with_entries(exit_code=child.exitcode)


FORKS = {
    "shop-forks": task(name="forks")(_forks),
    "shop-forks-atomic": task(name="forks", atomic=True)(_forks),
    "shop-forks-async": forks_in_a_loop,
    "shop-forks-in-time": task(name="forks", timeout=60)(_forks),
}
for _name, _task in FORKS.items():
    flow_runner.register_flow_template(FlowTemplate(_name, tasks=[_task, last]))
flow_runner.register_flow_template(FlowTemplate("shop-children", tasks=[ends_children, last]))
flow_runner.register_flow_template(FlowTemplate("shop-limited", tasks=[first], max_running=2))


def _release(text: str) -> FlowTemplate:
    """The template of one release: its tasks, a letter each, and its version, as `abc@1`."""

    def letter(name: str) -> Task:
        @task(name=name)
        def run(context: ExecutionContext) -> ExecutionContext:
            if name == "b" and context.attempt == 1 and context.get("fails"):
                raise ValueError("no")
            return context

        return run

    names, version = text.split("@")
    return FlowTemplate("release", tasks=[letter(name) for name in names], version=int(version))


if "EBBS_TEST_RELEASE" in os.environ:
    flow_runner.register_flow_template(_release(os.environ["EBBS_TEST_RELEASE"]))
