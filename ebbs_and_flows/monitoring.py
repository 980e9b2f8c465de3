"""How things stand, for machines: a health view for probes, and a Prometheus collector.

What is asked of the database is bounded, however many flows there are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum, StrEnum
from typing import TYPE_CHECKING, Any

from django.contrib.auth.decorators import login_not_required
from django.db import DatabaseError, InterfaceError
from django.db.models import Count, Min, Q
from django.http import HttpRequest, JsonResponse
from django.utils.crypto import constant_time_compare
from django.views.decorators.cache import cache_control
from django.views.decorators.http import require_safe

from .bounded import bounded_counts, oldest_due, stored_template_names
from .conf import get_settings
from .engines import get_engine
from .models import FlowExecution, WorkerProcess
from .plans import Fit, Plan, difference, fit, offer
from .repository import DatabaseNow
from .runner import FlowRunner, flow_runner
from .status import WAITING, FlowStatus

if TYPE_CHECKING:
    from prometheus_client.core import GaugeMetricFamily

MAX_COUNTED = 10_000
"""Up to where flows are counted; a figure that high means: so many or more."""
MAX_WORKERS = 200
"""Of how many workers the templates are read at most."""
UNFINISHED = [
    status for status in FlowStatus if status not in (FlowStatus.SUCCEEDED, FlowStatus.CANCELLED)
]
"""The statuses of flows that a worker may take up again, now or after an act of an operator."""
LAST_RUNS = 100
"""How many runs of each template its durations are taken from."""
ALIVE = timedelta(seconds=30)
"""A worker shows itself every ten seconds; one that is seen no more for this long is gone."""


class Trouble(StrEnum):
    """Why due flows are not run."""

    NO_WORKER = "no worker"
    """No worker is alive."""
    NO_CODE = "no code"
    """Workers are alive, and none has the code that fits."""
    NOT_TAKEN = "not taken"
    """Workers are alive and have been free for long enough."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What waits to be done, and who is there to do it."""

    # For how long the flow that is due for the longest has been so; None if none is due.
    oldest_due_seconds: float | None
    # How many live.
    workers: int
    # How many of these have run nothing for `MAX_DUE_SECONDS`.
    free_workers: int
    # None when all is well.
    trouble: Trouble | None = None
    # Which flow fits the code of no live worker, and why, when that is the trouble.
    unfit: str = ""

    @property
    def is_well(self) -> bool:
        """Whether due flows are run, or wait for workers that are busy."""
        return self.trouble is None

    @property
    def reason(self) -> str:
        """Why due flows are not run, and the way out, in a sentence; empty when all is well."""
        if self.trouble is None:
            return ""
        due = f"A flow has been due for {self.oldest_due_seconds or 0:.0f} s"
        command = get_engine().worker_command
        if self.trouble is Trouble.NO_WORKER:
            return f"{due}, and no worker is alive: start one with manage.py {command}."
        if self.trouble is Trouble.NO_CODE:
            return f"{due}, and no live worker has the code for it. {self.unfit}"
        return (
            f"{due}, and none of the free workers ({self.free_workers}) takes it: restart what"
            f" runs manage.py {command}."
        )


def standing(runner: FlowRunner = flow_runner, *, at: datetime | None = None) -> Standing:
    """Return how things stand now, by a few small queries.

    Flows that no worker could run now are left out: of paused templates, of templates that run as
    many flows as they may, and of those that are not registered with the runner. Takes the
    database's time, where it was asked for it already.
    """
    service = runner.service
    now = at or service.repository.now()
    longest = timedelta(seconds=get_settings().MAX_DUE_SECONDS)
    using = service.repository.using
    oldest = oldest_due(service.claimable_templates(runner.templates.values()), using)
    workers = WorkerProcess.objects.using(using).aggregate(
        alive=Count("pk", filter=Q(seen_at__gte=now - ALIVE)),
        free=Count("pk", filter=Q(seen_at__gte=now - ALIVE, idle_since__lte=now - longest)),
    )
    trouble, unfit = None, []
    if oldest is not None and oldest > longest:
        if not workers["alive"]:
            trouble = Trouble.NO_WORKER
        elif unfit := flows_that_fit_no_worker(runner):
            trouble = Trouble.NO_CODE
        elif workers["free"]:
            trouble = Trouble.NOT_TAKEN
    return Standing(
        oldest_due_seconds=None if oldest is None else oldest.total_seconds(),
        workers=workers["alive"],
        free_workers=workers["free"],
        trouble=trouble,
        unfit=unfit[0] if unfit else "",
    )


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


class CodeFit(Enum):
    """Whether the flows of a stored plan can go on with the code of a process."""

    YES = "yes"
    SOME = "only those that have not come too far"
    NO = "no"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanInUse:
    """A plan that unfinished flows have."""

    plan: Plan
    flows: int
    fits: CodeFit

    @property
    def as_json(self) -> dict[str, Any]:
        """All of it, as values that JSON has."""
        return {
            "template": self.plan.template_name,
            "version": self.plan.version,
            "tasks": list(self.plan.task_names),
            "flows": self.flows,
            "fits": self.fits.name.lower(),
        }


def plans_in_use(
    template_name: str | None = None, runner: FlowRunner = flow_runner
) -> list[PlanInUse]:
    """Return the plans of unfinished flows, of all templates or one, with how many have each.

    One query counts them all, so it takes longer the more unfinished flows there are.
    """
    flows = runner.service.repository.flows
    unfinished = flows.filter(status__in=UNFINISHED)
    if template_name is not None:
        unfinished = unfinished.filter(template_name=template_name)
    counted = (
        unfinished.order_by().values("plan_digest").annotate(flows=Count("pk"), one=Min("pk"))
    )
    counts = {row["one"]: row["flows"] for row in counted}
    plans = {pk: flow.plan for pk, flow in flows.in_bulk(list(counts)).items()}
    templates = runner.templates
    found = []
    for pk, plan in plans.items():
        template = templates.get(plan.template_name)
        fitting = None if template is None else offer(plan, template.plan)
        fits = CodeFit.NO
        if fitting is not None:
            fits = CodeFit.YES if fitting.up_to >= len(plan.task_names) else CodeFit.SOME
        found.append(PlanInUse(plan=plan, flows=counts[pk], fits=fits))
    return sorted(found, key=lambda item: (item.plan.template_name, item.plan.version))


def flows_that_fit_no_worker(
    runner: FlowRunner = flow_runner, *, names: Iterable[str] | None = None
) -> list[str]:
    """Return a sentence for each plan of which due flows fit the code of no live worker.

    There is none where no worker is alive. It takes one small query for each plan of due flows.
    Looks at the templates of these `names` alone, where they are given.
    """
    repository = runner.service.repository
    codes = live_codes(runner)
    if not codes:
        return []
    found = []
    wanted = None if names is None else set(names)
    for digest, plan in repository.ready_plans().items():
        if wanted is not None and plan.template_name not in wanted:
            continue
        fitting = [item for code in codes if (item := offer(plan, code)) is not None]
        left = repository.flows.filter(
            plan_digest=digest,
            ready_rank__isnull=False,
            current_task_index__gt=max((item.up_to for item in fitting), default=-1),
        )
        flow = left.order_by("ready_rank", "run_at", "id").first()
        if flow is not None:
            found.append(why_it_fits_none(flow, codes))
    return found


def live_codes(runner: FlowRunner = flow_runner) -> set[Plan]:
    """Return the plans of the templates that live workers have published."""
    repository = runner.service.repository
    alive = WorkerProcess.objects.using(repository.using).filter(seen_at__gte=DatabaseNow(-ALIVE))
    published = alive.order_by("-seen_at").values_list("templates", flat=True)[:MAX_WORKERS]
    return {Plan.of(*template) for templates in published for template in templates}


def why_it_fits_none(flow: FlowExecution, codes: Iterable[Plan]) -> str:
    """Return why none of the live workers' codes takes a flow, and the way out; empty if one does.

    It is empty, too, where no worker is alive, and for a flow that is over or that a worker holds.
    """
    codes = list(codes)
    if not codes or flow.lease_expires_at is not None or flow.status not in UNFINISHED:
        return ""
    plan, index = flow.plan, flow.current_task_index
    known = [code for code in codes if code.template_name == plan.template_name]
    if any(fit(plan, index, code) is not Fit.LEAVES for code in known):
        return ""
    if not known:
        why = f"no live worker knows {plan.template_name!r}: restart the workers"
    else:
        newest = max(known, key=lambda code: code.version)
        why = f"{difference(plan, index, newest)}: restart the workers, or use adoptflows"
    return f"Flow {flow.pk} fits no live worker: {why}."


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


@login_not_required
@cache_control(no_store=True)
@require_safe
def health(request: HttpRequest) -> JsonResponse:
    """Answer a probe: 200 with `{"status": "up"}`, else 503 with `{"status": "down"}`.

    It is up when the database answers and no flow has been due for more than `MAX_DUE_SECONDS`
    while no worker was alive, none had the code for it, or live workers were free. Flows
    that wait for workers which are busy are not counted as trouble.

    With the header `Authorization: Bearer …`, with `HEALTH_TOKEN`, the answer has the reason in a
    sentence and the figures as well. It never has a value of a flow.
    """
    try:
        now = standing()
    except (DatabaseError, InterfaceError):
        details: dict[str, Any] = {"reason": "The database does not answer."}
        is_up = False
    else:
        is_up = now.is_well
        details = {
            "reason": now.reason,
            "oldest_due_seconds": now.oldest_due_seconds,
            "workers": now.workers,
            "free_workers": now.free_workers,
        }
    answer = {"status": "up" if is_up else "down", **(details if _may_know(request) else {})}
    return JsonResponse(answer, status=200 if is_up else 503)


def _may_know(request: HttpRequest) -> bool:
    """Return whether a request has the token of `HEALTH_TOKEN`."""
    token = get_settings().HEALTH_TOKEN
    given = request.headers.get("Authorization", "")
    return bool(token) and constant_time_compare(given, f"Bearer {token}")


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
            "ebbs_and_flows_workers", "Workers seen within 30 seconds.", value=now.workers
        )
