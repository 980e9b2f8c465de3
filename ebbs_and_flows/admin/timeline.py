"""One flow's attempts on one time axis: a row a task, drawn as SVG by the server.

Lengths are percentages, so that a drawing fits every width and its text keeps its size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise

from django.utils.functional import cached_property
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString, mark_safe
from django.utils.translation import gettext as _

from ..durations import duration
from ..models import TaskExecution
from ..status import TaskStatus

MAX_BARS = 100
MIN_WIDTH = 0.8
# A wait that is longer than this share of all the rest is drawn short, with its length in words.
LONG_WAIT = 0.4
BREAK_WIDTH, MAX_BREAKS_WIDTH = 9.0, 54.0

_STEPS = [
    *(timedelta(milliseconds=n) for n in (1, 2, 5, 10, 20, 50, 100, 200, 500)),
    *(timedelta(seconds=n) for n in (1, 2, 5, 10, 15, 30)),
    *(timedelta(minutes=n) for n in (1, 2, 5, 10, 15, 30)),
    *(timedelta(hours=n) for n in (1, 2, 6, 12)),
    *(timedelta(days=n) for n in (1, 2, 7, 14, 30, 90, 365)),
]
_NO_TIME = timedelta(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """A part of the axis that is drawn to scale, or a long wait that is not."""

    start: datetime
    end: datetime
    left: float
    width: float
    is_break: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TimelineRow:
    """One task: its bars, and the same in words."""

    number: int
    name: str
    drawing: SafeString
    words: str
    took: str


class Axis:
    """Maps moments to percentages of the width."""

    def __init__(self, spans: Iterable[tuple[datetime, datetime]]) -> None:
        self.stretches = _stretches(_merged(spans))

    def at(self, moment: datetime) -> float:
        """Return where a moment lies, from 0 to 100."""
        for stretch in self.stretches:
            if moment <= stretch.end:
                length = stretch.end - stretch.start
                share = (moment - stretch.start) / length if length else 0.0
                return stretch.left + stretch.width * min(max(share, 0.0), 1.0)
        return 100.0

    @property
    def breaks(self) -> list[Stretch]:
        """The waits that are not drawn to scale."""
        return [stretch for stretch in self.stretches if stretch.is_break]

    @cached_property
    def ticks(self) -> list[tuple[float, str]]:
        """Where lines go, and what is written there; none where the axis has breaks."""
        start, end = self.stretches[0].start, self.stretches[-1].end
        if self.breaks or end <= start:
            return []
        step = next((step for step in _STEPS if (end - start) / step <= 5), _STEPS[-1])
        count = min(int((end - start) / step), 5)
        return [(self.at(start + step * n), _tick(step * n)) for n in range(1, count + 1)]

    def drawing(self) -> SafeString:
        """Return the axis itself, with its ticks or its breaks in words."""
        ticks = format_html_join(
            "",
            '<text x="{}%" y="13" text-anchor="{}">{}</text>',
            ((_number(x), "end" if x > 94 else "middle", text) for x, text in self.ticks),
        )
        breaks = format_html_join(
            "",
            '<text class="ebbs-break-words" x="{}%" y="13" text-anchor="middle">{}</text>',
            (
                (_number(gap.left + gap.width / 2), "⋯ " + duration(gap.end - gap.start))
                for gap in self.breaks
            ),
        )
        first = mark_safe('<text x="0" y="13">0</text>')
        return format_html(
            '<svg class="ebbs-axis" width="100%" height="18" aria-hidden="true">{}{}{}</svg>',
            first,
            ticks,
            breaks,
        )

    @cached_property
    def background(self) -> SafeString:
        """Return what lies behind the bars of each row."""
        lines = format_html_join(
            "",
            '<line class="ebbs-grid" x1="{0}%" x2="{0}%" y1="0" y2="100%"/>',
            ((_number(x),) for x, _text in self.ticks),
        )
        breaks = format_html_join(
            "",
            '<rect class="ebbs-break" x="{}%" width="{}%" y="0" height="100%"/>',
            ((_number(gap.left), _number(gap.width)) for gap in self.breaks),
        )
        return lines + breaks


def timeline_rows(
    names: Sequence[str],
    attempts: Iterable[TaskExecution],
    *,
    now: datetime,
    waits_at: int | None,
) -> tuple[Axis | None, list[TimelineRow]]:
    """Return the axis, None when nothing has started, and a row for each task.

    `now` ends what is running; `waits_at` is the index of the task that waits for its retry.
    """
    by_task: dict[str, list[TaskExecution]] = {}
    for attempt in attempts:
        by_task.setdefault(attempt.task_name, []).append(attempt)
    if not by_task:
        return None, []
    spans = [_span(attempt, now) for of_task in by_task.values() for attempt in of_task]
    if waits_at is not None:
        spans.append((now, now))
    axis = Axis(spans)
    rows = []
    for index, name in enumerate(names):
        made = by_task.get(name, [])
        waits_until = now if waits_at == index else None
        words = _words(made, now)
        total = sum((end - start for start, end in (_span(a, now) for a in made)), _NO_TIME)
        rows.append(
            TimelineRow(
                number=index + 1,
                name=name,
                drawing=_bars(axis, made[-MAX_BARS:], words, now, waits_until),
                words=words,
                took=duration(total) if made else "",
            )
        )
    return axis, rows


def _bars(
    axis: Axis,
    attempts: Sequence[TaskExecution],
    words: str,
    now: datetime,
    waits_until: datetime | None,
) -> SafeString:
    waits, bars = [], []
    for number, attempt in enumerate(attempts):
        start, end = _span(attempt, now)
        left = axis.at(start)
        width = max(axis.at(end) - left, MIN_WIDTH)
        left = min(left, 100 - width)
        bars.append(
            (attempt.status.lower(), _number(left), _number(width), _one_in_words(attempt, now))
        )
        is_last = number + 1 == len(attempts)
        until = waits_until if is_last else attempts[number + 1].started_at
        if until is not None:
            waits.append((_number(left + width), _number(axis.at(until))))
    return format_html(
        '<svg class="ebbs-bars" width="100%" height="22" role="img" aria-label="{}">{}{}{}</svg>',
        words,
        axis.background,
        format_html_join("", '<line class="ebbs-wait" x1="{}%" x2="{}%" y1="11" y2="11"/>', waits),
        format_html_join(
            "",
            '<rect class="ebbs-bar ebbs-{}" x="{}%" y="4" width="{}%" height="14" rx="3">'
            "<title>{}</title></rect>",
            bars,
        ),
    )


def _words(attempts: Sequence[TaskExecution], now: datetime) -> str:
    if not attempts:
        return _("Not started")
    shown = [_one_in_words(attempt, now) for attempt in attempts[-5:]]
    if len(attempts) > len(shown):
        shown.insert(0, "…")
    return "; ".join(shown)


def _one_in_words(attempt: TaskExecution, now: datetime) -> str:
    start, end = _span(attempt, now)
    return _("Attempt %(number)s: %(status)s, %(took)s") % {
        "number": attempt.attempt,
        "status": TaskStatus(attempt.status).label,
        "took": duration(end - start),
    }


def _span(attempt: TaskExecution, now: datetime) -> tuple[datetime, datetime]:
    end = attempt.finished_at or now
    return attempt.started_at, max(end, attempt.started_at)


def _merged(spans: Iterable[tuple[datetime, datetime]]) -> list[tuple[datetime, datetime]]:
    merged: list[tuple[datetime, datetime]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def _stretches(busy: list[tuple[datetime, datetime]]) -> list[Stretch]:
    gaps = sorted(
        ((after[0] - before[1]) for before, after in pairwise(busy)),
        reverse=True,
    )
    rest = busy[-1][1] - busy[0][0]
    shortest = None
    # The longest waits are taken out while each of them dwarfs all that would be left.
    for gap in gaps:
        if gap <= (rest - gap) * LONG_WAIT or gap < timedelta(seconds=1):
            break
        rest -= gap
        shortest = gap
    parts: list[tuple[datetime, datetime, bool]] = []
    for start, end in busy:
        if parts and shortest is not None and start - parts[-1][1] >= shortest:
            parts.append((parts[-1][1], start, True))
            parts.append((start, end, False))
        elif parts:
            parts[-1] = (parts[-1][0], end, False)
        else:
            parts.append((start, end, False))
    breaks = sum(is_break for _start, _end, is_break in parts)
    break_width = min(BREAK_WIDTH, MAX_BREAKS_WIDTH / breaks) if breaks else 0.0
    linear = 100 - break_width * breaks
    scaled = sum((end - start for start, end, is_break in parts if not is_break), _NO_TIME)
    shares = len(parts) - breaks
    stretches, left = [], 0.0
    for start, end, is_break in parts:
        if is_break:
            width = break_width
        else:
            width = linear * ((end - start) / scaled if scaled else 1 / shares)
        stretches.append(Stretch(start=start, end=end, left=left, width=width, is_break=is_break))
        left += width
    return stretches


def _tick(value: timedelta) -> str:
    seconds = value.total_seconds()
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:g} s"
    if seconds < 3600:
        minutes, rest = divmod(int(seconds), 60)
        return f"{minutes} min" + (f" {rest} s" if rest else "")
    if seconds < 48 * 3600:
        hours, rest = divmod(int(seconds) // 60, 60)
        return f"{hours} h" + (f" {rest} min" if rest else "")
    return f"{seconds / 86400:g} d"


def _number(value: float) -> str:
    # Not by the language of the page, which may write a decimal comma.
    return f"{value:.2f}"
