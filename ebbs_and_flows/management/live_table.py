"""Draws what `showflows --watch` sees on a terminal, with rich."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import IO, Any, cast

from django.core.management.base import OutputWrapper
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..status import FlowStatus
from .displays import Verbatim
from .outcomes import local
from .watching import NOTHING, Glance, Seen, Sight

_BAD = "bold red"
# A sign beside the word, so that a status is found at a glance without its colour too.
_LOOKS = {
    FlowStatus.CREATED: ("○", ""),
    FlowStatus.SCHEDULED: ("○", "cyan"),
    FlowStatus.RUNNING: ("▶", "bold blue"),
    FlowStatus.RESCHEDULED: ("↻", "yellow"),
    FlowStatus.FAILED: ("✗", "bold red"),
    FlowStatus.SUCCEEDED: ("✓", "green"),
    FlowStatus.CANCELLED: ("■", "dim"),
}
_BAR = 8
# From which width on there is room for what narrower terminals do without.
_BAR_FROM, _ATTEMPT_FROM, _WORKER_FROM = 100, 76, 130
_LONGEST_NAME = 28
_GAP = 2


class LiveTable:
    """A table on the whole of the terminal, which is as it was when the table is left."""

    def __init__(self, console: Console, limit: int, interval: float) -> None:
        self._console = console
        self._limit = limit
        self._interval = interval
        self._live = Live(console=console, screen=True, auto_refresh=False)

    def __enter__(self) -> LiveTable:
        self._live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._live.__exit__(*error)

    def show(self, sight: Sight) -> None:
        """Draw it, as large as the terminal is now."""
        self._live.update(self.drawing(sight), refresh=True)

    def drawing(self, sight: Sight) -> RenderableType:
        """Return the whole screen."""
        width, height = self._console.size
        alarm = [Text(f"! {sight.alarm}", _BAD)] if sight.alarm else []
        head = Group(_head(sight), _figures(sight), *alarm, Text(""))
        # Two for the columns' heads and their rule, two for the foot.
        room = height - len(self._console.render_lines(head)) - 4
        shown = _fitting(sight.glance, self._limit, max(1, room))
        return Group(
            head,
            *(_rows(shown, sight, width) if shown else [Text(NOTHING, "dim")]),
            Text(""),
            self._foot(len(sight.glance.flows) - len(shown)),
        )

    def _foot(self, hidden: int) -> Text:
        more = f"{hidden} or more others are not shown. " if hidden else ""
        return Text(f"{more}Every {self._interval:g} s; Ctrl-C ends it.", "dim", no_wrap=True)


def _fitting(glance: Glance, limit: int, room: int) -> list[Seen]:
    """Return as many as there are lines for: a second one for each that has gone wrong."""
    shown = glance.best(min(limit, room))
    while len(shown) > 1 and sum(2 if seen.outcome.error else 1 for seen in shown) > room:
        shown = glance.best(len(shown) - 1)
    return shown


def _rows(shown: Sequence[Seen], sight: Sight, width: int) -> Iterator[Text]:
    """Yield the lines of the table: its last column, and an error, have the rest of the width."""
    names = ["ID", "TEMPLATE", "STATUS", "DONE", "TRY", "TIME", "WORKER", "TASK"]
    heads = {name: Text(name, "dim") for name in names}
    rows = [heads, *(_cells(seen, sight.now, with_bar=width >= _BAR_FROM) for seen in shown)]
    for name, least in (("TRY", _ATTEMPT_FROM), ("WORKER", _WORKER_FROM)):
        if width < least or not any(row[name].plain for row in rows[1:]):
            for row in rows:
                del row[name]
    widths = {
        name: min(max(row[name].cell_len for row in rows), _LONGEST_NAME)
        for name in heads
        if name != "TASK"
    }
    indent = widths["ID"] + _GAP
    for row, seen in zip(rows, [None, *shown], strict=True):
        line = Text(no_wrap=True, overflow="ellipsis")
        for name, cell in row.items():
            if name == "TASK":
                line.append_text(cell)
                continue
            cell.truncate(widths[name], overflow="ellipsis")
            padding = " " * (widths[name] - cell.cell_len)
            if name == "ID":
                line.append(padding)
            line.append_text(cell).append("" if name == "ID" else padding).append(" " * _GAP)
        yield line
        if seen is None:
            yield Text("─" * width, "dim")
        elif seen.outcome.error:
            yield Text(
                " " * indent + f"└ {seen.outcome.error}", "red", no_wrap=True, overflow="ellipsis"
            )


def _cells(seen: Seen, now: datetime, *, with_bar: bool) -> dict[str, Text]:
    sign, style = _LOOKS[seen.status]
    return {
        "ID": Text(str(seen.outcome.id)),
        "TEMPLATE": Text(seen.outcome.template),
        "STATUS": Text(f"{sign} {seen.status}", style),
        "DONE": _progress(seen, style, with_bar=with_bar),
        "TRY": Text(str(seen.attempt) if seen.attempt > 1 else "", "yellow"),
        "TIME": Text(seen.time(now)),
        "WORKER": Text(seen.worker, "dim"),
        "TASK": Text(seen.outcome.failed_task or seen.words),
    }


def _head(sight: Sight) -> RenderableType:
    head = Table.grid(expand=True)
    head.add_column()
    head.add_column(justify="right")
    head.add_row(Text("Flows", "bold"), Text(local(sight.now), "dim"))
    return head


def _figures(sight: Sight) -> RenderableType:
    return Columns(
        [
            Text.assemble(
                ("! " if is_bad else "", _BAD),
                (number, _BAD if is_bad else "bold"),
                (f" {what}", "red" if is_bad else ""),
            )
            for number, what, is_bad in sight.figures
        ],
        padding=(0, 4),
    )


def _progress(seen: Seen, style: str, *, with_bar: bool) -> Text:
    done, tasks = seen.outcome.done, seen.outcome.tasks
    text = Text()
    if with_bar:
        filled = _BAR * done // tasks if tasks else 0
        text.append("━" * filled, style=style)
        text.append("╌" * (_BAR - filled) + " ", style="dim")
    return text.append(f"{done} of {tasks}")


def live_table(
    out: OutputWrapper, limit: int, interval: float, *, no_color: bool = False
) -> LiveTable | None:
    """Return a table for a terminal that can show one; None for any other output."""
    console = Console(file=cast(IO[str], Verbatim(out)), no_color=no_color or None)
    is_able = out.isatty() and not console.is_dumb_terminal and console.encoding == "utf-8"
    return LiveTable(console, limit, interval) if is_able else None
