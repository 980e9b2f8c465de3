"""How things stand, above the list: what waits, runs and fails, the last day, the workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any

from django.db.models import QuerySet
from django.utils import timezone
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from .. import clock
from ..durations import duration
from ..engines import get_engine
from ..models import FlowExecution, WorkerProcess
from ..monitoring import ALIVE, Standing, Trouble, standing
from ..runner import flow_runner
from ..service import flow_service
from ..status import WAITING, FlowStatus
from .queries import bounded_counts, is_narrowed

MAX_COUNTED = 10_000
HOURS = 24
MAX_WORKERS = 20
MAX_RUNNING = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A number with its name, and the list's query that shows what is behind it."""

    name: str
    value: str
    query: str
    tone: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownWorker:
    """A worker that lives, when it was last seen, and the flows that it runs."""

    name: str
    seen: str
    is_idle: bool
    runs: list[FlowExecution]


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """What is above the list."""

    figures: list[Figure]
    hours: SafeString
    workers: list[ShownWorker]
    alarm: str


def overview(visible: QuerySet[FlowExecution]) -> Overview:
    """Look at how things stand now with the flows that the user may see."""
    now = clock.now()
    hours = [now - timedelta(hours=n) for n in range(HOURS, -1, -1)]
    counts = bounded_counts(
        [
            visible.filter(status__in=WAITING),
            visible.filter(status=FlowStatus.RUNNING),
            *(_ended(visible, FlowStatus.FAILED, *span) for span in _spans(hours)),
            *(_ended(visible, FlowStatus.SUCCEEDED, *span) for span in _spans(hours)),
        ],
        MAX_COUNTED,
    )
    waiting, running = counts[:2]
    failed, succeeded = counts[2 : HOURS + 2], counts[HOURS + 2 :]
    stands = standing()
    age = _oldest_due_age(visible, now, stands)
    alarm = _alarm(stands, age) if age is not None or not is_narrowed(visible) else ""
    return Overview(
        figures=[
            Figure(name=_("Waiting"), value=_at_most(waiting), query="status=waiting"),
            Figure(name=_("Running"), value=_at_most(running), query="status=RUNNING"),
            Figure(
                name=_("Failed in 24 hours"),
                value=_at_most(sum(failed), any(n == MAX_COUNTED for n in failed)),
                query="status=FAILED",
                tone="bad" if any(failed) else "",
            ),
            Figure(
                name=_("Oldest that is due"),
                value=duration(age) if age else _("none"),
                query="status=waiting",
                tone="bad" if alarm else "",
            ),
        ],
        hours=_hours_drawing(hours, succeeded, failed),
        workers=_workers(visible, now),
        alarm=alarm,
    )


def _alarm(stands: Standing, age: timedelta | None) -> str:
    """Return what a person has to do something about; else empty."""
    said = {
        "age": duration(age or timedelta(0)),
        "command": get_engine().worker_command,
        "workers": stands.free_workers,
    }
    match stands.trouble:
        case Trouble.NO_WORKER:
            return (
                _(
                    "No worker is running, and a flow has been due for %(age)s. Start one with"
                    " manage.py %(command)s."
                )
                % said
            )
        case Trouble.NO_CODE:
            return (
                _(
                    "A flow has been due for %(age)s, and no running worker has the code for it."
                    " Restart what runs manage.py %(command)s; showflows --plans says what"
                    " differs."
                )
                % said
            )
        case Trouble.NOT_TAKEN:
            return (
                ngettext(
                    "A flow has been due for %(age)s, and %(workers)s free worker does not take"
                    " it. Restart what runs manage.py %(command)s.",
                    "A flow has been due for %(age)s, and %(workers)s free workers do not take"
                    " it. Restart what runs manage.py %(command)s.",
                    stands.free_workers,
                )
                % said
            )
        case None:
            return ""


def _oldest_due_age(
    visible: QuerySet[FlowExecution], now: datetime, stands: Standing
) -> timedelta | None:
    """Return for how long the oldest flow has been due that the user may see."""
    if not is_narrowed(visible):
        oldest = stands.oldest_due_seconds
        return None if oldest is None else timedelta(seconds=oldest)
    names = set(flow_runner.templates) - set(flow_service.paused_templates())
    due = visible.filter(status__in=WAITING, run_at__lte=now, template_name__in=names)
    since = due.order_by("run_at").values_list("run_at", flat=True).first()
    return None if since is None else now - since


def _at_most(count: int, is_more: bool = False) -> str:
    return f"{count}+" if is_more or count == MAX_COUNTED else str(count)


def _spans(hours: Sequence[datetime]) -> list[tuple[datetime, datetime]]:
    return list(pairwise(hours))


def _ended(
    visible: QuerySet[FlowExecution], status: FlowStatus, start: datetime, end: datetime
) -> Any:
    return visible.filter(status=status, finished_at__gt=start, finished_at__lte=end)


def _workers(visible: QuerySet[FlowExecution], now: datetime) -> list[ShownWorker]:
    using = flow_service.repository.using
    seen = WorkerProcess.objects.using(using).filter(seen_at__gte=now - ALIVE)
    held = visible.filter(status=FlowStatus.RUNNING, lease_expires_at__gt=now)
    runs: dict[str, list[FlowExecution]] = {}
    for flow in held.order_by("-pk")[:MAX_RUNNING]:
        runs.setdefault(flow.claimed_by, []).append(flow)
    workers = []
    for worker in seen.order_by("-seen_at")[:MAX_WORKERS]:
        age = now - worker.seen_at
        workers.append(
            ShownWorker(
                name=worker.name,
                seen=_("seen %(age)s ago") % {"age": duration(max(age, timedelta(0)))},
                is_idle=worker.idle_since is not None,
                runs=runs.pop(worker.name, []),
            )
        )
    # A process may run a flow without being a worker for long.
    workers += [
        ShownWorker(name=name, seen=_("holds a flow"), is_idle=False, runs=its)
        for name, its in sorted(runs.items())[:MAX_WORKERS]
        if name
    ]
    return workers


def _hours_drawing(
    hours: Sequence[datetime], succeeded: Sequence[int], failed: Sequence[int]
) -> SafeString:
    most = max(1, *(good + bad for good, bad in zip(succeeded, failed, strict=True)))
    width = 100 / HOURS
    bars = []
    for number, (good, bad) in enumerate(zip(succeeded, failed, strict=True)):
        start = timezone.localtime(hours[number])
        # Something is to be seen of a single failure beside thousands of successes.
        bad_height = max(92 * bad / most, 6) if bad else 0
        good_height = min(max(92 * good / most, 4), 98 - bad_height) if good else 0
        title = _("%(time)s: %(good)s succeeded, %(bad)s failed") % {
            "time": f"{start:%H:%M}",
            "good": good,
            "bad": bad,
        }
        bars.append(
            (
                title,
                f"{number * width + width * 0.1:.2f}",
                f"{width * 0.8:.2f}",
                f"{98 - good_height:.2f}",
                f"{good_height:.2f}",
                f"{98 - good_height - bad_height:.2f}",
                f"{bad_height:.2f}",
            )
        )
    total_good, total_bad = sum(succeeded), sum(failed)
    words = _("In the last 24 hours %(good)s and %(bad)s.") % {
        "good": ngettext("%d flow succeeded", "%d flows succeeded", total_good) % total_good,
        "bad": ngettext("%d failed", "%d failed", total_bad) % total_bad,
    }
    drawn = format_html_join(
        "",
        "<g><title>{0}</title>"
        '<rect class="ebbs-hour" x="{1}%" y="0" width="{2}%" height="100%"/>'
        '<rect class="ebbs-succeeded" x="{1}%" y="{3}%" width="{2}%" height="{4}%"/>'
        '<rect class="ebbs-failed" x="{1}%" y="{5}%" width="{2}%" height="{6}%"/></g>',
        bars,
    )
    return format_html(
        '<svg class="ebbs-hours" width="100%" height="56" role="img" aria-label="{}">{}</svg>',
        words,
        drawn,
    )
