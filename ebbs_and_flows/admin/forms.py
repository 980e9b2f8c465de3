"""The forms of the pages: contexts as JSON, scheduling, a task that was done by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from django import forms
from django.utils.translation import gettext_lazy as _
from django.utils.translation import pgettext_lazy

from ..context import ExecutionContext
from ..exceptions import EbbsAndFlowsError, UnreadableValue
from ..validation import MAX_PRIORITY, MIN_PRIORITY, NAME_LENGTH
from ..values import decode
from .values_shown import type_of


class JsonTextarea(forms.Textarea):
    """A text area for JSON: read from left to right in every language, and not spell-checked."""

    def __init__(self, rows: int = 6) -> None:
        super().__init__(
            attrs={"rows": rows, "class": "ebbs-json", "dir": "ltr", "spellcheck": "false"}
        )


class ContextField(forms.CharField):
    """Entries as one JSON object; cleans to a dict of decoded values."""

    widget = JsonTextarea

    def __init__(self, **options: Any) -> None:
        options.setdefault("help_text", _('A JSON object, such as {"order_id": 42}.'))
        super().__init__(required=False, strip=True, **options)

    def clean(self, value: Any) -> dict[str, Any]:
        """Return the entries; a `ValidationError` says where the JSON is wrong."""
        text = super().clean(value)
        return dict(_read_entries(text)) if text else {}


def read_value(text: str) -> Any:
    """Return the value of a text that was typed in a value's stored form.

    Raises `ValidationError` with what is wrong and where.
    """
    try:
        node = json.loads(text, object_pairs_hook=_each_name_once)
    except json.JSONDecodeError as error:
        raise forms.ValidationError(
            _("This is no JSON: %(problem)s (line %(line)s, column %(column)s)."),
            params={"problem": error.msg, "line": error.lineno, "column": error.colno},
        ) from error
    except RecursionError:
        raise forms.ValidationError(_("This is nested too deeply.")) from None
    try:
        return decode(text)
    except UnreadableValue as error:
        raise forms.ValidationError(
            _("This cannot be read as a value of the type %(type)s: %(problem)s"),
            params={"type": type_of(node), "problem": str(error.__cause__ or error)},
        ) from error
    except EbbsAndFlowsError as error:
        raise forms.ValidationError(str(error)) from error


def _read_entries(text: str) -> Mapping[str, Any]:
    entries = read_value(text)
    if type(entries) is not dict:
        raise forms.ValidationError(
            _('Give a JSON object, such as {"order_id": 42}, not a %(type)s.'),
            params={"type": type(entries).__name__},
        )
    try:
        return ExecutionContext(entries)
    except EbbsAndFlowsError as error:
        raise forms.ValidationError(str(error)) from error


def _each_name_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _value in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise forms.ValidationError(
            _("The name %(name)s is there twice."), params={"name": repr(twice)}
        )
    return entries


class ScheduleForm(forms.Form):
    """When, how urgently and under which key a flow is to run; and its context as JSON."""

    context = ContextField(label=_("Context"))
    run_at = forms.DateTimeField(
        label=_("Not before"),
        required=False,
        widget=forms.DateTimeInput(
            attrs={"type": "datetime-local", "step": "1"}, format="%Y-%m-%dT%H:%M:%S"
        ),
        help_text=_("Empty or past: at once."),
    )
    key = forms.CharField(
        label=pgettext_lazy("idempotency key", "Key"),
        required=False,
        max_length=NAME_LENGTH,
        help_text=_("Of two flows of a template with the same key, only the first is made."),
    )
    priority = forms.IntegerField(
        label=_("Priority"),
        initial=0,
        min_value=MIN_PRIORITY,
        max_value=MAX_PRIORITY,
        help_text=_("From -100 to 100, higher first."),
    )

    def __init__(self, *arguments: Any, has_parameters: bool, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if has_parameters:
            del self.fields["context"]


class ByHandForm(forms.Form):
    """How a failed task was done outside, and what it would have stored."""

    reason = forms.CharField(
        label=_("How it was done"),
        widget=forms.Textarea(attrs={"rows": 2}),
        max_length=2000,
        help_text=_("It stays in the flow's history, with your name."),
    )
    entries = ContextField(
        label=_("Entries that the task would have added"),
        help_text=_('A JSON object, such as {"receipt": "R-17"}. Empty: none.'),
    )
