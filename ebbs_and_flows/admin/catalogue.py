"""What is known of each template: what it does, how its last runs went, what of it waits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import urlencode

from django.contrib import admin
from django.contrib.admin.utils import quote
from django.db.models import QuerySet
from django.http import HttpRequest
from django.urls import NoReverseMatch
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from .. import clock
from ..durations import duration
from ..engines import QueueSchedule, get_engine
from ..flows import FlowTemplate
from ..models import FlowExecution, FlowTemplateState
from ..runner import flow_runner
from ..service import flow_service
from ..status import WAITING, FlowStatus
from .pages import admin_url
from .pieces import moment
from .queries import bounded_counts, rows_of_each, template_names
from .rights import visible_flows
from .rules import ShownTask, shown_task, template_rules

LAST_RUNS = 30
MAX_COUNTED = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """How many flows of a template are in a state, and the list's query that shows them."""

    name: str
    value: str
    url: str
    tone: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Recurring:
    """A recurring schedule: its cron line, its next run, and where it can be changed."""

    name: str
    cron: str
    next_run: Any
    url: str
    # The last due time that was refused, and why.
    refused_for: Any = ""
    refusal: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueEntry:
    """A template in the catalogue, and on its page."""

    name: str
    url: str
    schedule_url: str
    description: str
    tasks: list[ShownTask]
    counts: list[Count]
    bars: SafeString | str
    success_rate: str
    median: str
    percentile: str
    last_run: Any
    rules: list[str]
    paused: FlowTemplateState | None
    may_schedule: bool


def catalogue(
    model_admin: Any, request: HttpRequest
) -> tuple[list[CatalogueEntry], list[tuple[str, str]]]:
    """Return the registered templates, and the name and list address of what only ran once."""
    templates = [flow_runner.templates[name] for name in sorted(flow_runner.templates)]
    site = model_admin.admin_site
    known = template_names(visible_flows(site, request))
    unknown = [name for name in known if name not in flow_runner.templates]
    return entries(model_admin, request, templates), [
        (name, _list_url(site, name)) for name in unknown
    ]


def entries(
    model_admin: Any, request: HttpRequest, templates: Sequence[FlowTemplate]
) -> list[CatalogueEntry]:
    """Return what is known of the templates, in three queries for all."""
    site = model_admin.admin_site
    visible = visible_flows(site, request)
    paused = flow_service.paused_templates()
    counts = bounded_counts(
        [
            visible.filter(template_name=template.name, status__in=statuses)
            for template in templates
            for statuses in (WAITING, [FlowStatus.RUNNING], [FlowStatus.FAILED])
        ],
        MAX_COUNTED,
    )
    runs: dict[str, list[FlowExecution]] = {}
    for run in _last_runs(templates, visible):
        runs.setdefault(run.template_name, []).append(run)
    return [
        _entry(
            site,
            template,
            counts[3 * number : 3 * number + 3],
            sorted(runs.get(template.name, []), key=lambda run: run.pk)[-LAST_RUNS:],
            paused.get(template.name),
            may_schedule=model_admin.has_schedule_permission(request, template),
        )
        for number, template in enumerate(templates)
    ]


def _last_runs(
    templates: Sequence[FlowTemplate], visible: QuerySet[FlowExecution]
) -> list[FlowExecution]:
    return rows_of_each(
        [
            visible.filter(template_name=template.name, status=status).order_by("-pk")[:LAST_RUNS]
            for template in templates
            for status in (FlowStatus.SUCCEEDED, FlowStatus.FAILED)
        ],
        ["id", "template_name", "status", "started_at", "finished_at"],
    )


def _entry(
    site: admin.AdminSite,
    template: FlowTemplate,
    counts: Sequence[int],
    runs: Sequence[FlowExecution],
    paused: FlowTemplateState | None,
    *,
    may_schedule: bool,
) -> CatalogueEntry:
    succeeded = [run for run in runs if run.status == FlowStatus.SUCCEEDED]
    times = sorted(run.duration for run in succeeded if run.duration is not None)
    prefix = "ebbs_and_flows_flowtemplatestate"
    quoted = quote(template.name)
    named = zip(
        ((_("waiting"), "waiting"), (_("running"), "RUNNING"), (_("failed"), "FAILED")),
        counts,
        strict=True,
    )
    return CatalogueEntry(
        name=template.name,
        url=admin_url(site, f"{prefix}_change", quoted),
        schedule_url=admin_url(site, f"{prefix}_schedule", quoted),
        description=template.description,
        tasks=[shown_task(number, task) for number, task in enumerate(template.tasks, start=1)],
        counts=[
            Count(
                name=name,
                value=f"{count}+" if count == MAX_COUNTED else str(count),
                url=_list_url(site, template.name, status),
                tone="bad" if status == FlowStatus.FAILED and count else "",
            )
            for (name, status), count in named
        ],
        bars=_bars(site, runs),
        success_rate=f"{100 * len(succeeded) / len(runs):.0f} %" if runs else "–",
        median=duration(_percentile(times, 50)) or "–",
        percentile=duration(_percentile(times, 95)) or "–",
        last_run=moment(max((r.finished_at for r in runs if r.finished_at), default=None)),
        rules=template_rules(template),
        paused=paused,
        may_schedule=may_schedule,
    )


def _percentile(ordered: Sequence[timedelta], percent: int) -> timedelta | None:
    """Return the nearest-rank percentile of durations in ascending order."""
    if not ordered:
        return None
    return ordered[max(math.ceil(len(ordered) * percent / 100) - 1, 0)]


def _list_url(site: admin.AdminSite, name: str, status: str = "") -> str:
    query = {"template": name, **({"status": status} if status else {})}
    return f"{admin_url(site, 'ebbs_and_flows_flowexecution_changelist')}?{urlencode(query)}"


def _bars(site: admin.AdminSite, runs: Sequence[FlowExecution]) -> SafeString | str:
    """Return a bar a run, as high as the run was long, that leads to it."""
    if not runs:
        return ""
    # Of one run that waited for days, the others are not to look all the same.
    times = sorted(run.duration or timedelta(0) for run in runs)
    longest = _percentile(times, 90)
    width = 100 / LAST_RUNS
    # Looked up once: a catalogue has a thousand bars.
    flows_url = admin_url(site, "ebbs_and_flows_flowexecution_changelist")
    drawn = []
    for number, run in enumerate(runs, start=LAST_RUNS - len(runs)):
        took = run.duration or timedelta(0)
        height = min(max(100 * (took / longest if longest else 1), 12), 100)
        status = FlowStatus(run.status)
        drawn.append(
            (
                f"{flows_url}{run.pk}/change/",
                f"#{run.pk}: {status.label}, {duration(took)}",
                status.value.lower(),
                f"{number * width + width * 0.1:.2f}",
                f"{100 - height:.2f}",
                f"{width * 0.8:.2f}",
                f"{height:.2f}",
            )
        )
    failed = sum(run.status == FlowStatus.FAILED for run in runs)
    words = ngettext("The last run", "The last %(count)d runs", len(runs)) % {"count": len(runs)}
    return format_html(
        '<svg class="ebbs-runs" width="100%" height="36" role="group" aria-label="{}">{}</svg>',
        f"{words}: " + ngettext("%d failed", "%d failed", failed) % failed,
        format_html_join(
            "",
            '<a href="{0}" aria-label="{1}"><title>{1}</title>'
            '<rect class="ebbs-hit" x="{3}%" y="0" width="{5}%" height="100%"/>'
            '<rect class="ebbs-{2}" x="{3}%" y="{4}%" width="{5}%" height="{6}%" rx="1"/></a>',
            drawn,
        ),
    )


def recurring(template: FlowTemplate, site: admin.AdminSite) -> list[Recurring]:
    """Return the template's recurring schedules, as the queue has them."""
    stored = get_engine().schedules()
    refusals = flow_runner.recurring_refusals()
    now: datetime = clock.now()
    found = []
    for recurrence in flow_runner.recurrences.values():
        if recurrence.template_name != template.name:
            continue
        schedule = stored.get(recurrence.name)
        refused_for, refusal = refusals.get(recurrence.name, (None, ""))
        found.append(
            Recurring(
                name=recurrence.name,
                cron=schedule.cron if schedule else recurrence.cron,
                next_run=moment(schedule.next_run_at if schedule else recurrence.next_after(now)),
                url=_schedule_url(site, schedule) if schedule else "",
                refused_for=moment(refused_for),
                refusal=refusal,
            )
        )
    return found


def _schedule_url(site: admin.AdminSite, schedule: QueueSchedule) -> str:
    try:
        return admin_url(site, f"{schedule.admin_name}_change", schedule.pk)
    except NoReverseMatch:
        # The queue's models are not in this admin.
        return ""
