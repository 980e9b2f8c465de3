"""The rules of templates and tasks in words: retries, time-outs, limits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from ..conf import get_settings
from ..flows import FlowTemplate, Retry, Task
from .pieces import in_words


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownTask:
    """A task of a template, with its rules in words."""

    number: int
    name: str
    description: str
    rules: list[str]


def shown_task(number: int, task: Task) -> ShownTask:
    """Return what a template's page says of a task."""
    rules = []
    if task.retry is not None:
        rules.append(retry_in_words(task.retry))
    if task.timeout is not None:
        rules.append(_("At most %(time)s an attempt.") % {"time": in_words(task.timeout)})
    if task.atomic:
        rules.append(_("In one transaction with its record."))
    return ShownTask(number=number, name=task.name, description=task.description, rules=rules)


def retry_in_words(retry: Retry) -> str:
    """Return a retry rule as a sentence."""
    if retry.attempts == 1:
        return _("One attempt, no retry.")
    attempts = ngettext("%d attempt in all", "%d attempts in all", retry.attempts)
    parts = [attempts % retry.attempts]
    if not retry.delay:
        parts.append(_("without a wait"))
    elif retry.backoff == 1 or retry.attempts == 2:
        parts.append(_("%(time)s apart") % {"time": in_words(retry.delay)})
    else:
        parts.append(
            _("the first retry after %(time)s, each later one after %(times)s times as long")
            % {"time": in_words(retry.delay), "times": f"{retry.backoff:g}"}
        )
        last = retry.delay * float(retry.backoff) ** min(retry.attempts - 2, 200)
        if last > retry.max_delay:
            parts.append(_("at most %(time)s") % {"time": in_words(retry.max_delay)})
    if retry.on != (Exception,):
        parts.append(_("on %(errors)s only") % {"errors": _names(retry.on)})
    if retry.never_on:
        parts.append(_("never on %(errors)s") % {"errors": _names(retry.never_on)})
    return ", ".join(parts) + "."


def _names(errors: Iterable[type[BaseException]]) -> str:
    return ", ".join(error.__name__ for error in errors)


def template_rules(template: FlowTemplate) -> list[str]:
    """Return what holds for all flows of a template."""
    rules = []
    if template.max_running is not None:
        rules.append(
            ngettext(
                "At most %d flow of it runs at once.",
                "At most %d flows of it run at once.",
                template.max_running,
            )
            % template.max_running
        )
    if template.deadline is not None:
        rules.append(
            _("A flow fails by itself when it is not over %(time)s after its moment.")
            % {"time": in_words(template.deadline)}
        )
    days = get_settings().KEEP_DAYS if template.keep_days is None else template.keep_days
    if days:
        rules.append(
            _("A flow that succeeded or was cancelled is deleted after %(days)s days.")
            % {"days": f"{days:g}"}
        )
    return rules
