"""Puts a worker into a network namespace of its own and breaks its link to the database server.

The link breaks before each statement of a run: cut, dropped one way, or cut for a moment, which
delays what was sent by seconds. Meanwhile the lease expires and another worker takes the flow.
Then the link works again, and what the first worker had sent arrives late.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from django.conf import settings
from django.db import connection

from ebbs_and_flows import FlowStatus, FlowTemplate, flow_runner
from ebbs_and_flows.models import FlowExecution
from ebbs_and_flows.status import FINISHED

from . import evidence, faults, flows, links
from .every_statement import Scenario, count_statements, make_ready, run, run_in_slices
from .processes import end, has_ended, in_a_process, start, wait_for_its_stop

SCENARIOS = {
    "run": Scenario(tasks=[flows.first, flows.flaky, flows.book, flows.last]),
    "in slices": Scenario(tasks=[flows.first, flows.last], act=run_in_slices),
}
TOO_LONG = 60.0


BREAKS: tuple[Callable[[], None], ...] = (links.cut, links.drop_to_server, links.drop_to_worker)


def main(name: str, *, most: int | None, seed: int) -> int:
    """Break the link at each statement, or at `most` of them; return the exit code."""
    started, problems = time.monotonic(), []
    logging.getLogger("ebbs_and_flows").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        os.environ[evidence.LOG] = str(log)
        cases = [
            (f"{scenario}, {number}, {broken.__name__}, {'delayed' if brief else 'lost'}")
            for scenario in SCENARIOS
            for number in range(1, _count(scenario) + 1)
            for broken in BREAKS
            for brief in (True, False)
        ]
        total = len(cases)
        if most is not None and most < total:
            cases = random.Random(seed).sample(cases, most)
        for case in cases:
            problems += _try(case)
        problems += _finish(cases)
        ids = list(FlowExecution.objects.values_list("pk", flat=True))
        verdict = evidence.Court(dict.fromkeys(ids, (FlowStatus.SUCCEEDED,)), log).judge()
    print(
        f"{name}: networks, {len(cases)} of {total} cases, seed {seed},"
        f" in {time.monotonic() - started:.0f} s"
    )
    print(f"  {verdict}")
    for problem in [*problems, *verdict.problems]:
        print(f"    {problem}")
    return int(bool(problems or verdict.problems))


def _register(case: str) -> Scenario:
    scenario = SCENARIOS[case.split(",", maxsplit=1)[0]]
    if case not in flow_runner.templates:
        flow_runner.register_flow_template(FlowTemplate(case, tasks=scenario.tasks))
    return scenario


def _count(name: str) -> int:
    case = f"{name}, not broken"
    return len(count_statements(case, _register(case)))


def _try(case: str) -> list[str]:
    _name, number, broken, how_long = case.split(", ")
    scenario = _register(case)
    lease = float(settings.EBBS_AND_FLOWS["LEASE_SECONDS"])
    worker = start(partial(_work, case, scenario, int(number)))
    wait_for_its_stop(worker)
    if has_ended(worker):
        return [f"{case}: the worker ended with {end(worker)} before the link broke."]
    {item.__name__: item for item in BREAKS}[broken]()
    os.kill(worker, signal.SIGCONT)
    try:
        if how_long == "delayed":
            time.sleep(lease / 2)
        else:
            time.sleep(lease + 0.2)
            in_a_process(partial(run, case))
    finally:
        links.repair()
    until = time.monotonic() + TOO_LONG
    while not has_ended(worker):
        if time.monotonic() > until:
            os.kill(worker, signal.SIGKILL)
            end(worker)
            return [f"{case}: the worker was stuck."]
        time.sleep(0.01)
    code = end(worker)
    return [] if code in (0, 5) else [f"{case}: the worker ended with {code}."]


def _work(case: str, scenario: Scenario, number: int) -> int:
    links.enter()
    connection.settings_dict["HOST"] = links.HERE
    make_ready(case, scenario)
    faults.Fault(connection, faults.pause, number, in_transactions=True)
    try:
        scenario.act(case)
    except faults.DATABASE_AWAY:
        # The whole lease passed without the database: another worker recovers the flow.
        return 5
    return 0


def _finish(cases: list[str]) -> list[str]:
    until = time.monotonic() + TOO_LONG
    waiting = list(cases)
    while waiting and time.monotonic() < until:
        for case in waiting:
            run(case)
        over = [str(status) for status in FINISHED]
        left = FlowExecution.objects.filter(template_name__in=cases).exclude(status__in=over)
        waiting = list(left.values_list("template_name", flat=True))
        time.sleep(0.1 if waiting else 0)
    return [f"{case}: the flow is not over (I1)." for case in waiting]
