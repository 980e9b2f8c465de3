"""The forms of the pages: contexts as JSON, scheduling, a task that was done by hand."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from django import forms
from django.utils.translation import gettext_lazy as _
from django.utils.translation import pgettext_lazy

from ..context import ExecutionContext
from ..exceptions import EbbsAndFlowsError, UnreadableInput
from ..operator_input import FindRow, find_any_row, parse, value_like
from ..validation import MAX_PRIORITY, MIN_PRIORITY, NAME_LENGTH


class JsonTextarea(forms.Textarea):
    """A text area for JSON: read from left to right in every language, and not spell-checked."""

    def __init__(self, rows: int = 6) -> None:
        super().__init__(
            attrs={"rows": rows, "class": "ebbs-json", "dir": "ltr", "spellcheck": "false"}
        )


class ContextField(forms.CharField):
    """Entries as one JSON object; cleans to a dict of values.

    A value becomes what `types` has under its name, a parsed stored value; others stay as JSON
    has them.
    """

    widget = JsonTextarea
    types: Mapping[str, Any] = MappingProxyType({})
    find_row: FindRow = staticmethod(find_any_row)

    def __init__(self, **options: Any) -> None:
        options.setdefault("help_text", _('A JSON object, such as {"order_id": 42}.'))
        super().__init__(required=False, strip=True, **options)

    def clean(self, value: Any) -> dict[str, Any]:
        """Return the entries; a `ValidationError` says what is wrong and where."""
        text = super().clean(value)
        return self._read(text) if text else {}

    def _read(self, text: str) -> dict[str, Any]:
        try:
            given = parse(text)
            if type(given) is not dict:
                raise UnreadableInput(
                    _('Give a JSON object, such as {"order_id": 42}, not a %(type)s.')
                    % {"type": type(given).__name__}
                )
            return dict(ExecutionContext({name: self._value(name, given[name]) for name in given}))
        except EbbsAndFlowsError as error:
            raise forms.ValidationError(str(error)) from error

    def _value(self, name: str, value: Any) -> Any:
        try:
            return value_like(value, self.types.get(name), self.find_row)
        except UnreadableInput as error:
            if name not in self.types:
                raise
            raise UnreadableInput(
                _("The entry %(name)s cannot be read: %(problem)s")
                % {"name": repr(name), "problem": error}
            ) from error


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

    def read_context_like(self, types: Mapping[str, Any], find_row: FindRow) -> None:
        """Have the context's values read as these, parsed stored values by their names."""
        if "context" in self.fields:
            context: Any = self.fields["context"]
            context.types, context.find_row = types, find_row


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
