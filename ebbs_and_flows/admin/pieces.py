"""Small pieces of pages: pills, progress, durations, moments."""

from __future__ import annotations

from datetime import datetime

from django.template.defaultfilters import date as format_date
from django.utils import timezone
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from .. import monitoring
from ..conf import get_settings
from ..models import FlowExecution
from ..status import FlowStatus, TaskStatus

MAX_SEGMENTS = 24


def pill(status: str) -> SafeString:
    """Return a status in a pill: a word, so never colour alone."""
    label = FlowStatus(status).label if status in FlowStatus else TaskStatus(status).label
    return format_html('<span class="ebbs-pill ebbs-{}">{}</span>', status.lower(), label)


def progress(flow: FlowExecution) -> SafeString:
    """Return a segment a task, and how many are done in words."""
    total, done = len(flow.task_names), flow.current_task_index
    words = _("%(done)s of %(total)s") % {"done": done, "total": total}
    if total > MAX_SEGMENTS:
        bar = format_html('<progress max="{}" value="{}"></progress>', total, done)
    else:
        at_current = {
            FlowStatus.RUNNING: "running",
            FlowStatus.FAILED: "failed",
            FlowStatus.RESCHEDULED: "failed",
        }.get(FlowStatus(flow.status), "to-come")
        states = ["done"] * done + [at_current] + ["to-come"] * total
        bar = format_html_join("", "<i class=ebbs-{}></i>", ((s,) for s in states[:total]))
    return format_html(
        '<span class="ebbs-progress"><span class="ebbs-segments" aria-hidden="true">{}</span>'
        ' <span class="ebbs-words">{}</span></span>',
        bar,
        words,
    )


def reported_progress(flow: FlowExecution, running_attempt: int | None) -> SafeString | str:
    """Return what the attempt in progress says of itself: a bar, numbers, a message."""
    report = monitoring.reported_progress(flow, running_attempt)
    if report is None:
        return ""
    done, total, message = report.done, report.total, report.message
    if not total:
        words = _("%(done)s done") % {"done": done}
        return format_html('<span class="ebbs-reported">{} <bdi>{}</bdi></span>', words, message)
    words = _("%(done)s of %(total)s") % {"done": done, "total": total}
    return format_html(
        '<span class="ebbs-reported"><progress max="{}" value="{}" aria-label="{}"></progress>'
        " {} <bdi>{}</bdi></span>",
        total,
        done,
        words,
        words,
        message,
    )


def in_words(seconds: float) -> str:
    """Return a span that a template's author gave in seconds, as a sentence has it."""
    if seconds < 120:
        number = f"{seconds:g}"
        return ngettext("%s second", "%s seconds", 1 if seconds == 1 else 2) % number
    if seconds < 7200:
        return ngettext("%s minute", "%s minutes", 2) % f"{seconds / 60:.3g}"
    return ngettext("%s hour", "%s hours", 2) % f"{seconds / 3600:.3g}"


def cut(text: str, length: int) -> str:
    """Return a text, or its beginning and an ellipsis, of at most `length` characters."""
    # Not Django's `Truncator`, whose work on combining characters is quadratic.
    return text if len(text) <= length else f"{text[: length - 1]}…"


def moment(value: datetime | None) -> SafeString | str:
    """Return a moment: short to the eye, all of it to the pointer and to machines."""
    if value is None:
        return ""
    local = timezone.localtime(value) if timezone.is_aware(value) else value
    now = timezone.localtime()
    shown = "H:i:s" if local.date() == now.date() else "j M H:i"
    return format_html(
        '<time datetime="{}" title="{}">{}</time>',
        local.isoformat(),
        format_date(local, "Y-m-d H:i:s T"),
        format_date(local, shown if local.year == now.year else "j M Y H:i"),
    )


def trace_link(trace_id: str) -> SafeString | str:
    """Return a trace's id, linked to where `TRACE_URL` says that traces are shown."""
    url = get_settings().TRACE_URL
    if not url or not trace_id:
        return trace_id
    return format_html('<a href="{}">{}</a>', url.replace("{trace_id}", trace_id), trace_id)
