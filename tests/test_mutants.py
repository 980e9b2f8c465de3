"""The mutation tester: which changes it makes, and that it makes them."""

from __future__ import annotations

import os
from functools import cache

import pytest

from ebbs_and_flows.repository import steps

from .mutants import sql
from .mutants.plugin import apply
from .mutants.scope import FILES, PACKAGE, all_mutants

changes = cache(lambda file: {(item.function, item.change) for item in all_mutants([file])})


@pytest.mark.parametrize(
    ("file", "function", "change"),
    [
        ("repository/steps.py", "_FENCE", "without the condition status = 'RUNNING'"),
        ("repository/steps.py", "_FENCE", "without the condition claim = %s"),
        ("repository/steps.py", "StepRepository.held", "without claim= in: self.flows.filter()"),
        ("repository/steps.py", "StepRepository.held", "without status= in: self.flows.filter()"),
        (
            "repository/steps.py",
            "StepRepository.renew",
            "without lease_expires_at__isnull= in: self.held(flow_id, claim).filter()",
        ),
        (
            "repository/steps.py",
            "StepRepository.finish_attempt",
            "without status= in: self.attempts.filter()",
        ),
        (
            "worker.py",
            "Worker._interrupt",
            "without flow.claim == run.claim in: flow is not None and flow.claim == run.claim",
        ),
        (
            "repository/claims.py",
            "ClaimRepository._claim_in_one",
            "id, status {best} {order} FOR UPDATE SKIP LOCKED: now -",
        ),
        (
            "service.py",
            "FlowService._change_batch",
            "without .filter() in: flows.filter(pk__in=batch)",
        ),
    ],
)
def test_the_protocols_conditions_are_among_what_is_changed(
    file: str, function: str, change: str
) -> None:
    assert (function, change) in changes(file)


def test_a_change_of_sql_keeps_the_number_of_parameters() -> None:
    text = "UPDATE flow SET a = %s, b = %s WHERE id = %s AND (c = %s OR d IS NULL) ORDER BY e"
    changed = [new for _change, new in sql.changes(text)]
    assert "UPDATE flow SET a = %s, b = %s WHERE (id = %s OR 1 = 1)" in changed[0]
    assert len(set(changed)) == len(changed) >= 7
    assert {new.count("%s") for new in changed} == {4}
    assert not list(sql.changes("Put the tasks back as they were."))


def test_the_functions_left_out_exist() -> None:
    for file, left_out in FILES.items():
        source = (PACKAGE / file).read_text()
        assert [name for name in left_out if name not in source] == []


def test_a_change_is_made_in_memory() -> None:
    mutant = next(
        item
        for item in all_mutants(["repository/steps.py"])
        if item.function == "_FENCE" and "RUNNING" in item.change
    )
    before = steps._FENCE
    pid = os.fork()
    if pid == 0:
        try:
            apply(mutant)
        finally:
            os._exit(0 if "OR 1 = 1" in steps._FENCE and "IS TRUE" in steps._FENCE_IN_ONE else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert before == steps._FENCE
