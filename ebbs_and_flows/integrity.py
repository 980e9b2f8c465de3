"""Verifies over the stored records what the execution of flows promises, I1 to I6."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from django.db.models import F

from .models import ExecutionContextEntry, FlowExecution, FlowTransition, TaskExecution
from .repository import FlowRepository
from .status import ALLOWED_TRANSITIONS, FINISHED, WAITING, FlowStatus, TaskStatus

BATCH_SIZE = 500
"""How many flows are held in memory at once, with their attempts and transitions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing in a flow's records that cannot be."""

    flow_id: int
    template_name: str
    invariant: str
    """I1 to I6."""
    sentence: str

    def __str__(self) -> str:
        return f"{self.template_name} #{self.flow_id}, {self.invariant}: {self.sentence}"


@dataclass(slots=True)
class Records:
    """All that is stored of one flow, but the entries that are as they must be."""

    flow: FlowExecution
    attempts: list[TaskExecution] = field(default_factory=list)
    transitions: list[tuple[str, str]] = field(default_factory=list)
    # Entries of an attempt that has not succeeded, is another flow's or does not exist.
    stray_entries: list[str] = field(default_factory=list)
    repeated_entries: list[str] = field(default_factory=list)

    @property
    def by_name(self) -> dict[str, list[TaskExecution]]:
        """The attempts in their order, by the name of their task."""
        found: dict[str, list[TaskExecution]] = {}
        for row in self.attempts:
            found.setdefault(row.task_name, []).append(row)
        return found

    @property
    def succeeded(self) -> set[str]:
        """The names of the tasks that succeeded."""
        return {row.task_name for row in self.attempts if row.status == TaskStatus.SUCCEEDED}


Said = Iterator[str]


def is_over_or_due(of: Records) -> Said:
    """I1: a flow is over, waits, or is running, and one that succeeded has done all its tasks."""
    flow = of.flow
    if flow.status not in {*FINISHED, *WAITING, FlowStatus.RUNNING}:
        yield f"It is {flow.status}, and no worker will ever take it."
    if flow.lease_expires_at is not None and flow.status != FlowStatus.RUNNING:
        yield f"It is {flow.status}, and yet leased to {flow.claimed_by or 'somebody'}."
    if flow.lease_expires_at is not None and flow.ready_rank is not None:
        yield "It is held and ranked as ready, and would not be taken back from a lost worker."
    if flow.is_finished is (flow.finished_at is None):
        when = flow.finished_at or "no time"
        yield f"It is {flow.status}, and {when} is stored as its end."
    if flow.status == FlowStatus.SUCCEEDED and flow.current_task_index != len(flow.task_names):
        yield (
            f"It is SUCCEEDED at task {flow.current_task_index}, and has {len(flow.task_names)}"
            f" tasks."
        )


def nothing_follows_a_success(of: Records) -> Said:
    """I2: a task that succeeded is not started again."""
    for name, attempts in of.by_name.items():
        for row in attempts[:-1]:
            if row.status == TaskStatus.SUCCEEDED:
                yield (f"Task {name} succeeded in attempt {row.attempt} and was started again.")
    for name in of.flow.task_names[of.flow.current_task_index :]:
        if name in of.succeeded:
            yield f"Task {name} has succeeded, and the flow is to start it again."


def attempts_do_not_overlap(of: Records) -> Said:
    """I3: one attempt after the other, and no task before the one ahead of it succeeded."""
    flow = of.flow
    for before, after in pairwise(of.attempts):
        # What a worker wrote after its claim was taken over is for I6.
        if (
            before.claim == after.claim
            and before.finished_at
            and after.started_at < before.finished_at
        ):
            yield f"{_name(after)} was started before {_name(before)} had ended."
        if after.claim < before.claim:
            yield (
                f"{_name(after)} has claim {after.claim}, below {before.claim} of {_name(before)}."
            )
    reached = max([flow.current_task_index, *(row.task_index for row in of.attempts)])
    names = flow.task_names
    if flow.status == FlowStatus.SUCCEEDED:
        reached = max(reached, len(names))
    for index in range(flow.first_task_index, reached):
        name = names[index] if index < len(names) else "?"
        if name not in of.succeeded:
            yield f"Task {name} has not succeeded, and the flow went on behind it."
    if of.attempts and of.attempts[0].task_index < flow.first_task_index:
        yield f"{_name(of.attempts[0])} is ahead of task {flow.first_task_index}, its first."
    yield from _running_attempts(of)


def _running_attempts(of: Records) -> Said:
    flow = of.flow
    running = [row for row in of.attempts if row.status == TaskStatus.RUNNING]
    held = flow.status == FlowStatus.RUNNING and flow.lease_expires_at is not None
    if len(running) > 1:
        yield f"{len(running)} attempts are running: {', '.join(map(_name, running))}."
    if held and not running:
        yield f"Worker {flow.claimed_by} holds it, and no attempt is running."
    for row in running:
        if not held:
            yield f"{_name(row)} is running, and no worker holds the flow, which is {flow.status}."
        elif (row.task_index, row.claim) != (flow.current_task_index, flow.claim):
            yield (
                f"{_name(row)} is running under claim {row.claim}, and the flow is at task"
                f" {flow.current_task_index} under claim {flow.claim}."
            )


def entries_are_written_once(of: Records) -> Said:
    """I4: every entry was written once, by a success or at scheduling."""
    for name in of.repeated_entries:
        yield f"The entry {name!r} is stored more than once."
    for name in of.stray_entries:
        yield f"The entry {name!r} was not written by an attempt of the flow that succeeded."


def transitions_form_a_path(of: Records) -> Said:
    """I5: the recorded transitions lead from the creation to the status that the flow has."""
    at = ""
    for from_status, to_status in of.transitions:
        if from_status != at:
            yield f"It was {at or 'new'}, and a transition leads from {from_status or 'nothing'}."
        # An act of an operator that leaves the status as it is.
        is_act = bool(from_status) and to_status == from_status
        if not is_act and to_status not in _may_follow(from_status):
            yield f"It went from {from_status or 'nothing'} to {to_status}, which is not allowed."
        at = to_status
    if at != of.flow.status:
        yield f"It is {of.flow.status}, and its transitions lead to {at or 'nothing'}."


def _may_follow(status: str) -> frozenset[FlowStatus]:
    if not status:
        return frozenset({FlowStatus.CREATED})
    # A row may hold a text that is no status at all.
    known = status in FlowStatus.values
    return ALLOWED_TRANSITIONS[FlowStatus(status)] if known else frozenset()


def no_write_after_a_takeover(of: Records) -> Said:
    """I6: claims and attempts are counted without gaps, and a lost claim writes nothing."""
    for row in of.attempts:
        if row.claim > of.flow.claim:
            yield f"{_name(row)} has claim {row.claim}, above {of.flow.claim} of the flow."
    for before, after in pairwise(of.attempts):
        if (
            before.claim != after.claim
            and before.finished_at
            and after.started_at < before.finished_at
        ):
            yield (
                f"The end of {_name(before)} was written after {_name(after)} had been started"
                f" under claim {after.claim}."
            )
    for name, attempts in of.by_name.items():
        numbers = [row.attempt for row in attempts]
        if numbers != list(range(1, len(numbers) + 1)):
            yield f"Task {name} has attempts {', '.join(map(str, numbers))}."


INVARIANTS: dict[str, Callable[[Records], Said]] = {
    "I1": is_over_or_due,
    "I2": nothing_follows_a_success,
    "I3": attempts_do_not_overlap,
    "I4": entries_are_written_once,
    "I5": transitions_form_a_path,
    "I6": no_write_after_a_takeover,
}


def _name(row: TaskExecution) -> str:
    return f"{row.task_name} (task {row.task_index}, attempt {row.attempt})"


class IntegrityCheck:
    """Reads flows in batches and says what cannot be; `checked` counts the flows.

    Workers may go on meanwhile: what looks wrong is looked at again while nobody can write to
    that flow.
    """

    def __init__(
        self, *, template_name: str | None = None, repository: FlowRepository | None = None
    ) -> None:
        self.checked = 0
        self._template_name = template_name
        self._repository = repository or FlowRepository()

    def findings(self) -> Iterator[Finding]:
        """Yield what is found, flow by flow: five queries a batch, and five for each suspect."""
        last = 0
        flows = self._repository.flows.order_by("pk")
        if self._template_name is not None:
            flows = flows.filter(template_name=self._template_name)
        while batch := list(flows.filter(pk__gt=last)[:BATCH_SIZE]):
            last = batch[-1].pk
            self.checked += len(batch)
            for records in self._read(batch):
                if any(_findings(records)):
                    yield from self._look_again(last_seen=records.flow)

    def _look_again(self, last_seen: FlowExecution) -> list[Finding]:
        # Every write of a run begins with the flow's row, so none is half done while it is locked.
        with self._repository.atomic():
            flow = self._repository.lock(last_seen.pk)
            if flow is None:
                return []
            return [item for records in self._read([flow]) for item in _findings(records)]

    def _read(self, flows: Sequence[FlowExecution]) -> Iterable[Records]:
        found = {flow.pk: Records(flow) for flow in flows}
        using, pks = self._repository.using, list(found)
        attempts = self._repository.attempts.filter(flow_execution__in=pks)
        for row in attempts.defer("output", "log").order_by("pk"):
            found[row.flow_execution_id].attempts.append(row)
        transitions = FlowTransition.objects.using(using).filter(flow_execution__in=pks)
        for pk, *path in transitions.order_by("pk").values_list(
            "flow_execution_id", "from_status", "to_status"
        ):
            found[pk].transitions.append((path[0], path[1]))
        entries = ExecutionContextEntry.objects.using(using).filter(flow_execution__in=pks)
        names: dict[int, Counter[str]] = defaultdict(Counter)
        for pk, name in entries.values_list("flow_execution_id", "name").iterator():
            names[pk][name] += 1
        for pk, counted in names.items():
            found[pk].repeated_entries = [name for name, number in counted.items() if number > 1]
        sound = entries.filter(
            task_execution__status=TaskStatus.SUCCEEDED,
            task_execution__flow_execution=F("flow_execution"),
        )
        written = entries.filter(task_execution__isnull=False)
        for pk, name in written.exclude(pk__in=sound.values("pk")).values_list(
            "flow_execution_id", "name"
        ):
            found[pk].stray_entries.append(name)
        return found.values()


def _findings(records: Records) -> Iterator[Finding]:
    for invariant, look in INVARIANTS.items():
        for sentence in look(records):
            yield Finding(
                flow_id=records.flow.pk,
                template_name=records.flow.template_name,
                invariant=invariant,
                sentence=sentence,
            )
