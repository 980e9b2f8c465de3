"""When a recurring flow is due: cron expressions in the project's time zone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from croniter import CroniterError, croniter
from django.utils import timezone

from .exceptions import InvalidFlowTemplate

MAX_NAME_LENGTH = 80
"""So that a queue's own name for the schedule fits its table."""
MAX_CRON_LENGTH = 100
"""As a queue's own column for it has."""
_FIVE_FIELDS = "give five fields, such as '0 6 * * *' for six o'clock each day"
MAX_CAUGHT_UP = 1000
"""How many missed times are caught up at most; more are a mistake or a long-forgotten cluster."""


def cron_problem(cron: object) -> str:
    """Return what is wrong with a cron expression, empty if it has due times."""
    if not isinstance(cron, str) or len(cron) > MAX_CRON_LENGTH or len(cron.split()) != 5:
        return _FIVE_FIELDS
    # croniter's random and hashed fields: each process would find other times.
    if any(field[0] in "RrHh" for field in cron.split()) or not croniter.is_valid(cron):
        return _FIVE_FIELDS
    try:
        croniter(cron, datetime(2024, 1, 1)).get_next(datetime)  # noqa: DTZ001 - any moment
    except (CroniterError, ArithmeticError, LookupError, ValueError):
        return "no date ever fits it, as no month has such a day: give a day that exists"
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recurrence:
    """A template that is scheduled again and again.

    `cron` has five fields (minute, hour, day of the month, month, day of the week), read in the
    project's time zone. With `catch_up`, each time that was missed while no cluster ran makes its
    flow; without it, only the latest one does. Raises `InvalidFlowTemplate`.
    """

    name: str
    template_name: str
    cron: str
    context: Mapping[str, Any] = field(default_factory=dict)
    priority: int = 0
    catch_up: bool = False

    def __post_init__(self) -> None:
        name: object = self.name
        # It is a part of the flows' keys.
        if (
            not isinstance(name, str)
            or not 0 < len(name) <= MAX_NAME_LENGTH
            or name != name.strip()
            or not name.isprintable()
        ):
            raise InvalidFlowTemplate(
                f"{name!r} cannot name a recurring flow: give it a text of 1 to"
                f" {MAX_NAME_LENGTH} printable characters, without spaces at its ends."
            )
        problem = cron_problem(self.cron)
        if problem:
            raise InvalidFlowTemplate(
                f"The cron expression of the recurring flow {self.name!r} is {self.cron!r}:"
                f" {problem}."
            )

    def next_after(self, moment: datetime) -> datetime:
        """Return the first due time after an aware moment, aware, in the project's time zone.

        When the clocks go forward, a time that they skip is due as they do so. When they go back,
        a time of day comes twice and is due at its first; what recurs by the minute or the hour
        (a `*` in either field) goes on through both.
        """
        times = croniter(self.cron, _in_project_zone(moment))
        found: datetime = times.get_next(datetime)
        while self._comes_again(found):
            found = times.get_next(datetime)
        return found

    def missed(self, intended_at: datetime, now: datetime) -> Iterator[datetime]:
        """Yield the due times from the intended one to now that are to make a flow."""
        times = [] if self._comes_again(intended_at) else [intended_at]
        # The latest one is looked for within a day, so that a year of minutes is not gone through.
        day_before = self._last_before(now) - timedelta(days=1)
        following = self.next_after(intended_at if self.catch_up else max(intended_at, day_before))
        while following <= now:
            times.append(following)
            if self.catch_up and len(times) >= MAX_CAUGHT_UP:
                break
            following = self.next_after(following)
        yield from times if self.catch_up else times[-1:]

    def _last_before(self, moment: datetime) -> datetime:
        found: datetime = croniter(self.cron, _in_project_zone(moment)).get_prev(datetime)
        return found

    def _comes_again(self, moment: datetime) -> bool:
        """Whether it is the second time that the clocks show this time of a day's one run."""
        minute, hour = self.cron.split()[:2]
        is_by_the_clock = not minute.startswith("*") and not hour.startswith("*")
        return is_by_the_clock and _in_project_zone(moment).fold == 1


def _in_project_zone(moment: datetime) -> datetime:
    # Not the thread's active zone, which a task may have changed.
    return timezone.localtime(moment, timezone.get_default_timezone())
