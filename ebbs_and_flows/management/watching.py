"""Looks at flows again and again, for `showflows --watch`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Protocol

from django.core.management.base import OutputWrapper
from django.db import DatabaseError, InterfaceError, connections
from django.db.models import OuterRef, Subquery

from ..durations import duration
from ..models import FlowExecution
from ..monitoring import (
    MAX_COUNTED,
    Standing,
    reported_progress,
    standing,
    waiting_unregistered,
)
from ..repository import is_outage
from ..service import flow_service
from ..status import FINISHED, WAITING, FlowStatus, TaskStatus
from .arguments import first_line
from .outcomes import Outcome, local, outcome, printable, table, unregistered_in_words, up_to
from .stopping import StopRequest

LATELY = timedelta(hours=24)
NOTHING = "There are no such flows."
_OLDEST = "oldest due"
_REDRAW_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which flows to look at, and at how many."""

    statuses: Sequence[FlowStatus]
    template: str | None
    limit: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One flow, the task that it is at, and what this says of itself."""

    outcome: Outcome
    finished_at: datetime | None
    task: str
    attempt: int
    report: str
    worker: str

    @property
    def status(self) -> FlowStatus:
        """The flow's status."""
        return FlowStatus(self.outcome.status)

    def time(self, now: datetime) -> str:
        """For how long it has run or been due, when it is to run, or how long it took."""
        shown = self.outcome
        if self.status in WAITING:
            ahead = shown.run_at - now
            return f"in {_age(ahead)}" if ahead > timedelta(0) else f"due for {_age(-ahead)}"
        if self.status == FlowStatus.RUNNING:
            return "" if shown.started_at is None else f"for {_age(now - shown.started_at)}"
        ago = "" if self.finished_at is None else f"{_about(now - self.finished_at)} ago"
        return ", ".join(filter(None, [shown.took, ago]))

    @property
    def words(self) -> str:
        """The task, and its report or what went wrong in it."""
        if self.outcome.trouble:
            return self.outcome.trouble
        return f"{self.task}: {self.report}" if self.report else self.task


@dataclass(frozen=True, slots=True, kw_only=True)
class Glance:
    """How things stand at one moment, and some flows."""

    now: datetime = field(compare=False)
    waiting: int
    running: int
    failed: int
    # Its age grows by itself.
    standing: Standing = field(compare=False)
    workers: int
    # How many flows wait for each template that no worker with this code could run.
    unregistered: Mapping[str, int]
    flows: tuple[Seen, ...]

    def of(self, statuses: Iterable[FlowStatus]) -> list[Seen]:
        """Return the flows in these statuses, the newest first."""
        found = [seen for seen in self.flows if seen.status in statuses]
        return sorted(found, key=lambda seen: -seen.outcome.id)

    def best(self, number: int) -> list[Seen]:
        """Return that many: what runs, then, half and half, what waits and what has ended."""
        running = self.of([FlowStatus.RUNNING])[:number]
        waiting, ended = self.of(WAITING), self.of(FINISHED)
        room = number - len(running)
        places = min(len(ended), max(room // 2, room - len(waiting)))
        return [*running, *waiting[: room - places], *ended[:places]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """The last glance, when it was, and what has kept from another one since."""

    glance: Glance
    at: float
    trouble: str = ""

    @property
    def age(self) -> timedelta:
        """How old the glance is."""
        return timedelta(seconds=time.monotonic() - self.at)

    @property
    def now(self) -> datetime:
        """What the database's clock shows now."""
        return self.glance.now + self.age

    @property
    def figures(self) -> list[tuple[str, str, bool]]:
        """How things stand: a figure, what it is of, and whether it is bad."""
        glance = self.glance
        oldest, workers = glance.standing.oldest_due_seconds, glance.workers
        is_well = glance.standing.is_well
        figures = [
            (up_to(glance.waiting), "waiting", False),
            (up_to(glance.running), "running", False),
            (up_to(glance.failed), "failed in 24 h", glance.failed > 0),
            (str(workers) if workers else "no", "worker alive" if workers < 2 else "workers alive",
             not is_well),
        ]  # fmt: skip
        if oldest is not None:
            age = _age(timedelta(seconds=oldest) + self.age)
            figures.insert(3, (_OLDEST, f"for {age}", not is_well))
        return figures

    @property
    def alarm(self) -> str:
        """What somebody has to do something about; else empty."""
        if self.trouble:
            return (
                f"The database is away ({self.trouble}): this is as it was"
                f" {_age(self.age)} ago. Trying on."
            )
        alarms = unregistered_in_words(self.glance.unregistered)
        if not self.glance.standing.is_well:
            alarms.insert(0, self.glance.standing.reason)
        return " ".join(alarms)


class Screen(Protocol):
    """Shows a sight."""

    def show(self, sight: Sight) -> None:
        """Show it in the place of the last one."""


class Blocks:
    """A block of plain text for each sight that differs from the last one."""

    def __init__(self, out: OutputWrapper, limit: int) -> None:
        self._out = out
        self._limit = limit
        self._last: Any = None

    def show(self, sight: Sight) -> None:
        """Write a block if something has changed, other than ages."""
        shown = sight.glance.best(self._limit)
        counts = [(n, what) for n, what, _ in sight.figures if n != _OLDEST]
        state = (counts, sight.glance.unregistered, bool(sight.trouble), shown)
        if state == self._last:
            return
        self._last = state
        figures = ", ".join(f"{number} {what}" for number, what, _ in sight.figures)
        lines = [f"{local(sight.now)}: {figures}", *filter(None, [sight.alarm])]
        lines.append(_plain_table(shown, sight.now) if shown else NOTHING)
        self._out.write("\n".join(lines) + "\n\n")
        self._out.flush()


def watch(selection: Selection, interval: float, screen: Screen, stop: StopRequest) -> None:
    """Show the flows, each `interval` seconds anew, until the stop is requested.

    Raises what keeps it from the first look; a database that goes away later is waited for.
    """
    sight = Sight(glance=look(selection), at=time.monotonic())
    next_look = time.monotonic() + interval
    while not stop():
        screen.show(sight)
        # Ages grow, and terminals are resized, between two looks.
        stop.wait(min(_REDRAW_SECONDS, max(0.0, next_look - time.monotonic())))
        if not stop() and time.monotonic() >= next_look:
            sight = _look_again(selection, sight)
            next_look = time.monotonic() + interval


def look(selection: Selection) -> Glance:
    """Look at how things stand, in a number of queries that flows do not raise."""
    now = flow_service.repository.now()
    flows = flow_service.repository.flows
    failed = flows.filter(status=FlowStatus.FAILED, finished_at__gt=now - LATELY)
    stands = standing(at=now)
    return Glance(
        now=now,
        waiting=flows.filter(status__in=WAITING)[:MAX_COUNTED].count(),
        running=flows.filter(status=FlowStatus.RUNNING)[:MAX_COUNTED].count(),
        failed=failed[:MAX_COUNTED].count(),
        standing=stands,
        workers=stands.workers,
        unregistered=waiting_unregistered(),
        flows=tuple(_flows(selection)),
    )


def _look_again(selection: Selection, last: Sight) -> Sight:
    try:
        return Sight(glance=look(selection), at=time.monotonic())
    except (DatabaseError, InterfaceError) as error:
        if not is_outage(error):
            raise
        connections.close_all()
        return Sight(glance=last.glance, at=last.at, trouble=printable(first_line(error)))


def _flows(selection: Selection) -> list[Seen]:
    repository = flow_service.repository
    at_task = repository.attempts.filter(
        flow_execution=OuterRef("pk"), task_index=OuterRef("current_task_index")
    )
    latest = Subquery(at_task.order_by("-started_at", "-pk").values("pk")[:1])
    found: list[Any] = []
    # One query a status: of several in one, no index has the newest first.
    for status in selection.statuses:
        flows = repository.flows.filter(status=status).annotate(latest=latest).order_by("-pk")
        if selection.template is not None:
            flows = flows.filter(template_name=selection.template)
        found += flows[: selection.limit]
    attempts = {
        attempt.pk: attempt
        for attempt in repository.attempts.filter(
            pk__in=[f.latest for f in found if f.latest]
        ).defer("output", "traceback", "log")
    }
    return [_seen(flow, attempts.get(flow.latest)) for flow in found]


def _seen(flow: FlowExecution, attempt: Any) -> Seen:
    has_failed = attempt is not None and attempt.status == TaskStatus.FAILED
    has_stopped = flow.status in {FlowStatus.FAILED, FlowStatus.RESCHEDULED}
    index = flow.current_task_index
    report = reported_progress(flow, attempt and attempt.pk)
    return Seen(
        outcome=outcome(flow, attempt) if has_failed and has_stopped else outcome(flow),
        finished_at=flow.finished_at,
        task=flow.task_names[index] if index < len(flow.task_names) else "",
        attempt=attempt.attempt if attempt is not None else 0,
        report="" if report is None else printable(" ".join(report.words.split())),
        worker=flow.claimed_by if flow.status == FlowStatus.RUNNING else "",
    )


def _plain_table(shown: Sequence[Seen], now: datetime) -> str:
    heads = ["ID", "TEMPLATE", "STATUS", "DONE", "ATTEMPT", "TIME", "WORKER", "TASK"]
    rows = [
        [
            str(seen.outcome.id),
            seen.outcome.template,
            seen.outcome.status,
            seen.outcome.progress,
            str(seen.attempt or ""),
            seen.time(now),
            seen.worker,
            seen.words,
        ]
        for seen in shown
    ]
    return table([heads, *rows])


def _age(value: timedelta) -> str:
    # To the second, as it is seen to grow.
    seconds = max(0, round(value.total_seconds()))
    return f"{seconds} s" if seconds < 60 else duration(timedelta(seconds=seconds))


def _about(value: timedelta) -> str:
    amount, unit, *_ = _age(value).split()
    return f"{amount} {unit}"
