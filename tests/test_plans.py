"""The rule of plans: what a worker does with a flow that other code has scheduled."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbs_and_flows import FlowTemplate, InvalidFlowTemplate
from ebbs_and_flows.plans import Fit, Plan, difference, fit, offer


def plan(names: str, version: int = 1) -> Plan:
    return Plan.of("t", version, names)


@pytest.mark.parametrize(
    ("stored", "index", "code", "expected"),
    [
        # The same plan, at any place.
        ("abc", 0, "abc", Fit.TAKES),
        ("abc", 3, "abc", Fit.TAKES),
        # Appended: an older worker, and a newer one.
        ("abcn", 0, "abc", Fit.LEAVES),
        ("abc", 1, "abcn", Fit.TAKES),
        ("abc", 3, "abcn", Fit.TAKES),
        # Inserted, ahead of the flow and behind it.
        ("anb", 0, "ab", Fit.LEAVES),
        ("ab", 1, "anb", Fit.TAKES),
        ("ab", 2, "anb", Fit.LEAVES),
        # Removed, moved or renamed without a higher version.
        ("abc", 1, "ac", Fit.LEAVES),
        ("abc", 0, "acb", Fit.LEAVES),
        ("abc", 2, "abd", Fit.LEAVES),
    ],
)
def test_the_rule_within_a_version(stored: str, index: int, code: str, expected: Fit) -> None:
    assert fit(plan(stored), index, plan(code)) is expected


@pytest.mark.parametrize(
    ("stored", "index", "code", "expected"),
    [
        ("abc", 1, "ac", Fit.TAKES),
        ("abc", 1, "acb", Fit.TAKES),
        ("abc", 2, "abd", Fit.TAKES),
        ("abc", 2, "acb", Fit.FAILS),
        ("abc", 1, "nabc", Fit.FAILS),
    ],
)
def test_a_higher_version_decides_the_rest(
    stored: str, index: int, code: str, expected: Fit
) -> None:
    assert fit(plan(stored), index, plan(code, 2)) is expected


def test_a_lower_version_brings_nothing_back() -> None:
    assert fit(plan("ac", 2), 1, plan("abc", 1)) is Fit.LEAVES
    assert fit(plan("ac", 2), 1, plan("ac", 1)) is Fit.TAKES


plans = st.builds(
    plan,
    st.lists(st.sampled_from("abcde"), min_size=1, max_size=5, unique=True).map("".join),
    st.integers(1, 3),
)


@given(plans, plans, st.integers(0, 5))
def test_no_task_is_skipped_or_failed_without_a_higher_version(
    stored: Plan, code: Plan, index: int
) -> None:
    index = min(index, len(stored.task_names))
    verdict = fit(stored, index, code)
    is_newer = code.version > stored.version
    if verdict is not Fit.LEAVES and not is_newer:
        assert verdict is Fit.TAKES
        rest = [name for name in code.task_names[index:] if name in stored.task_names[index:]]
        assert rest == list(stored.task_names[index:])
    if verdict is Fit.TAKES:
        assert stored.task_names[:index] == code.task_names[:index]
    if is_newer:
        assert verdict is not Fit.LEAVES


@given(plans, plans)
def test_a_process_claims_what_it_does_not_leave(stored: Plan, code: Plan) -> None:
    offered = offer(stored, code)
    for index in range(len(stored.task_names) + 1):
        verdict = fit(stored, index, code)
        assert (verdict is not Fit.LEAVES) is (offered is not None and index <= offered.up_to)
        if offered is not None and verdict is not Fit.LEAVES:
            source = code if verdict is Fit.TAKES else stored
            names = source.task_names
            assert offered.task_at(index) == (names[index] if index < len(names) else None)


def test_the_first_difference_is_named() -> None:
    assert difference(plan("abc"), 2, plan("axc", 2)) == (
        "it completed 'b' as task 1, where template 't', version 2, has 'x'"
    )
    assert difference(plan("abc"), 0, plan("ab")) == (
        "its plan, version 1, has 'c' as task 2, where template 't', version 1, has no task"
    )


@pytest.mark.parametrize("version", [0, -1, True, "2", 1.0, None, 2**31])
def test_a_version_is_a_whole_number(version: object) -> None:
    with pytest.raises(InvalidFlowTemplate, match="give a whole number of 1 or more"):
        FlowTemplate("t", version=version)  # type: ignore[arg-type]
