"""How long something took: one form for the admin and the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta

_SECOND = timedelta(seconds=1)


def duration(value: timedelta | None) -> str:
    """Return a duration in the one or two units that matter; empty for none."""
    if value is None:
        return ""
    seconds = max(value.total_seconds(), 0)
    if seconds < 0.001:
        return "< 1 ms"
    # 999.6 ms would be written as 1000 ms.
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    seconds = round(seconds)
    minutes, hours = seconds // 60, seconds // 3600
    if hours < 1:
        return f"{minutes} min {seconds % 60} s"
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def time_at_work(
    spans: Iterable[tuple[datetime, datetime | None]], whole: timedelta
) -> timedelta | None:
    """Return how much of the `whole` the attempts that started and ended then were at work.

    None where the waits between them were not longer than the work: the whole says enough.
    """
    work = sum((end - start for start, end in spans if end is not None), timedelta(0))
    waits = whole - work
    return work if waits > max(work, _SECOND) else None
