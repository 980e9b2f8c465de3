"""A rerun with corrected values passes the template's form; the history has the names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from django import forms
from django.contrib.admin.models import LogEntry
from django.core.management import CommandError
from django.test import Client

from ebbs_and_flows import InvalidParameters, flow_runner
from ebbs_and_flows.models import FlowExecution, FlowTransition

from .operators import LIST, billing, registered
from .test_admin_pages import entry, rerun
from .test_commands import run

pytestmark = pytest.mark.django_db


class Order(forms.Form):
    amount = forms.IntegerField(min_value=1, max_value=1000)
    limit = forms.IntegerField(required=False)
    title = forms.CharField(max_length=5)

    def clean(self) -> dict[str, Any]:
        cleaned = super().clean() or {}
        if cleaned.get("limit") and cleaned.get("amount", 0) > cleaned["limit"]:
            raise forms.ValidationError("The amount is over the limit.")
        return {**cleaned, "twice": 2 * cleaned.get("amount", 0)}


@pytest.fixture(autouse=True)
def template() -> Iterator[None]:
    with registered(billing(parameters=Order)):
        yield


@pytest.fixture
def flow() -> FlowExecution:
    context = {"amount": 5, "limit": 10, "title": "tea"}
    return flow_runner.run_flow_execution(flow_runner.schedule_flow("billing", context))


@pytest.mark.parametrize(
    ("name", "typed", "said"),
    [
        ("amount", "0", "greater than or equal to 1"),
        ("title", '"too long"', "at most 5 characters"),
    ],
)
def test_a_change_that_the_form_refuses_is_said_beside_it(
    admin_client: Client, flow: FlowExecution, name: str, typed: str, said: str
) -> None:
    field = f"value_{entry(flow, name)}"
    form = rerun(admin_client, flow, 1, **{field: typed}).context["form"]
    assert said in form.errors[field][0]
    assert form[field].value() == typed
    assert FlowExecution.objects.count() == 1


def test_what_the_form_says_of_several_fields_is_said_on_the_page(
    admin_client: Client, flow: FlowExecution
) -> None:
    field = f"value_{entry(flow, 'amount')}"
    form = rerun(admin_client, flow, 0, **{field: "11"}).context["form"]
    assert form.non_field_errors() == ["__all__: The amount is over the limit."]
    with pytest.raises(InvalidParameters):
        flow_runner.fork_flow_execution(flow, changes={"amount": 11})
    with pytest.raises(CommandError, match="over the limit"):
        run("rerunflow", str(flow.pk), "--from-task", "first", "--entry", "amount=11")
    assert FlowExecution.objects.count() == 1


def test_a_rerun_tells_who_changed_which_entries_and_never_to_what(
    admin_client: Client, flow: FlowExecution
) -> None:
    typed = {f"value_{entry(flow, 'amount')}": "7777"[:1], f"value_{entry(flow, 'title')}": '"s3"'}
    response = rerun(admin_client, flow, 1, **typed, other_name="new", other_value='"s3cret"')
    assert response.status_code == 302
    made = FlowExecution.objects.latest("pk")
    assert made.execution_context["amount"] == 7
    # What the form derives follows what it is derived from.
    assert made.execution_context["twice"] == 14
    assert made.execution_context["limit"] == 10
    assert made.execution_context["new"] == "s3cret"
    first = FlowTransition.objects.filter(flow_execution=made).earliest("pk")
    assert first.actor == "user admin"
    assert first.reason.startswith(f"Rerun of flow {flow.pk} from task 'charge'; changed: ")
    for name in ("amount", "title", "new"):
        assert name in first.reason
    assert "s3" not in first.reason
    said = list(LogEntry.objects.order_by("pk").values_list("change_message", flat=True))
    assert said == [
        f"Rerun from charge as #{made.pk}; changed: amount, title, new",
        f"Rerun of #{flow.pk} from charge; changed: amount, title, new",
    ]


def test_a_rerun_without_a_change_is_not_validated(
    admin_client: Client, flow: FlowExecution
) -> None:
    flow_runner._templates["billing"] = billing(parameters=type("Other", (Order,), {
        "more": forms.CharField()}))  # fmt: skip
    assert rerun(admin_client, flow, 0).status_code == 302
    first = FlowTransition.objects.latest("pk")
    assert first.flow_execution.transitions.earliest("pk").reason == (
        f"Rerun of flow {flow.pk} from task 'first'."
    )


def test_what_was_added_by_hand_is_named_in_the_history(admin_client: Client) -> None:
    flow_runner._templates["billing"] = billing()
    failed = flow_runner.run_flow_execution(flow_runner.schedule_flow("billing", {"bad": "no"}))
    admin_client.post(
        f"{LIST}{failed.pk}/by_hand/", {"reason": "Paid", "entries": '{"receipt": "s3cret"}'}
    )
    reasons = FlowTransition.objects.filter(flow_execution=failed).values_list("reason", flat=True)
    assert "Done by hand: Paid; added: receipt" in list(reasons)
