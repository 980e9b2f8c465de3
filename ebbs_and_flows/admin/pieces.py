"""Small pieces of pages: pills, progress, durations, stored values made readable."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _
from django.views.debug import SafeExceptionReporterFilter

from ..models import FlowExecution
from ..status import FlowStatus, TaskStatus

MAX_SEGMENTS = 24
MAX_SHOWN = 20_000
FOLDED_ABOVE = 200

_SECRET = SafeExceptionReporterFilter.hidden_settings
_MASK = SafeExceptionReporterFilter.cleansed_substitute


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
    return format_html('<span class="ebbs-progress" aria-hidden="true">{}</span> {}', bar, words)


def duration(value: timedelta | None) -> str:
    """Return a duration in the one or two units that matter."""
    if value is None:
        return ""
    seconds = value.total_seconds()
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if hours < 1:
        return f"{minutes} min {int(seconds % 60)} s"
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownValue:
    """A stored value, as a page shows it."""

    type: str
    text: str
    is_long: bool


def shown_value(name: str, stored: str, size: int) -> ShownValue:
    """Return an entry's value for a page, with what looks secret masked.

    `stored` is the beginning of its stored text, `size` the length of all of it, in characters.
    Nothing is decoded: a page must not load a model's row, nor fail where one is gone.
    """
    if _SECRET.search(name):
        return ShownValue(type="", text=_MASK, is_long=False)
    if size > len(stored):
        if _SECRET.search(stored):
            text = _("Too long to be shown with what looks secret in it masked.")
        else:
            text = stored + "\n" + _("… cut here: %(size)s characters in all.") % {"size": size}
        return ShownValue(type="", text=text, is_long=True)
    try:
        node = json.loads(stored)
    except ValueError:
        return ShownValue(type="", text=stored, is_long=size > FOLDED_ABOVE)
    text = json.dumps(_masked(node), ensure_ascii=False, indent=2)
    # Lone surrogates cannot be sent to a browser.
    text = text.encode("utf-8", "backslashreplace").decode()
    return ShownValue(type=_type_of(node), text=text, is_long=len(text) > FOLDED_ABOVE)


def _masked(node: Any) -> Any:
    if isinstance(node, list):
        # A dict whose keys are not all texts is stored as pairs.
        if len(node) == 2 and isinstance(node[0], str) and _SECRET.search(node[0]):
            return [node[0], _MASK]
        return [_masked(item) for item in node]
    if isinstance(node, dict):
        return {key: _MASK if _SECRET.search(key) else _masked(item) for key, item in node.items()}
    return node


def _type_of(node: Any) -> str:
    if isinstance(node, dict):
        return str(node.get("model") or node.get("$type") or "dict")
    return "None" if node is None else type(node).__name__
