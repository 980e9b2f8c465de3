"""How things stand, for machines: a health view for probes, and a Prometheus collector.

What is asked of the database is bounded, however many flows there are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from django.db import DatabaseError, InterfaceError
from django.http import HttpRequest, JsonResponse

from .bounded import bounded_counts, stored_template_names
from .models import FlowExecution, WorkerProcess
from .runner import FlowRunner, flow_runner
from .status import WAITING, FlowStatus

if TYPE_CHECKING:
    from prometheus_client.core import GaugeMetricFamily

MAX_COUNTED = 10_000
"""Up to where flows are counted; a figure that high means: so many or more."""
LAST_RUNS = 100
"""How many runs of each template its durations are taken from."""
ALIVE = timedelta(seconds=60)
"""A worker shows itself every ten seconds; one that is seen no more for this long is gone."""
TOO_LATE_SECONDS = 60.0
"""How long what is due may wait for a worker to be alive until `health` says that it is ill."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What waits to be done, and who is there to do it."""

    # For how long the flow that is due for the longest has been so; None if none is due.
    oldest_due_seconds: float | None
    workers: int

    @property
    def is_well(self) -> bool:
        """Whether somebody works, or nothing waits for long."""
        return bool(self.workers) or (self.oldest_due_seconds or 0) < TOO_LATE_SECONDS


def standing(runner: FlowRunner = flow_runner, *, at: datetime | None = None) -> Standing:
    """Return how things stand now, by a few small queries.

    Flows that no worker could run now are left out: of paused templates, and of those that are not
    registered with the runner. Takes the database's time, where it was asked for it already.
    """
    service = runner.service
    now = at or service.repository.now()
    oldest = oldest_due_at(now, service.paused_templates(), runner)
    workers = WorkerProcess.objects.using(service.repository.using)
    return Standing(
        oldest_due_seconds=None if oldest is None else (now - oldest).total_seconds(),
        workers=workers.filter(seen_at__gte=now - ALIVE).count(),
    )


def oldest_due_at(
    now: datetime, paused: Iterable[str], runner: FlowRunner = flow_runner
) -> datetime | None:
    """Return since when the oldest flow is due of the runner's templates but the paused ones.

    Due flows lie in an index by rank, and its ranks are few: one look-up for each.
    """
    found: list[datetime] = []
    names = set(runner.templates) - set(paused)
    for status in WAITING:
        waiting = runner.service.repository.flows.filter(
            status=status, run_at__lte=now, template_name__in=names
        )
        rows = waiting.order_by("ready_rank", "run_at").values_list("ready_rank", "run_at")
        unseen = waiting.filter(ready_rank=None).order_by("run_at")
        found += unseen.values_list("run_at", flat=True)[:1]
        row = rows.filter(ready_rank__isnull=False).first()
        while row is not None:
            found.append(row[1])
            row = rows.filter(ready_rank__gt=row[0]).first()
    return min(found, default=None)


def waiting_unregistered(
    runner: FlowRunner = flow_runner,
    *,
    names: Iterable[str] | None = None,
    statuses: Iterable[FlowStatus] = WAITING,
) -> dict[str, int]:
    """Return how many flows wait for each template that is not registered with the runner.

    They are counted up to `MAX_COUNTED`. Looks at `names` alone, where they are given.
    """
    repository = runner.service.repository
    stored = stored_template_names(repository.using) if names is None else set(names)
    unknown = sorted(stored - set(runner.templates))
    waiting = repository.flows.filter(status__in=list(statuses))
    counts = bounded_counts(
        [waiting.filter(template_name=name) for name in unknown], MAX_COUNTED, repository.using
    )
    return {name: count for name, count in zip(unknown, counts, strict=True) if count}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedProgress:
    """What the attempt in progress says of itself."""

    done: float
    total: float | None
    message: str

    @property
    def words(self) -> str:
        """All of it, in one line for a terminal."""
        done = f"{self.done:g} of {self.total:g}" if self.total else f"{self.done:g} done"
        return f"{done}, {self.message}" if self.message else done


def reported_progress(flow: FlowExecution, running_attempt: int | None) -> ReportedProgress | None:
    """Return what a flow's attempt in progress, whose primary key is given, says of itself."""
    try:
        report = json.loads(flow.task_progress or "null")
        is_current = report["task_execution"] == running_attempt
        found = ReportedProgress(
            done=report["done"],
            total=report["total"],
            message=str(report.get("message") or "")[:200],
        )
    except (ValueError, TypeError, KeyError):
        return None
    return found if is_current and flow.status == FlowStatus.RUNNING else None


def health(request: HttpRequest) -> JsonResponse:
    """Answer a probe: 200 when all is well, else 503, with a JSON object that says why.

    All is well when the database answers, and a worker is alive or nothing has been due for a
    minute. It tells figures only, so it needs no login.
    """
    try:
        now = standing()
    except (DatabaseError, InterfaceError):
        return JsonResponse({"status": "the database does not answer"}, status=503)
    status = "ok" if now.is_well else "flows are due and no worker is alive"
    return JsonResponse({"status": status, **asdict(now)}, status=200 if now.is_well else 503)


class FlowCollector:
    """Gives Prometheus the figures of the flows when it asks; for `REGISTRY.register`.

    Needs the extra `prometheus`. Each figure is one of the whole installation, so have one process
    asked, not each of them.
    """

    def __init__(self, runner: FlowRunner = flow_runner) -> None:
        self._runner = runner

    def describe(self) -> Iterable[GaugeMetricFamily]:
        """Return nothing, so that registering asks the database nothing."""
        return ()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the figures as they are now."""
        from prometheus_client.core import GaugeMetricFamily

        counts = GaugeMetricFamily(
            "ebbs_and_flows_flows",
            f"Flows that are not over or failed, counted up to {MAX_COUNTED}.",
            labels=["template", "status"],
        )
        durations = GaugeMetricFamily(
            "ebbs_and_flows_duration_seconds",
            f"How long the last {LAST_RUNS} flows that succeeded took.",
            labels=["template", "quantile"],
        )
        flows = self._runner.service.repository.flows
        for name in sorted(self._runner.templates):
            of_template = flows.filter(template_name=name).order_by("-pk")
            for status in ("SCHEDULED", "RESCHEDULED", "RUNNING", "FAILED"):
                number = of_template.filter(status=status)[:MAX_COUNTED].count()
                counts.add_metric([name, status.lower()], number)
            took = sorted(
                (finished - started).total_seconds()
                for started, finished in of_template.filter(status="SUCCEEDED").values_list(
                    "started_at", "finished_at"
                )[:LAST_RUNS]
                if started and finished
            )
            for quantile in (0.5, 0.95) if took else ():
                durations.add_metric([name, str(quantile)], took[int(quantile * len(took))])
        yield counts
        yield durations
        now = standing(self._runner)
        yield GaugeMetricFamily(
            "ebbs_and_flows_oldest_due_seconds",
            "For how long the flow that is due for the longest has been so.",
            value=now.oldest_due_seconds or 0,
        )
        yield GaugeMetricFamily(
            "ebbs_and_flows_workers", "Workers seen within a minute.", value=now.workers
        )
