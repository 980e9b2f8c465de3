"""Hostile text costs each page and each form work that grows with its length and no faster.

64 KiB are enough to tell; `EBBS_TEST_HOSTILE_BYTES=1048576` takes minutes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django import forms
from django.test import Client, override_settings

from ebbs_and_flows import ExecutionContext, FlowTemplate, flow_runner, task
from ebbs_and_flows.admin.flow_executions import FlowExecutionAdmin
from ebbs_and_flows.models import (
    ExecutionContextEntry,
    FlowExecution,
    FlowTransition,
    TaskExecution,
)
from ebbs_and_flows.validation import MESSAGE_LENGTH, storable_text

from .databases import FLOWS, atomic
from .hostile_texts import TEXTS, calls
from .operators import LIST, TEMPLATES, addresses, registered

pytestmark = [pytest.mark.django_db, pytest.mark.one_database]

LONGER = 16
LARGE = int(os.environ.get("EBBS_TEST_HOSTILE_BYTES", str(64 * 1024)))
SMALL, TINY = LARGE // LONGER, 50
ON_A_PAGE = 7
# What makes loops in Python long; those in C are in `test_hostile_texts.py`.
KINDS = {
    kind: TEXTS[kind]
    for kind in (
        *("newlines", "round brackets", "double quotes", "pairs", "URLs", "digits", "backslashes"),
        *("tags", "marks", "tracebacks", "nested lists", "many names", "one name many times"),
        "many numbers",
    )
}


class Parameters(forms.Form):
    """A field of each kind whose cleaning looks at the text."""

    number = forms.IntegerField(required=False)
    share = forms.FloatField(required=False)
    amount = forms.DecimalField(required=False)
    moment = forms.DateTimeField(required=False)
    span = forms.DurationField(required=False)
    text = forms.CharField(required=False)
    anything = forms.JSONField(required=False)
    quoted = forms.CharField(required=False)

    def clean_quoted(self) -> str:
        raise forms.ValidationError(f"No: {self.cleaned_data['quoted'][:-1]}")


@task(name="fails")
def fails(context: ExecutionContext) -> ExecutionContext:
    raise ValueError("no")


@pytest.fixture(autouse=True)
def template(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(FlowExecutionAdmin, "list_per_page", 1)
    plain = FlowTemplate("plain", tasks=[fails])
    asks = FlowTemplate("asks", tasks=[fails], parameters=Parameters)
    # Django's own limit on a request is no part of this.
    with registered(plain, asks), override_settings(DATA_UPLOAD_MAX_MEMORY_SIZE=None):
        yield


def flow_full_of(texts: list[str]) -> FlowExecution:
    """Return a failed flow with the texts in every column that a task or a caller fills."""
    made = flow_runner.run_flow_execution(flow_runner.schedule_flow("plain", {"n": 1}))
    attempt = TaskExecution.objects.get(flow_execution=made)
    records: list[Any] = []
    for number, text in enumerate(map(storable_text, texts), start=1):
        record = {"at": "2026-01-01T00:00:00+00:00", "level": text, "logger": text}
        columns: dict[str, Any] = {
            "output": f"{text}\n\n{text}",
            "traceback": text,
            "log": json.dumps({**record, "message": text}),
            "error_message": text[:MESSAGE_LENGTH],
            "error_type": text[:200],
        }
        TaskExecution.objects.create(
            flow_execution=made,
            task_index=0,
            task_name="fails",
            attempt=number + 1,
            claim=1,
            status="FAILED",
            started_at=attempt.started_at,
            finished_at=attempt.finished_at,
            **columns,
        )
        value = json.dumps({text: {"name": text, "value": [text, 1]}})
        records.append((f"entry {number}", value))
        FlowTransition.objects.create(
            flow_execution=made,
            from_status="FAILED",
            to_status="RESCHEDULED",
            at=made.created_at,
            reason=text,
        )
    for name, value in records:
        ExecutionContextEntry.objects.create(flow_execution=made, name=name, value=value)
    report = {"task_execution": attempt.pk, "done": 1, "total": 2, "message": texts[0]}
    FlowExecution.objects.filter(pk=made.pk).update(task_progress=json.dumps(report))
    return flow_runner.service.get_flow_execution(made)


def check_growth(name: str, act: Callable[[int], Any]) -> None:
    """Fail where sixteen times the text take more than about sixteen times the work."""
    none, few, many = (calls(lambda size=size: act(size)) for size in (TINY, SMALL, LARGE))
    # Twice, for what is sorted and what is cached: quadratic work is sixteen times as much.
    assert many - none < 2 * LONGER * max(few - none, none / 10), (name, none, few, many)


@pytest.mark.parametrize("start", range(0, len(KINDS), ON_A_PAGE))
def test_a_page_with_hostile_texts(start: int, admin_client: Client) -> None:
    admin_client.get(LIST)
    makers = list(KINDS.values())[start : start + ON_A_PAGE]
    flows = {size: flow_full_of([make(size) for make in makers]) for size in (TINY, SMALL, LARGE)}
    others: dict[int, list[str]] = {
        size: [
            *addresses(flow),
            LIST,
            f"{LIST}live/?id={flow.pk}",
            f"{TEMPLATES}plain/schedule/?like={flow.pk}",
            f"/admin/ebbs_and_flows/taskexecution/?flow_execution__id__exact={flow.pk}",
            *(
                f"/admin/ebbs_and_flows/{model._meta.model_name}/{pk}/change/"
                for model in (TaskExecution, ExecutionContextEntry)
                for pk in model.objects.filter(flow_execution=flow)  # type: ignore[attr-defined]
                .order_by("pk")
                .values_list("pk", flat=True)
            ),
        ]
        for size, flow in flows.items()
    }
    for number, address in enumerate(others[LARGE]):
        check_growth(address, lambda size, n=number: admin_client.get(others[size][n]))


ADDRESSES = {
    "list": LIST,
    "rerun": LIST + "{pk}/rerun_from/",
    "by hand": LIST + "{pk}/by_hand/",
    "schedule": TEMPLATES + "plain/schedule/?like={pk}",
    "schedule with parameters": TEMPLATES + "asks/schedule/",
}


def fields_of(form: str, flow: FlowExecution) -> list[str]:
    entries = ExecutionContextEntry.objects.filter(flow_execution=flow)
    return {
        "list": ["action", "_selected_action", "confirmed", "up_to", "select_across"],
        "rerun": ["task", "other_name", "other_value", *(f"value_{e.pk}" for e in entries)],
        "by hand": ["reason", "entries"],
        "schedule": ["context", "run_at", "key", "priority"],
        "schedule with parameters": [
            "run_at",
            *(f"parameters-{name}" for name in Parameters.base_fields),
        ],
    }[form]


@pytest.mark.parametrize("form", ADDRESSES)
def test_a_form_that_is_sent_hostile_texts(form: str, admin_client: Client) -> None:
    context = {"n": 1, "text": "a", "set": {1}, "pairs": {1: 2}, "bytes": b"a"}
    flow = flow_runner.run_flow_execution(flow_runner.schedule_flow("plain", context))
    address = ADDRESSES[form].format(pk=flow.pk)
    names = fields_of(form, flow)
    admin_client.get(address)

    for kind, make in KINDS.items():

        def act(size: int, make: Callable[[int], str] = make) -> None:
            text = storable_text(make(size))
            # A JSON object is what the fields for several entries ask for.
            given = {name: text for name in names if name not in {"entries", "context"}}
            given |= {"entries": f'{{"a": {json.dumps(text)}}}', "context": text}
            with atomic():
                response = admin_client.post(address, given)
                assert response.status_code < 500
                FlowExecution.objects.using(FLOWS).exclude(pk=flow.pk).delete()

        check_growth(kind, act)


def test_an_address_with_hostile_parameters(admin_client: Client) -> None:
    flow = flow_runner.run_flow_execution(flow_runner.schedule_flow("plain", {"n": 1}))
    live = f"{LIST}live/"
    addresses = [LIST, live, *(a.format(pk=flow.pk).partition("?")[0] for a in ADDRESSES.values())]
    for address in addresses:
        admin_client.get(address)
    for kind, make in KINDS.items():

        def act(size: int, make: Callable[[int], str] = make) -> None:
            # No server takes longer addresses than these.
            text = storable_text(make(size // 64))
            for address in addresses:
                query = dict.fromkeys(("q", "status", "template", "id", "task", "like"), text)
                assert admin_client.get(address, query).status_code < 500

        check_growth(kind, act)
