"""Rerun from…: a new flow that starts at a chosen task, with a context that may be corrected."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from django import forms
from django.contrib import admin, messages
from django.contrib.admin.models import ADDITION, CHANGE
from django.db.models import Q, QuerySet
from django.db.models.functions import Left, Length
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.utils.html import format_html
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy
from django.views.decorators.debug import sensitive_variables

from ..entry_codec import stored_node
from ..exceptions import EbbsAndFlowsError, InvalidParameters, UnreadableInput
from ..models import ExecutionContextEntry, FlowExecution
from ..operator_input import FindRow, is_unchanged, parse, read_like, value_like
from ..runner import flow_runner
from ..status import FlowStatus
from .access import values_shown
from .entries import flow_entries
from .forms import JsonTextarea
from .pages import actor, flow_url, log, page_context
from .pieces import cut, pill, progress
from .queries import bounded_counts
from .rights import entries_of, may_see_values
from .rows import visible_rows
from .values_shown import ShownValue, shown_value

TEMPLATE = "admin/ebbs_and_flows/flowexecution/rerun_from.html"
MAX_EDITABLE = 100
MAX_EDITED = 10_000
MAX_COUNTED = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class EditableEntry:
    """An entry that the chosen task saw."""

    pk: int
    name: str
    value: ShownValue

    @property
    def is_prefilled(self) -> bool:
        """Whether the form holds the value; one that is masked or cut it does not."""
        return bool(self.value.json)


class RerunForm(forms.Form):
    """The entries that may be corrected, and one more."""

    other_name = forms.CharField(
        label=gettext_lazy("Name"), required=False, max_length=200, strip=False
    )
    other_value = forms.CharField(
        label=gettext_lazy("Value"),
        required=False,
        widget=JsonTextarea(rows=2),
        help_text=gettext_lazy('As JSON, a text in quotes: "tea".'),
    )

    def __init__(
        self,
        entries: list[EditableEntry],
        find_node: Callable[[str], Any],
        find_row: FindRow,
        data: Any = None,
    ) -> None:
        super().__init__(data)
        self._find_node = find_node
        self._find_row = find_row
        self.entries = {entry.pk: entry for entry in entries}
        self._wrong_types: set[int] = set()
        for entry in entries:
            rows = min(entry.value.json.count("\n") + 1, 12)
            self.fields[f"value_{entry.pk}"] = forms.CharField(
                label=entry.name,
                required=False,
                initial=entry.value.json,
                widget=JsonTextarea(rows=rows),
                help_text=_("A text stands in quotes.") if entry.value.type == "str" else "",
            )
            self.fields[f"retype_{entry.pk}"] = forms.BooleanField(
                label=gettext_lazy("Another type is meant"), required=False
            )

    def rows(self) -> list[dict[str, Any]]:
        """Return what the page shows of each entry."""
        return [
            {
                "entry": entry,
                "field": self[f"value_{pk}"],
                "retype": self[f"retype_{pk}"],
                # Offered only where it is needed.
                "asks_for_retype": pk in self._wrong_types or self[f"retype_{pk}"].value(),
            }
            for pk, entry in self.entries.items()
        ]

    def clean(self) -> dict[str, Any]:
        """Collect in `changes` what differs from what is stored."""
        cleaned = super().clean() or {}
        changes: dict[str, Any] = {}
        for entry in self.entries.values():
            self._clean_entry(entry, cleaned, changes)
        self._clean_other(cleaned, changes)
        return {**cleaned, "changes": changes}

    def add_problems(self, problems: dict[str, list[str]]) -> None:
        """Put what the template's form says beside the entries that it is about."""
        fields = {entry.name: f"value_{pk}" for pk, entry in self.entries.items()}
        if other := self.cleaned_data.get("other_name"):
            fields[other] = "other_value"
        for name, texts in problems.items():
            for text in texts:
                self.add_error(fields.get(name), text if name in fields else f"{name}: {text}")

    def _clean_entry(
        self, entry: EditableEntry, cleaned: dict[str, Any], changes: dict[str, Any]
    ) -> None:
        name = f"value_{entry.pk}"
        text = cleaned.get(name, "")
        if not text:
            if entry.is_prefilled:
                self.add_error(name, _('Give a value as JSON: null for None, "" for no text.'))
            return
        node = self._find_node(entry.name)
        if entry.is_prefilled and is_unchanged(text, node):
            return
        try:
            if cleaned.get(f"retype_{entry.pk}"):
                changes[entry.name] = value_like(parse(text), None, self._find_row)
            else:
                changes[entry.name] = read_like(text, node, self._find_row)
        except UnreadableInput as error:
            problem = str(error)
            if error.is_another_type:
                self._wrong_types.add(entry.pk)
                problem += " " + _("Or tick that another type is meant.")
            self.add_error(name, problem)

    def _clean_other(self, cleaned: dict[str, Any], changes: dict[str, Any]) -> None:
        name, text = cleaned.get("other_name", ""), cleaned.get("other_value", "")
        if not name and not text:
            return
        if not name or not text:
            self.add_error(
                "other_value" if name else "other_name", _("Give both a name and a value.")
            )
        elif name in changes:
            self.add_error("other_name", _("This entry is changed above."))
        else:
            try:
                node = self._find_node(name)
                changes[name] = read_like(text, node, self._find_row)
            except UnreadableInput as error:
                self.add_error("other_value", str(error))


@sensitive_variables()
def rerun_page(
    model_admin: admin.ModelAdmin[Any], request: HttpRequest, flow: FlowExecution
) -> HttpResponse:
    """Show the context as the chosen task saw it, and make the new flow."""
    choices = _choices(flow)
    chosen = _chosen(request, flow, len(choices))
    site = model_admin.admin_site
    sees_values = may_see_values(site, request)
    before = flow.task_names[:chosen]
    entries, more = _entries(entries_of(site, request, flow), before) if sees_values else ([], 0)
    is_post = request.method == "POST"
    form = RerunForm(
        entries,
        lambda name: _stored_node(flow, name),
        visible_rows(model_admin.admin_site, request),
        request.POST if is_post else None,
    )
    if not sees_values:
        form.fields.clear()
    if is_post and request.POST.get("task", "") not in {"", str(chosen)}:
        # Another task than the one that was meant may charge twice.
        form.add_error(None, _("Choose one of the tasks that the flow has reached."))
    if is_post and choices and form.is_valid():
        try:
            rerun = flow_runner.fork_flow_execution(
                flow,
                from_task=chosen,
                changes=form.cleaned_data["changes"],
                actor=actor(request),
            )
        except InvalidParameters as error:
            form.add_problems(error.errors)
        except EbbsAndFlowsError as error:
            form.add_error(None, str(error))
        else:
            task = choices[chosen - flow.first_task_index]
            changes = form.cleaned_data["changes"]
            return _made(model_admin, request, flow, rerun, task, changes)
    if entries:
        values_shown(request, flow.pk, "rerun form")
    context = page_context(
        model_admin,
        request,
        _("Rerun %(flow)s from…") % {"flow": flow},
        flow=flow,
        pill=pill(flow.status),
        progress=progress(flow),
        choices=list(enumerate(choices, start=flow.first_task_index)),
        chosen=chosen,
        chosen_name=choices[chosen - flow.first_task_index] if choices else "",
        form=form,
        may_see_values=sees_values,
        more_entries=more,
        crumb=_("Rerun from…"),
    )
    return TemplateResponse(request, TEMPLATE, context)


def _made(
    model_admin: admin.ModelAdmin[Any],
    request: HttpRequest,
    flow: FlowExecution,
    rerun: FlowExecution,
    task: str,
    changes: Collection[str],
) -> HttpResponse:
    site = model_admin.admin_site
    changed = ""
    if changes:
        # The names, and never the values.
        names = cut(", ".join(changes), 500)
        changed = "; " + _("changed: %(names)s") % {"names": names}
    did = _("Rerun from %(task)s as #%(id)s") % {"task": task, "id": rerun.pk}
    log(request, flow, CHANGE, did + changed)
    did = _("Rerun of #%(id)s from %(task)s") % {"task": task, "id": flow.pk}
    log(request, rerun, ADDITION, did + changed)
    messages.success(
        request,
        format_html(
            _("This is a new flow, a rerun of {} that starts at task {}."),
            format_html('<a href="{}">#{}</a>', flow_url(site, flow.pk), flow.pk),
            task,
        ),
    )
    return HttpResponseRedirect(flow_url(site, rerun.pk))


def _choices(flow: FlowExecution) -> list[str]:
    """Return the names of the tasks whose first context is recorded, from the first one on."""
    template = flow_runner.templates.get(flow.template_name)
    if template is None:
        return []
    end = min(flow.current_task_index + 1, len(template.tasks))
    return template.task_names[flow.first_task_index : end]


def _chosen(request: HttpRequest, flow: FlowExecution, count: int) -> int:
    first = flow.first_task_index
    given = request.POST.get("task") or request.GET.get("task") or ""
    if (
        given.isascii()
        and given.isdigit()
        and len(given) < 9
        and first <= int(given) < first + count
    ):
        return int(given)
    is_stopped = flow.status in {FlowStatus.FAILED, FlowStatus.CANCELLED}
    return min(flow.current_task_index, first + max(count - 1, 0)) if is_stopped else first


def _entries(
    of_flow: QuerySet[ExecutionContextEntry], before: Sequence[str]
) -> tuple[list[EditableEntry], int]:
    """Return the entries that were there when only the tasks named had run."""
    found = of_flow.filter(Q(task_execution=None) | Q(task_execution__task_name__in=before))
    rows = list(
        found.annotate(shown=Left("value", MAX_EDITED), size=Length("value")).values_list(
            "pk", "name", "shown", "size"
        )[: MAX_EDITABLE + 1]
    )
    more = 0
    if len(rows) > MAX_EDITABLE:
        more = bounded_counts([found], MAX_COUNTED)[0] - MAX_EDITABLE
    return [
        EditableEntry(pk=pk, name=name, value=shown_value(name, text, size))
        for pk, name, text, size in rows[:MAX_EDITABLE]
    ], more


def _stored_node(flow: FlowExecution, name: str) -> Any:
    """Return an entry's stored value, parsed; None for one that is not there."""
    stored = flow_entries(flow).filter(name=name).values_list("value", flat=True).first()
    return None if stored is None else stored_node(name, stored)
