"""Runs each shape of flow with a fault at its every statement, one process a fault."""

from __future__ import annotations

import logging
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path

from django.db import InterfaceError, OperationalError, connection
from django.utils import timezone

from ebbs_and_flows import ExecutionContext, FlowStatus, FlowTemplate, Task, flow_runner
from ebbs_and_flows.models import FlowExecution, TaskExecution

from . import evidence, faults, flows
from .processes import end, has_ended, in_a_process, start, wait_for_its_stop

MISSED, WENT_ON, STOPPED = 0, 4, 5
"""How a process ended: no fault came, it did its work all the same, it gave up for an error."""


# What the process that is tried does, with the template of its case


def schedule(case: str) -> None:
    flow_runner.schedule_flow(case, key=case)


def run(case: str) -> None:
    while flow_runner.run_next(templates=[case]) is not None:
        pass


def schedule_and_run(case: str) -> None:
    schedule(case)
    run(case)


def run_in_slices(case: str) -> None:
    while flow_runner.run_next(templates=[case], stop=lambda: True) is not None:
        pass


def run_this_one(case: str) -> None:
    flow_runner.run_flow_execution(FlowExecution.objects.get(template_name=case))


def fork(case: str) -> None:
    flow_runner.fork_flow_execution(
        FlowExecution.objects.get(template_name=case), from_task=1, changes={"forked": True}
    )


def reschedule(case: str) -> None:
    flow = FlowExecution.objects.get(template_name=case)
    if flow.status == FlowStatus.FAILED:
        flow_runner.reschedule_flow_execution(flow)


def complete_by_hand(case: str) -> None:
    flow = FlowExecution.objects.get(template_name=case)
    if flow.status == FlowStatus.FAILED:
        flow_runner.complete_failed_task(flow, reason="Paid in cash.")


def expire(case: str) -> None:
    """Have the lease expire without waiting for it."""
    FlowExecution.objects.filter(template_name=case, lease_expires_at__isnull=False).update(
        lease_expires_at=timezone.now() - timedelta(hours=1)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Something that is done to a flow, and what has become of it when all is over."""

    tasks: list[Task]
    act: Callable[[str], None] = run
    # Done before, without a fault.
    before: tuple[Callable[[str], None], ...] = (schedule,)
    # And before that, in a process of its own, which it ends.
    dies: Callable[[str], None] | None = None
    ends: tuple[FlowStatus, ...] = (FlowStatus.SUCCEEDED,)
    max_running: int | None = None


_FAILED = {"tasks": [flows.first, flows.fail], "ends": (FlowStatus.FAILED,)}

SCENARIOS = {
    "run": Scenario(tasks=[flows.first, flows.flaky, flows.book, flows.last]),
    "in slices": Scenario(tasks=[flows.first, flows.last], act=run_in_slices),
    "limited": Scenario(tasks=[flows.first, flows.last], max_running=1),
    "this one": Scenario(tasks=[flows.first, flows.last], act=run_this_one),
    "failure": Scenario(**_FAILED),
    "cancellation": Scenario(
        tasks=[flows.first, flows.cancel, flows.last], ends=(FlowStatus.CANCELLED,)
    ),
    "recovery": Scenario(
        tasks=[flows.kill_worker_once, flows.last],
        dies=schedule_and_run,
        before=(expire,),
    ),
    "scheduling": Scenario(tasks=[flows.first], act=schedule, before=()),
    "rescheduling": Scenario(**_FAILED, act=reschedule, before=(schedule, run)),
    "forking": Scenario(tasks=[flows.first, flows.last], act=fork, before=(schedule, run)),
    "done by hand": Scenario(
        tasks=[flows.fail, flows.last], act=complete_by_hand, before=(schedule, run),
        ends=(FlowStatus.SUCCEEDED, FlowStatus.FAILED),
    ),
}  # fmt: skip


@dataclass(slots=True)
class Count:
    """What was done, and how the processes took it."""

    statements: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    went_on: Counter[str] = field(default_factory=Counter)
    stopped: Counter[str] = field(default_factory=Counter)
    taken_back: int = 0
    crashed: list[str] = field(default_factory=list)


def main(name: str, *, share: float, seed: int) -> int:
    """Try a share of it on the database that is set up, 1 for all; return the exit code."""
    started, count, chosen = time.monotonic(), Count(), random.Random(seed)
    logging.getLogger("ebbs_and_flows").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        os.environ[evidence.LOG] = str(log)
        cases = {}
        for scenario in SCENARIOS:
            cases |= _burn(scenario, count, share, chosen)
        expected = _expected(cases, count)
        verdict = evidence.Court(expected, log).judge()
    verdict.unsound += count.crashed
    statements = ", ".join(f"{number} of {what}" for what, number in count.statements.items())
    tried = "" if share == 1 else f"; {share:.0%} of the cases, seed {seed}"
    print(f"{name}: every statement ({statements}{tried}) in {time.monotonic() - started:.0f} s")
    for harm, number in count.faults.items():
        print(
            f"  {harm}: {number} times; {count.went_on[harm]} processes went on by themselves,"
            f" {count.stopped[harm]} stopped with the database's error"
        )
    print(f"  {count.taken_back} attempts were taken back from workers that were lost")
    print(f"  {verdict}")
    for problem in verdict.problems:
        print(f"    {problem}")
    return int(bool(verdict.problems))


def _burn(name: str, count: Count, share: float, chosen: random.Random) -> dict[str, Scenario]:
    """Try one scenario with each harm at each statement; return it for each case."""
    scenario, cases = SCENARIOS[name], {}

    def prepare(case: str) -> str:
        flow_runner.register_flow_template(
            FlowTemplate(case, tasks=scenario.tasks, max_running=scenario.max_running)
        )
        cases[case] = scenario
        if scenario.dies is not None:
            in_a_process(partial(scenario.dies, case))
        return case

    unharmed = prepare(f"{name}, unharmed")
    boundaries = count_statements(unharmed, scenario)
    in_a_process(partial(_run_to_its_end, unharmed, scenario))
    count.statements[name] = len(boundaries)
    for harm, number, after in faults.moments(connection.vendor, boundaries):
        what = harm.__name__
        if chosen.random() >= share:
            continue
        if harm is faults.pause and scenario.act not in (run, run_in_slices):
            continue
        case = prepare(f"{name}, {what} {'after' if after else 'before'} {number}")
        tried = partial(_try, case, harm, number, after)
        code = _take_over(tried, case) if harm is faults.pause else in_a_process(tried)
        count.faults[what] += 1
        count.went_on[what] += code == WENT_ON
        count.stopped[what] += code == STOPPED
        if code not in {WENT_ON, STOPPED, faults.DIED}:
            count.crashed.append(f"{case}: the process ended with {code}.")
        # At once: a worker looks up the plan of every flow that is ready, so that the flows of
        # other cases would add statements to this one's.
        if code := in_a_process(partial(_run_to_its_end, case, scenario)):
            count.crashed.append(f"{case}: the next worker ended with {code}.")
    return cases


def count_statements(case: str, scenario: Scenario) -> list[bool]:
    """Do it without a fault; return of each statement whether what it did was committed then."""
    read, write = os.pipe()

    def act() -> None:
        make_ready(case, scenario)
        fault = faults.Fault(connection)
        scenario.act(case)
        os.write(write, bytes(fault.boundaries))

    in_a_process(act)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        return [bool(item) for item in pipe.read()]


def _try(case: str, harm: faults.Harm, number: int, after: bool) -> int:
    scenario = SCENARIOS[case.split(",", maxsplit=1)[0]]
    make_ready(case, scenario)
    fault = faults.Fault(connection, harm, number, after=after)
    try:
        scenario.act(case)
    except (OperationalError, InterfaceError):
        return STOPPED
    return WENT_ON if fault.done else MISSED


def make_ready(case: str, scenario: Scenario) -> None:
    for act in scenario.before:
        act(case)
    connection.ensure_connection()


def _take_over(tried: Callable[[], int], case: str) -> int:
    """Have another process take the flow over from one that stops, and that one then go on.

    The other is in the middle of a task by then, so that nothing but the claim tells them apart.
    """
    stopped = start(tried)
    wait_for_its_stop(stopped)
    other = start(partial(run_and_stop_in_a_task, case))
    wait_for_its_stop(other)
    os.kill(stopped, signal.SIGCONT)
    # It waits for the other one where that is in an atomic task and the database is SQLite.
    until = time.monotonic() + 1
    while time.monotonic() < until and not has_ended(stopped):
        time.sleep(0.005)
    os.kill(other, signal.SIGCONT)
    return end(other) or end(stopped)


def run_and_stop_in_a_task(case: str) -> int:
    """Take the flow over, and stop in the middle of a task, or when there was none to run."""
    note = evidence.note

    def note_and_stop(event: str, context: ExecutionContext) -> None:
        note(event, context)
        evidence.note = note
        os.kill(os.getpid(), signal.SIGSTOP)

    evidence.note = note_and_stop
    expire(case)
    run(case)
    # Where nothing was left to be run, it stops here.
    if evidence.note is note_and_stop:
        os.kill(os.getpid(), signal.SIGSTOP)
    return 0


def _run_to_its_end(case: str, scenario: Scenario) -> None:
    """Be a sound worker that ends the flow."""
    if scenario.act is schedule:
        # Whoever got no answer asks again, with the same key.
        schedule(case)
    expire(case)
    run(case)


def _expected(cases: dict[str, Scenario], count: Count) -> dict[int, tuple[FlowStatus, ...]]:
    """Return how each flow may have ended."""
    count.taken_back = TaskExecution.objects.filter(error_type="TaskInterrupted").count()
    found = dict(FlowExecution.objects.values_list("pk", "template_name"))
    for case in cases.keys() - set(found.values()):
        count.crashed.append(f"{case}: the flow was lost.")
    return {pk: cases[case].ends for pk, case in found.items()}
