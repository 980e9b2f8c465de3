"""The plan of a flow, and whether the running code may go on with it. Plain Python."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache

ANYWHERE = 2**31 - 1
"""A limit that no task's position reaches."""


class Fit(Enum):
    """What a worker does with a flow."""

    TAKES = "takes"
    # Other workers may have the code that fits.
    LEAVES = "leaves"
    FAILS = "fails"


@dataclass(frozen=True, slots=True)
class Plan:
    """The tasks that a flow has, with its template's name and version.

    A flow stores the plan of the code that scheduled it; a template in memory has one, too.
    """

    template_name: str
    version: int
    task_names: tuple[str, ...]
    # Tells plans apart in one short column.
    digest: str = field(init=False, compare=False, repr=False, default="")

    def __post_init__(self) -> None:
        text = json.dumps([self.template_name, self.version, self.task_names])
        digest = hashlib.sha256(text.encode()).hexdigest()[:32]
        object.__setattr__(self, "digest", digest)

    @classmethod
    def of(cls, template_name: str, version: int, task_names: Iterable[str]) -> Plan:
        """Return the plan, made once for equal values."""
        return _plan(template_name, version, tuple(task_names))


@lru_cache(maxsize=1024)
def _plan(template_name: str, version: int, task_names: tuple[str, ...]) -> Plan:
    return Plan(template_name, version, task_names)


@dataclass(frozen=True, slots=True)
class Offer:
    """The flows of one plan that a process may claim."""

    plan: Plan
    # The plan of the process's own code.
    code: Plan
    # The task to start, by the index that a flow has reached; None ends the flow.
    starts: tuple[str | None, ...]
    # The highest index at which a flow of the plan may be claimed.
    up_to: int = ANYWHERE
    # As it is stored: somebody may have changed a flow's columns by hand.
    stored_digest: str = ""

    @property
    def digest(self) -> str:
        """The digest by which the flows are found."""
        return self.stored_digest or self.plan.digest

    def task_at(self, index: int) -> str | None:
        """Return the name of the task that a claim at that index starts."""
        return self.starts[index] if index < len(self.starts) else None


def fit(stored: Plan, index: int, code: Plan) -> Fit:
    """Return what a worker with `code` does with a flow that has completed `index` tasks.

    It takes the flow if the completed tasks are its own first ones, and if it has all that the
    stored plan still holds, in this order; code of a higher version decides the rest by itself,
    and fails the flow if the completed tasks are not its first ones.
    """
    if stored == code:
        return Fit.TAKES
    is_newer = code.version > stored.version
    if stored.task_names[:index] != code.task_names[:index]:
        return Fit.FAILS if is_newer else Fit.LEAVES
    left, own = stored.task_names[index:], code.task_names[index:]
    if is_newer or left == own:
        return Fit.TAKES
    # What a higher version has taken out, an older one must not bring back.
    if code.version == stored.version and _is_subsequence(left, own):
        return Fit.TAKES
    return Fit.LEAVES


@lru_cache(maxsize=1024)
def offer(stored: Plan, code: Plan) -> Offer | None:
    """Return which flows of a stored plan a process with `code` claims; None if it claims none."""
    if stored.template_name != code.template_name:
        return None
    if stored == code:
        return Offer(stored, code, code.task_names)
    same = common_prefix(stored.task_names, code.task_names)
    own: list[str | None] = [*code.task_names[: same + 1]]
    own += [None] * (same + 1 - len(own))
    # Further on the flow fails, at the task that it has reached by its own plan.
    starts = (*own, *stored.task_names[same + 1 :])
    if code.version > stored.version:
        return Offer(stored, code, starts)
    # Once a flow has come too far, it stays so: the indexes that fit are the first ones.
    taken = [
        index
        for index in range(len(stored.task_names) + 1)
        if fit(stored, index, code) is Fit.TAKES
    ]
    return Offer(stored, code, starts, max(taken)) if taken else None


def common_prefix(one: Sequence[str], other: Sequence[str]) -> int:
    """Return how many of the first tasks are the same."""
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return length


def difference(stored: Plan, index: int, code: Plan) -> str:
    """Return a sentence with the first difference that keeps `code` from the flow."""
    same = common_prefix(stored.task_names, code.task_names)
    has = f"has {code.task_names[same]!r}" if same < len(code.task_names) else "has no task"
    if same < index:
        return (
            f"it completed {stored.task_names[same]!r} as task {same}, where template"
            f" {code.template_name!r}, version {code.version}, {has}"
        )
    if same < len(stored.task_names):
        own = f"has {stored.task_names[same]!r} as task {same}"
    else:
        own = f"has no task {same}"
    return (
        f"its plan, version {stored.version}, {own}, where template {code.template_name!r},"
        f" version {code.version}, {has}"
    )


def _is_subsequence(names: Sequence[str], of: Sequence[str]) -> bool:
    others = iter(of)
    return all(name in others for name in names)
