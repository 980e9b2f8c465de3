"""Pauses a worker before each statement, has another actor do one whole thing, and resumes it.

The pause may be in the middle of a transaction. Then the actor may wait for its locks, so the
worker is resumed after a moment in any case. I1 to I6 must hold for every pair.
"""

from __future__ import annotations

import logging
import os
import random
import re
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path

from django.db import DatabaseError, connection

from ebbs_and_flows import (
    EbbsAndFlowsError,
    FlowRunner,
    FlowStatus,
    FlowTemplate,
    Task,
    flow_runner,
)
from ebbs_and_flows.models import FlowExecution, TaskExecution
from ebbs_and_flows.status import FINISHED

from . import evidence, faults, flows
from .every_statement import (
    SCENARIOS,
    Scenario,
    count_statements,
    expire,
    make_ready,
    reschedule,
    run,
    run_and_stop_in_a_task,
)
from .processes import end, has_ended, has_stopped, in_a_process, start, wait_for_its_stop

PATIENCE = 0.3
"""Seconds that the actor gets while the worker is paused; it may wait for the worker's locks."""
TOO_LONG = 60.0
"""Seconds after which a process that does not end counts as stuck."""

REFUSED = 6
"""The exit code of an actor that came too early or too late, and was told so."""

PAUSED = ("run", "in slices", "limited", "failure", "cancellation", "recovery")
"""The scenarios whose worker is paused: claim, step, failure, hand-back, cancel, recovery."""


class NotDone(Exception):
    """There was nothing that an actor could do."""


# What the other actor does, one whole thing


def _flow(case: str) -> FlowExecution:
    # A fork has the same template; the flow of the case came first.
    return FlowExecution.objects.filter(template_name=case).order_by("pk")[0]


def recover(case: str) -> None:
    expire(case)
    flow_runner.service.recover_expired()


def recover_and_claim(case: str) -> None:
    expire(case)
    run(case)


def take_over(case: str) -> None:
    """Be a second worker that is in the middle of a task when the first one goes on.

    So nothing but the claim tells the two apart.
    """
    run_and_stop_in_a_task(case)


def step(case: str) -> None:
    """Be a second worker that does one task, where the flow is free."""
    flow_runner.run_next(templates=[case], stop=lambda: True)


def cancel(case: str) -> None:
    flow_runner.cancel_flow_execution(_flow(case))


def bulk_cancel(case: str) -> None:
    if not flow_runner.cancel_flow_executions([_flow(case).pk]):
        raise NotDone


def bulk_reschedule(case: str) -> None:
    flow_runner.reschedule_flow_executions([_flow(case).pk])


def complete_by_hand(case: str) -> None:
    flow_runner.complete_failed_task(_flow(case), reason="Paid in cash.")


def fork(case: str) -> None:
    flow_runner.fork_flow_execution(_flow(case), changes={"forked": True})


def prune(case: str) -> None:
    flow_runner.service.prune_finished(timedelta(0), template_name=case)


def delete(case: str) -> None:
    _flow(case).delete()


def pause_template(case: str) -> None:
    flow_runner.pause_flow_template(case)


def deploy_newer(case: str) -> None:
    """Be a worker of the next release, which has one task more."""
    expire(case)
    _run_release(case, [*_scenario(case).tasks, flows.appended])


def deploy_older(case: str) -> None:
    """Be a worker of the release before, which lacked the last task."""
    expire(case)
    _run_release(case, _scenario(case).tasks[:-1] or [flows.appended])


def _run_release(case: str, tasks: list[Task]) -> None:
    runner = FlowRunner()
    runner.register_flow_template(FlowTemplate(case, tasks=tasks))
    while runner.run_next() is not None:
        pass


def _scenario(case: str) -> Scenario:
    return SCENARIOS[case.split(",", maxsplit=1)[0]]


ACTORS: tuple[Callable[[str], None], ...] = (
    recover,
    recover_and_claim,
    take_over,
    step,
    cancel,
    bulk_cancel,
    reschedule,
    bulk_reschedule,
    complete_by_hand,
    fork,
    prune,
    delete,
    pause_template,
    deploy_newer,
    deploy_older,
)


CANCELLING = (cancel, bulk_cancel)
EXPIRING = (recover, recover_and_claim, take_over, deploy_newer, deploy_older)
"""Those that have a lease expire; no other flow may be taken back from its worker."""


@dataclass(slots=True)
class Count:
    """How many pairs there are, were tried, and how the processes took it."""

    statements: Counter[str] = field(default_factory=Counter)
    tried: Counter[str] = field(default_factory=Counter)
    waited: int = 0
    # The worker had ended before: two runs are not the same to the statement.
    missed: int = 0
    # The cases whose flow was cancelled, or is to be.
    cancelled: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def main(name: str, *, most: int | None, seed: int) -> int:
    """Try each pair, or `most` of them, chosen by the seed; return the exit code."""
    started, count = time.monotonic(), Count()
    logging.getLogger("ebbs_and_flows").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        os.environ[evidence.LOG] = str(log)
        pairs = [
            (scenario, number, actor)
            for scenario in PAUSED
            for number in range(1, _count(scenario, count) + 1)
            for actor in ACTORS
        ]
        if most is not None and most < len(pairs):
            pairs = random.Random(seed).sample(pairs, most)
        cases = [f"{scenario}, {number}, {actor.__name__}" for scenario, number, actor in pairs]
        for case, (_scenario_name, number, actor) in zip(cases, pairs, strict=True):
            _try(case, number, actor, count)
            # At once: the flows of other cases would add statements, as a worker looks up the plan
            # of every flow that is ready. A fork of the task that kills its worker does so again.
            while in_a_process(partial(_run_to_its_end, case)) == -signal.SIGKILL:
                pass
        _look_for_lost_flows(cases, count)
        templates = dict(FlowExecution.objects.values_list("pk", "template_name"))
        expected = {pk: _ends(case) for pk, case in templates.items()}
        gone = {line.flow for line in evidence.read_log(log)} - expected.keys()
        verdict = evidence.Court(expected, log, gone=gone).judge()
        _judge_cancellations(count)
        _judge_recoveries(count)
    statements = ", ".join(f"{number} of {what}" for what, number in count.statements.items())
    print(
        f"{name}: all pairs, {count.tried.total()} of {count.statements.total() * len(ACTORS)}"
        f" ({statements}; {len(ACTORS)} actors; seed {seed})"
        f" in {time.monotonic() - started:.0f} s;"
        f" in {count.waited} the actor waited for the worker, {count.missed} came too late"
    )
    print(f"  {verdict}")
    for problem in [*count.problems, *(_named(item, templates) for item in verdict.problems)]:
        print(f"    {problem}")
    return int(bool(count.problems or verdict.problems))


def _actor(case: str) -> str:
    return case.rpartition(", ")[2]


def _ends(case: str) -> set[FlowStatus]:
    """Return how the flows of a case may end."""
    ends = set(_scenario(case).ends)
    if _actor(case) in [actor.__name__ for actor in CANCELLING]:
        ends.add(FlowStatus.CANCELLED)
    if _actor(case) == complete_by_hand.__name__:
        ends.add(FlowStatus.SUCCEEDED)
    return ends


def _judge_cancellations(count: Count) -> None:
    """No cancellation that was accepted is forgotten."""
    for case in count.cancelled:
        flow = _flow(case)
        last = flow.transitions.order_by("pk").last()
        is_too_late = last is not None and "came too late" in last.reason
        if flow.status != FlowStatus.CANCELLED and not is_too_late:
            count.problems.append(f"{case}: it was cancelled, and is {flow.status}.")


def _judge_recoveries(count: Count) -> None:
    """No flow was taken back from a worker that held it."""
    rows = TaskExecution.objects.filter(error_type="TaskInterrupted")
    for case in rows.values_list("flow_execution__template_name", flat=True):
        is_expired = _actor(case) in [actor.__name__ for actor in EXPIRING]
        if not is_expired and _scenario(case).dies is None:
            count.problems.append(f"{case}: it was taken back from a worker that held it.")


def _named(problem: str, templates: dict[int, str]) -> str:
    """Return a problem with the case of the flow whose number is in it."""
    numbers = re.findall(r"(?:[Ff]low |#)(\d+)", problem)
    found = [templates[int(pk)] for pk in numbers[:1] if int(pk) in templates]
    return f"{problem} [{', '.join(found)}]"


def _register(case: str, scenario: Scenario) -> None:
    flow_runner.register_flow_template(
        FlowTemplate(case, tasks=scenario.tasks, max_running=scenario.max_running)
    )


def _count(name: str, count: Count) -> int:
    case, scenario = f"{name}, not paused", SCENARIOS[name]
    _register(case, scenario)
    if scenario.dies is not None:
        in_a_process(partial(scenario.dies, case))
    count.statements[name] = len(count_statements(case, scenario))
    return count.statements[name]


def _try(case: str, number: int, actor: Callable[[str], None], count: Count) -> None:
    scenario = _scenario(case)
    _register(case, scenario)
    if scenario.dies is not None:
        in_a_process(partial(scenario.dies, case))
    worker = start(partial(_work, case, scenario, number))
    wait_for_its_stop(worker)
    count.missed += has_ended(worker)
    other = start(partial(_act, case, actor))
    count.waited += not _within(PATIENCE, partial(has_stopped, other))
    with suppress(ProcessLookupError):
        os.kill(worker, signal.SIGCONT)
    if actor is take_over:
        # The worker may wait for the other one, which is in the middle of an atomic task.
        _ends_within(worker, 1)
    count.tried[actor.__name__] += 1
    for who, pid in (("worker", worker), ("actor", other)):
        resume = partial(os.kill, other, signal.SIGCONT) if actor is take_over else None
        if not _ends_within(pid, TOO_LONG, resume):
            count.problems.append(f"{case}: the {who} was stuck.")
            os.kill(pid, signal.SIGKILL)
        code = end(pid)
        if who == "actor" and code == 0 and actor in CANCELLING:
            count.cancelled.append(case)
        if code not in (0, -signal.SIGKILL) and (who, code) != ("actor", REFUSED):
            count.problems.append(f"{case}: the {who} ended with {code}.")


def _ends_within(pid: int, seconds: float, meanwhile: Callable[[], None] | None = None) -> bool:
    def has_come() -> bool:
        # Until then its id is its own.
        if meanwhile is not None:
            meanwhile()
        return has_ended(pid)

    return _within(seconds, has_come)


def _within(seconds: float, condition: Callable[[], bool]) -> bool:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= until:
            return False
        time.sleep(0.002)
    return True


def _work(case: str, scenario: Scenario, number: int) -> None:
    make_ready(case, scenario)
    faults.Fault(connection, faults.pause, number, in_transactions=True)
    scenario.act(case)


def _act(case: str, actor: Callable[[str], None]) -> int:
    try:
        actor(case)
    except (EbbsAndFlowsError, IndexError, NotDone):
        return REFUSED
    except DatabaseError:
        # Two writers were in each other's way: this one is refused, and the user tries again.
        if actor is not delete:
            raise
        return REFUSED
    return 0


def _look_for_lost_flows(cases: list[str], count: Count) -> None:
    stored = dict(FlowExecution.objects.order_by("-pk").values_list("template_name", "status"))
    for case in cases:
        if case not in stored and not case.endswith(("prune", "delete")):
            count.problems.append(f"{case}: the flow was lost.")
    for case, status in stored.items():
        if status not in FINISHED:
            count.problems.append(f"{case}: the flow stays {status} (I1).")


def _run_to_its_end(case: str) -> None:
    """Be a sound worker of the newest release that ends all flows of a case."""
    newest = FlowRunner()
    expire(case)
    newest.register_flow_template(
        FlowTemplate(case, tasks=[*_scenario(case).tasks, flows.appended])
    )
    newest.resume_flow_template(case)
    while newest.run_next() is not None:
        pass
