"""What a flow looks like in a terminal: its outcome in a line, a table or JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from django.utils import timezone

from ..durations import duration
from ..models import FlowExecution, TaskExecution
from ..monitoring import MAX_COUNTED
from ..service import flow_service
from ..status import FlowStatus

PAGE = 500
"""How many flows one query asks about: databases limit the parameters of a statement."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One flow, as far as it got."""

    id: int
    template: str
    key: str | None
    status: str
    done: int
    tasks: int
    run_at: datetime
    started_at: datetime | None
    seconds: float | None
    failed_task: str
    error: str
    # Which task asked to be called again later, and why; no error.
    waits: str

    @property
    def progress(self) -> str:
        """How many tasks are done."""
        return f"{self.done} of {self.tasks}"

    @property
    def took(self) -> str:
        """How long it took from its first start to its end, waits and all."""
        return "" if self.seconds is None else duration(timedelta(seconds=self.seconds))

    @property
    def trouble(self) -> str:
        """What went wrong, or why its task waits."""
        return f"{self.failed_task}: {self.error}" if self.error else self.waits

    @property
    def line(self) -> str:
        """The outcome in one line."""
        took = "" if self.seconds is None else f" in {self.took}"
        wrong = f": {self.trouble}" if self.trouble else ""
        when = ""
        if self.status == FlowStatus.RESCHEDULED:
            when = f", again at {local(self.run_at)}"
        elif self.status == FlowStatus.RUNNING:
            when = ", handed back"
        done = f"{self.progress} tasks"
        return f"{self.template} #{self.id} {self.status} ({done}){took}{when}{wrong}"

    @property
    def as_json(self) -> dict[str, Any]:
        """The outcome in JSON's own types."""
        return {
            "id": self.id,
            "template": self.template,
            "key": self.key,
            "status": self.status,
            "done": self.done,
            "tasks": self.tasks,
            "run_at": self.run_at.isoformat(),
            "started_at": self.started_at.isoformat() if self.started_at else None,
            "seconds": self.seconds,
            "failed_task": self.failed_task or None,
            "error": self.error or None,
            "waits": self.waits or None,
        }


def outcomes(flows: Iterable[FlowExecution]) -> list[Outcome]:
    """Return the outcome of each flow, with one query for what went wrong in a page of them."""
    listed = list(flows)
    found: list[Outcome] = []
    for start in range(0, len(listed), PAGE):
        page = listed[start : start + PAGE]
        failures = flow_service.get_failures(page)
        found += [outcome(flow, failures.get(flow.pk)) for flow in page]
    return found


def local(moment: datetime | None) -> str:
    """Return a moment in the project's time zone, which is named, to the second; or nothing."""
    return "" if moment is None else f"{timezone.localtime(moment):%Y-%m-%d %H:%M:%S %Z}"


def printable(text: str) -> str:
    """Return a text with a sign of one cell for what would steer the terminal."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else "\ufffd"
        for character in text
    )


def outcome(flow: FlowExecution, failure: TaskExecution | None = None) -> Outcome:
    """Return one flow's outcome; its failed attempt is given, where there is one."""
    first_line = printable(failure.headline) if failure else ""
    error = first_line if len(first_line) <= 160 else first_line[:159] + "…"
    failed_task = "" if failure is None else failure.task_name
    waits = ""
    if failure is not None and failure.asked_for_later and flow.status == FlowStatus.RESCHEDULED:
        failed_task, error, waits = "", "", f"{failed_task} waits: {error}"
    return Outcome(
        id=flow.pk,
        template=flow.template_name,
        key=flow.key,
        status=str(flow.status),
        done=flow.current_task_index,
        tasks=len(flow.task_names),
        run_at=flow.run_at,
        started_at=flow.started_at,
        seconds=None if flow.duration is None else flow.duration.total_seconds(),
        failed_task=failed_task,
        error=error,
        waits=waits,
    )


def table(rows: list[list[str]]) -> str:
    """Return rows, the first of them the heads, as aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    return "\n".join(lines)


def unregistered_in_words(counts: Mapping[str, int]) -> list[str]:
    """Return a sentence for each template that flows wait for and that is not registered."""
    return [
        f"{up_to(count)} {'flow waits' if count == 1 else 'flows wait'} for template {name!r},"
        f" which is not registered here."
        for name, count in counts.items()
    ]


def left_in_words(counts: Mapping[str, int]) -> list[str]:
    """Return a sentence for each template of which due flows need other code."""
    return [
        f"{count} due {'flow' if count == 1 else 'flows'} of template {name!r}"
        f" {'does' if count == 1 else 'do'} not fit the code here, and"
        f" {'is' if count == 1 else 'are'} left to other workers: see showflows --plans."
        for name, count in counts.items()
    ]


def up_to(count: int) -> str:
    """Return a figure that was counted up to a limit."""
    return f"{count}+" if count == MAX_COUNTED else str(count)


def overview(listed: list[Outcome]) -> str:
    """Return a table of outcomes."""
    heads = ["ID", "TEMPLATE", "STATUS", "DONE", "SCHEDULED FOR", "STARTED"]
    heads += ["TOOK", "WHAT WENT WRONG"]
    return table(
        [
            heads,
            *(
                [
                    str(row.id),
                    row.template,
                    row.status,
                    row.progress,
                    local(row.run_at),
                    local(row.started_at),
                    row.took,
                    row.trouble,
                ]
                for row in listed
            ),
        ]
    )
