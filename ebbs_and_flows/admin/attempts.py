"""One flow's tasks and attempts: what ran, how it failed, what it logged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from django.db.models import BooleanField, Case, QuerySet, When
from django.utils import timezone
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _

from .. import clock
from ..durations import duration
from ..models import FlowExecution, TaskExecution
from ..runner import flow_runner
from ..service import flow_service
from ..status import FlowStatus, TaskStatus
from ..validation import MESSAGE_LENGTH
from .pieces import pill

MAX_ATTEMPTS = 2_000
# Whose output and log are on the page; the others are a click away.
MAX_TEXTS = 12
MAX_LISTED = 10
MAX_LOG_LINES = 300
LEVELS = frozenset({"DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"})
LONG_TEXTS = ("output", "traceback", "log")


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """An attempt's long texts, as they are stored."""

    explanation: str
    traceback: str
    log: str


_NO_TEXTS = Texts(explanation="", traceback="", log="")


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLine:
    """One record that a task logged."""

    at: datetime | None
    level: str
    logger: str
    message: str

    @property
    def css(self) -> str:
        """The end of the class of its row."""
        return self.level.lower() if self.level in LEVELS else "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownAttempt:
    """An attempt on a flow's page, with its texts where they are on the page."""

    attempt: TaskExecution
    status: SafeString
    took: str
    headline: str
    explanation: str = ""
    traceback: str = ""
    log: list[LogLine] = field(default_factory=list)
    is_open: bool = False


@dataclass(slots=True, kw_only=True)
class TaskRow:
    """One task on a flow's page."""

    number: int
    name: str
    description: str
    status: SafeString | str
    attempts: list[Any] = field(default_factory=list)
    shown: list[ShownAttempt] = field(default_factory=list)

    @property
    def started_at(self) -> datetime | None:
        """When its first attempt started."""
        return self.attempts[0].started_at if self.attempts else None

    @property
    def took(self) -> str:
        """How long its last attempt took."""
        return took(self.attempts[-1]) if self.attempts else ""


def flow_attempts(attempts: QuerySet[TaskExecution]) -> Sequence[TaskExecution]:
    """Return the newest of a flow's attempts in their order, without their long texts.

    Each has `has_text`: whether it has an output or a log.
    """
    found = (
        attempts.annotate(
            has_text=Case(
                When(output="", log="", then=False), default=True, output_field=BooleanField()
            ),
        )
        .defer(*LONG_TEXTS)
        .order_by("-started_at", "-pk")
    )
    return list(found[:MAX_ATTEMPTS])[::-1]


def running_attempt(attempts: Sequence[TaskExecution]) -> int | None:
    """Return the primary key of the attempt in progress."""
    running = (a.pk for a in reversed(attempts) if a.status == TaskStatus.RUNNING)
    return next(running, None)


def task_rows(
    flow: FlowExecution, attempts: Sequence[TaskExecution], *, with_texts: bool
) -> list[TaskRow]:
    """Return a row for each task; `with_texts`, with the attempts that have something to read."""
    template = flow_runner.templates.get(flow.template_name)
    described = {task.name: task.description for task in template.tasks} if template else {}
    rows = []
    for index, name in enumerate(flow.task_names):
        before = index < flow.first_task_index
        state = _("Done in the flow that this is a rerun of") if before else _("To come")
        summary = described.get(name, "").partition("\n")[0]
        rows.append(TaskRow(number=index + 1, name=name, description=summary, status=state))
    by_name = {row.name: row for row in rows}
    for attempt in attempts:
        row = by_name.get(attempt.task_name)
        if row is None:
            # The plan has had such a task, and has it no longer.
            row = TaskRow(number=len(rows) + 1, name=attempt.task_name, description="", status="")
            by_name[row.name] = row
            rows.append(row)
        row.attempts.append(attempt)
        row.status = pill(attempt.status)
    if not with_texts:
        return rows
    texts = _texts(attempts)
    for row in rows:
        row.shown = [
            _shown(attempt, texts, is_open=_stopped_at(attempt, row, flow))
            for attempt in reversed(row.attempts)
            if attempt.has_text
        ][:MAX_LISTED]
    return rows


def took(attempt: TaskExecution) -> str:
    """Return how long an attempt took, or has taken so far."""
    return duration((attempt.finished_at or clock.now()) - attempt.started_at)


def log_lines(text: str) -> list[LogLine]:
    """Return the last records of a stored log."""
    return [_log_line(line) for line in text.split("\n")[-MAX_LOG_LINES:] if line]


def _texts(attempts: Sequence[Any]) -> dict[int, Texts]:
    wanted = [attempt.pk for attempt in reversed(attempts) if attempt.has_text][:MAX_TEXTS]
    if not wanted:
        return {}
    found = flow_service.repository.attempts.filter(pk__in=wanted).only(*LONG_TEXTS)
    return {
        attempt.pk: Texts(
            explanation=attempt.explanation, traceback=attempt.traceback, log=attempt.log
        )
        for attempt in found
    }


def _stopped_at(attempt: TaskExecution, row: TaskRow, flow: FlowExecution) -> bool:
    return (
        flow.status == FlowStatus.FAILED
        and attempt is row.attempts[-1]
        and (attempt.task_index == flow.current_task_index)
    )


def _shown(attempt: TaskExecution, all_texts: dict[int, Texts], *, is_open: bool) -> ShownAttempt:
    texts = all_texts.get(attempt.pk, _NO_TEXTS)
    return ShownAttempt(
        attempt=attempt,
        status=pill(attempt.status),
        took=took(attempt),
        headline=attempt.headline or texts.explanation[:MESSAGE_LENGTH].partition("\n")[0],
        explanation=texts.explanation,
        traceback=texts.traceback,
        log=log_lines(texts.log),
        is_open=is_open and attempt.pk in all_texts,
    )


def _log_line(line: str) -> LogLine:
    try:
        record = json.loads(line)
        at = datetime.fromisoformat(record["at"])
        return LogLine(
            at=at if timezone.is_aware(at) else None,
            level=str(record["level"]),
            logger=str(record["logger"]),
            message=str(record["message"]).encode("utf-8", "backslashreplace").decode(),
        )
    except (ValueError, TypeError, KeyError, RecursionError):
        return LogLine(at=None, level="", logger="", message=line)
