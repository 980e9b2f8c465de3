"""Runs each shape of flow with a fault at its every statement, one process a fault."""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from django.db import InterfaceError, OperationalError, connection
from django.utils import timezone

from ebbs_and_flows import FlowStatus, FlowTemplate, Task, flow_runner
from ebbs_and_flows.models import FlowExecution

from . import evidence, faults, flows

ENDED, WENT_ON, STOPPED = 0, 4, 5
"""How a process ended: no fault came, it did its work all the same, it gave up for an error."""


# What the process that is tried does, with the template of its case


def schedule(case: str) -> None:
    flow_runner.schedule_flow(case, key=case)


def run(case: str) -> None:
    while flow_runner.run_next(templates=[case]) is not None:
        pass


def run_in_slices(case: str) -> None:
    while flow_runner.run_next(templates=[case], stop=lambda: True) is not None:
        pass


def reschedule(case: str) -> None:
    flow = FlowExecution.objects.get(template_name=case)
    if flow.status == FlowStatus.FAILED:
        flow_runner.reschedule_flow_execution(flow)


def complete_by_hand(case: str) -> None:
    flow = FlowExecution.objects.get(template_name=case)
    if flow.status == FlowStatus.FAILED:
        flow_runner.complete_failed_task(flow, reason="Paid in cash.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Something that is done to a flow, and what has become of it when all is over."""

    tasks: list[Task]
    act: Callable[[str], None] = run
    # Done before, each in a process of its own and without a fault.
    before: tuple[Callable[[str], None], ...] = (schedule,)
    ends: tuple[FlowStatus, ...] = (FlowStatus.SUCCEEDED,)


_FAILED = {"tasks": [flows.first, flows.fail], "ends": (FlowStatus.FAILED,)}

SCENARIOS = {
    "run": Scenario(tasks=[flows.first, flows.flaky, flows.book, flows.last]),
    "in slices": Scenario(tasks=[flows.first, flows.last], act=run_in_slices),
    "failure": Scenario(**_FAILED),
    "cancellation": Scenario(
        tasks=[flows.first, flows.cancel, flows.last], ends=(FlowStatus.CANCELLED,)
    ),
    "recovery": Scenario(
        tasks=[flows.kill_worker_once, flows.last],
        before=(schedule, run, lambda case: expire(case)),
    ),
    "scheduling": Scenario(tasks=[flows.first], act=schedule, before=()),
    "rescheduling": Scenario(**_FAILED, act=reschedule, before=(schedule, run)),
    "done by hand": Scenario(
        tasks=[flows.fail, flows.last], act=complete_by_hand, before=(schedule, run),
        ends=(FlowStatus.SUCCEEDED, FlowStatus.FAILED),
    ),
}  # fmt: skip


def expire(case: str | None = None) -> int:
    """Have leases expire without waiting for it; return how many."""
    held = FlowExecution.objects.filter(lease_expires_at__isnull=False)
    if case is not None:
        held = held.filter(template_name=case)
    return held.update(lease_expires_at=timezone.now() - timedelta(hours=1))


@dataclass(slots=True)
class Count:
    """What was done, and how the processes took it."""

    statements: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    went_on: Counter[str] = field(default_factory=Counter)
    stopped: Counter[str] = field(default_factory=Counter)
    taken_back: int = 0
    crashed: list[str] = field(default_factory=list)


def main(name: str) -> int:
    """Try all of it on the database that is set up; print the figures, return the exit code."""
    started, count = time.monotonic(), Count()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        os.environ[evidence.LOG] = str(log)
        cases = {}
        for scenario in SCENARIOS:
            cases |= _burn(scenario, count)
        expected = _finish(cases, count)
        verdict = evidence.Court(expected, log).judge()
    verdict.unsound += count.crashed
    statements = ", ".join(f"{number} of {what}" for what, number in count.statements.items())
    print(f"{name}: every statement ({statements}) in {time.monotonic() - started:.0f} s")
    for harm, number in count.faults.items():
        print(
            f"  {harm}: {number} times; {count.went_on[harm]} processes went on by themselves,"
            f" {count.stopped[harm]} stopped with the database's error"
        )
    print(f"  {count.taken_back} flows were taken back from workers that were lost")
    print(f"  {verdict}")
    for problem in verdict.problems:
        print(f"    {problem}")
    return int(bool(verdict.problems))


def _burn(name: str, count: Count) -> dict[str, Scenario]:
    """Try one scenario with each harm at each statement; return it for each case."""
    scenario, cases = SCENARIOS[name], {}
    for harm in faults.HARMS[connection.vendor]:
        for after in (False, True) if harm in faults.AFTER else (False,):
            number, code = 0, WENT_ON
            while code != ENDED:
                number += 1
                case = f"{name}: {harm.__name__} {'after' if after else 'before'} {number}"
                flow_runner.register_flow_template(FlowTemplate(case, tasks=scenario.tasks))
                cases[case] = scenario
                for act in scenario.before:
                    _in_a_process(lambda act=act, case=case: act(case))
                code = _in_a_process(lambda case=case: _try(case, scenario, number, after, harm))
                count.went_on[harm.__name__] += code == WENT_ON
                count.stopped[harm.__name__] += code == STOPPED
                count.faults[harm.__name__] += code != ENDED
                if code not in {ENDED, WENT_ON, STOPPED, faults.DIED}:
                    count.crashed.append(f"{case}: the process ended with {code}.")
            count.statements[name] = number - 1
    return cases


def _try(case: str, scenario: Scenario, number: int, after: bool, harm: faults.Harm) -> int:
    connection.ensure_connection()
    fault = faults.Fault(connection, number, after=after, harm=harm)
    try:
        scenario.act(case)
    except (OperationalError, InterfaceError):
        return STOPPED
    return WENT_ON if fault.done else ENDED


def _in_a_process(act: Callable[[], int | None]) -> int:
    """Do it in a process of its own; return the exit code. This one holds no connection."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        code = act() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _finish(cases: dict[str, Scenario], count: Count) -> dict[int, tuple[FlowStatus, ...]]:
    """Have a sound worker end all flows; return how each flow may have ended."""
    for case, scenario in cases.items():
        if scenario.act is schedule:
            # Whoever got no answer asks again, with the same key.
            flow_runner.schedule_flow(case, key=case)
    count.taken_back = expire()
    run_all()
    return {
        pk: cases[template].ends
        for pk, template in FlowExecution.objects.values_list("pk", "template_name")
    }


def run_all() -> None:
    while flow_runner.run_next() is not None:
        pass
