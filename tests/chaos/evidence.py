"""What workers leave outside of the database, and what it proves together with the database."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path

from ebbs_and_flows import ExecutionContext, TaskStatus
from ebbs_and_flows.integrity import BATCH_SIZE, IntegrityCheck
from ebbs_and_flows.models import ExecutionContextEntry, FlowExecution, TaskExecution

LOG = "EBBS_CHAOS_LOG"
"""The environment variable that names the file."""

RAISED = {
    "ConnectionError",
    "ValueError",
    "TaskTimeout",
    "TaskInterrupted",
    "django.db.utils.OperationalError",
    "django.db.utils.InterfaceError",
}
"""What an attempt may fail by: what the tasks raise, lost workers and lost connections."""

Run = Callable[[ExecutionContext], ExecutionContext]


@dataclass(frozen=True, slots=True)
class Line:
    """A task began or ended; lines come in the order of what happened, whichever process did."""

    event: str
    flow: int
    task: str
    attempt: int
    process: int
    # By the clock of the process, which may be off.
    at: float

    @classmethod
    def read(cls, text: str) -> Line:
        event, flow, task, attempt, process, at = text.split()
        return cls(event, int(flow), task, int(attempt), int(process), float(at))

    def __str__(self) -> str:
        return f"{self.event} {self.flow} {self.task} {self.attempt} {self.process} {self.at:.6f}"


def note(event: str, context: ExecutionContext) -> None:
    """Append a line, on the disk before anything else happens."""
    assert context.flow_execution_id is not None
    line = Line(
        event,
        context.flow_execution_id,
        context.task_name,
        context.attempt,
        os.getpid(),
        time.time(),
    )
    number = os.open(os.environ[LOG], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(number, f"{line}\n".encode())
        os.fsync(number)
    finally:
        os.close(number)


def noted(run: Run) -> Run:
    """Have a task's beginning and its end, good or bad, noted; no time-out breaks that off."""
    alarm = {signal.SIGALRM}

    @wraps(run)
    def noting(context: ExecutionContext) -> ExecutionContext:
        signal.pthread_sigmask(signal.SIG_BLOCK, alarm)
        try:
            note("start", context)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, alarm)
            try:
                return run(context)
            finally:
                signal.pthread_sigmask(signal.SIG_BLOCK, alarm)
        finally:
            note("end", context)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, alarm)

    return noting


def read_log(path: Path) -> Iterator[Line]:
    if path.exists():
        with path.open() as file:
            yield from (Line.read(text) for text in file)


def ran_to_its_end(attempt: TaskExecution) -> bool:
    """Whether it succeeded, and not by hand, of which its output tells."""
    return attempt.status == TaskStatus.SUCCEEDED and not attempt.output


@dataclass(slots=True)
class Verdict:
    """What was found, a sentence each; four empty lists are what is wanted."""

    flows: int = 0
    attempts: int = 0
    interrupted: int = 0
    lost: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    overlapping: list[str] = field(default_factory=list)
    unsound: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        return [*self.lost, *self.repeated, *self.overlapping, *self.unsound]

    def __str__(self) -> str:
        return (
            f"{self.flows} flows, {self.attempts} attempts, {self.interrupted} of them"
            f" interrupted: {len(self.lost)} lost, {len(self.repeated)} repeated,"
            f" {len(self.overlapping)} overlapping, {len(self.unsound)} unsound"
        )


class Court:
    """Judges flows by their records, by what their tasks noted and by what these wrote."""

    def __init__(
        self, expected: Mapping[int, Iterable[str]], log: Path, *, gone: Iterable[int] = ()
    ) -> None:
        """Take the ids of all flows that were scheduled, each with how it may have ended.

        `gone` are the flows that were deleted on purpose.
        """
        self._expected = {pk: set(map(str, statuses)) for pk, statuses in expected.items()}
        self._gone = set(gone)
        self._log = log
        self._verdict = Verdict(flows=len(self._expected))

    def judge(self) -> Verdict:
        """Hold all that was noted against all that is stored."""
        lines: dict[int, list[Line]] = defaultdict(list)
        for line in read_log(self._log):
            lines[line.flow].append(line)
        for flow_id in lines.keys() - self._expected.keys() - self._gone:
            self._verdict.unsound.append(f"Flow {flow_id} ran, and nobody scheduled it.")
        ids = sorted(self._expected)
        for start in range(0, len(ids), BATCH_SIZE):
            self._judge_batch(ids[start : start + BATCH_SIZE], lines)
        self._verdict.unsound += [str(finding) for finding in IntegrityCheck().findings()]
        return self._verdict

    def _judge_batch(self, ids: list[int], lines: Mapping[int, list[Line]]) -> None:
        from tests.shop.models import Order

        statuses = dict(FlowExecution.objects.filter(pk__in=ids).values_list("pk", "status"))
        attempts: dict[int, list[TaskExecution]] = defaultdict(list)
        rows = TaskExecution.objects.filter(flow_execution__in=ids).defer("log")
        for row in rows.order_by("task_index", "attempt"):
            attempts[row.flow_execution_id].append(row)
        entries: dict[int, dict[str, str]] = defaultdict(dict)
        written = ExecutionContextEntry.objects.filter(
            flow_execution__in=ids, task_execution__isnull=False
        )
        for entry in written.order_by("pk"):
            entries[entry.flow_execution_id][entry.name] = entry.value
        orders: dict[int, list[int]] = defaultdict(list)
        # A number is "flow attempt", and flows of one batch have neighbouring ids.
        for number in Order.objects.values_list("number", flat=True):
            flow_id, attempt = map(int, number.split())
            if ids[0] <= flow_id <= ids[-1]:
                orders[flow_id].append(attempt)
        for flow_id in ids:
            self._judge_end(flow_id, statuses.get(flow_id))
            self._judge_lines(flow_id, lines.get(flow_id, []), attempts[flow_id])
            self._judge_effects(
                flow_id, attempts[flow_id], entries[flow_id], sorted(orders[flow_id])
            )

    def _judge_end(self, flow_id: int, status: str | None) -> None:
        if status not in self._expected[flow_id]:
            wanted = " or ".join(sorted(self._expected[flow_id]))
            self._verdict.lost.append(f"Flow {flow_id} is {status}, not {wanted}.")

    def _judge_lines(self, flow_id: int, lines: list[Line], attempts: list[TaskExecution]) -> None:
        verdict = self._verdict
        stored = {(row.task_name, row.attempt): row for row in attempts}
        taken_over = {at for at, row in stored.items() if row.error_type == "TaskInterrupted"}
        verdict.attempts += len(stored)
        verdict.interrupted += len(taken_over)
        started: set[tuple[str, int]] = set()
        in_progress: set[tuple[str, int]] = set()
        done: set[str] = set()
        for line in lines:
            at = (line.task, line.attempt)
            what = f"flow {flow_id}, {line.task}, attempt {line.attempt}"
            if line.event == "end":
                in_progress.discard(at)
                if at in stored and stored[at].status == TaskStatus.SUCCEEDED:
                    done.add(line.task)
                continue
            if at not in stored:
                verdict.unsound.append(f"Of {what} there is no record.")
            if at in started:
                verdict.repeated.append(f"Twice: {what}.")
            # A worker that was stopped just before a task begins it when it wakes: that its claim
            # is lost it learns at its next write.
            if at not in taken_over:
                if line.task in done:
                    verdict.repeated.append(f"After its success: {what}.")
                for other in in_progress - taken_over:
                    verdict.overlapping.append(f"While attempt {other} was in progress: {what}.")
            started.add(at)
            in_progress.add(at)
        for at, row in stored.items():
            if row.error_type and row.error_type not in RAISED:
                verdict.unsound.append(
                    f"Of flow {flow_id}, {at[0]}, attempt {at[1]} failed by {row.error_type},"
                    f" which no task raises."
                )
            if ran_to_its_end(row) and (at not in started or at in in_progress):
                verdict.lost.append(
                    f"Stored as done, not seen to be: flow {flow_id}, {at[0]}, attempt {at[1]}."
                )

    def _judge_effects(
        self,
        flow_id: int,
        attempts: list[TaskExecution],
        entries: Mapping[str, str],
        orders: list[int],
    ) -> None:
        succeeded = {row.task_name: row.attempt for row in attempts if ran_to_its_end(row)}
        written = {name: json.loads(value) for name, value in entries.items()}
        if written != succeeded:
            self._verdict.unsound.append(
                f"Flow {flow_id} has the entries {written} of the successes {succeeded}."
            )
        booked = [succeeded[name] for name in ("book", "order") if name in succeeded]
        if len(orders) > len(booked):
            self._verdict.repeated.append(
                f"Flow {flow_id} wrote orders in the attempts {orders}, and {booked} succeeded."
            )
        elif orders != booked:
            self._verdict.lost.append(
                f"Flow {flow_id} wrote orders in the attempts {orders}, and {booked} succeeded."
            )
