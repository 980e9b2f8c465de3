"""Flows that are about to be stored: many at once, and what `parameters` let through."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django import forms
from django.core.management import CommandError, call_command
from django.db import connections
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from django_q.models import OrmQ

from ebbs_and_flows import (
    EbbsAndFlowsError,
    ExecutionContext,
    FlowRunner,
    FlowStatus,
    FlowTemplate,
    InvalidParameters,
    flow_runner,
    task,
)
from ebbs_and_flows.models import ExecutionContextEntry, FlowExecution, FlowTransition
from tests.shop.models import Order

from .databases import atomic, connection

pytestmark = pytest.mark.django_db


@task
def keep(context: ExecutionContext) -> ExecutionContext:
    return context


class Invoice(forms.Form):
    order = forms.ModelChoiceField(Order.objects.all())
    copies = forms.IntegerField(min_value=1, max_value=9)
    day = forms.DateField(required=False)
    also = forms.ModelMultipleChoiceField(Order.objects.all(), required=False)

    def clean(self) -> dict[str, Any] | None:
        if self.cleaned_data.get("copies") == 7:
            raise forms.ValidationError("Seven brings bad luck.")
        return self.cleaned_data


class Appointment(forms.Form):
    at = forms.SplitDateTimeField()


@pytest.fixture
def bulk(runner: FlowRunner) -> FlowRunner:
    runner.register_flow_template(FlowTemplate("bulk", tasks=[keep]))
    runner.register_flow_template(FlowTemplate("invoice", tasks=[keep], parameters=Invoice))
    return runner


# Many at once


def test_many_flows_are_like_as_many_scheduled_singly(bulk: FlowRunner) -> None:
    contexts = [{"number": 0}, None, ExecutionContext({"number": 2})]
    flows = bulk.schedule_flows("bulk", contexts, priority=3, actor="ada")
    one = bulk.schedule_flow("bulk", {"number": 3}, priority=3, actor="ada")
    assert [dict(flow.execution_context) for flow in flows] == [{"number": 0}, {}, {"number": 2}]
    for flow in flows:
        stored = FlowExecution.objects.filter(pk=flow.pk).values().get()
        like = FlowExecution.objects.filter(pk=one.pk).values().get()
        for own in ("id", "token", "created_at", "run_at"):
            del stored[own], like[own]
        assert stored == like
        rows = FlowTransition.objects.filter(flow_execution=flow).order_by("pk")
        said = [(row.from_status, row.to_status, row.actor) for row in rows]
        assert said == [("", "CREATED", "ada"), ("CREATED", "SCHEDULED", "ada")]
    assert len({flow.token for flow in (*flows, one)}) == 4
    ran = [bulk.run_flow() for _ in range(4)]
    assert [flow.pk for flow in ran if flow] == [*(flow.pk for flow in flows), one.pk]
    assert bulk.schedule_flows("bulk", []) == []


def test_a_key_that_is_there_already_or_comes_twice_makes_one_flow(bulk: FlowRunner) -> None:
    first = bulk.schedule_flow("bulk", {"n": 1}, key="a")
    contexts = [{"n": 2}, {"n": 3}, {"n": 4}, {"n": 5}, {"n": 6}]
    flows = bulk.schedule_flows("bulk", contexts, keys=["a", "b", "b", None, None])
    assert flows[0].pk == first.pk
    assert flows[1].pk == flows[2].pk
    assert len({flow.pk for flow in flows}) == 4
    assert [flow.execution_context["n"] for flow in flows] == [1, 3, 3, 5, 6]
    again = bulk.schedule_flows("bulk", contexts[:3], keys=["a", "b", "b"])
    assert [flow.pk for flow in again] == [flow.pk for flow in flows[:3]]
    assert FlowExecution.objects.count() == 4


def test_new_flows_wake_a_worker_although_an_earlier_one_comes_first(bulk: FlowRunner) -> None:
    bulk.schedule_flow("bulk", key="later", run_at=timezone.now() + timedelta(days=1))
    assert not OrmQ.objects.exists()
    bulk.schedule_flows("bulk", [{}, {}], keys=["later", "now"])
    assert OrmQ.objects.count() == 1
    bulk.schedule_flows("bulk", [{}] * 100)
    assert OrmQ.objects.count() < 20


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"contexts": 5}, "contexts are 5"),
        ({"contexts": None}, "contexts are None"),
        ({"contexts": {"n": 1}}, "give a list"),
        ({"contexts": "ab"}, "'ab'"),
        ({"contexts": [{"n": 1}, 7]}, "mapping"),
        ({"contexts": [{"n": 1}, {"n": object()}]}, "'n'"),
        ({"contexts": [{}, {}], "keys": ["a"]}, "2 contexts and 1 keys"),
        ({"contexts": [{}, {}], "keys": "ab"}, "keys are 'ab'"),
        ({"contexts": [{}, {}], "keys": 5}, "keys are 5"),
        ({"contexts": [{}, {}], "keys": ["a", 3]}, "key is 3"),
        ({"contexts": [{}, {}], "keys": ["a", []]}, "key is"),
        ({"contexts": [{}], "priority": 101}, "101"),
        ({"contexts": [{}], "run_at": "noon"}, "'noon'"),
        ({"contexts": [{}], "name": "unknown"}, "'unknown'"),
    ],
)
def test_one_bad_argument_stores_none_of_many(
    bulk: FlowRunner, arguments: dict[str, Any], says: str
) -> None:
    with pytest.raises(EbbsAndFlowsError, match=says) as caught:
        bulk.schedule_flows(arguments.pop("name", "bulk"), **arguments)
    assert "\n" not in str(caught.value)
    for model in (FlowExecution, FlowTransition, ExecutionContextEntry, OrmQ):
        assert not model.objects.exists()


def test_many_flows_vanish_with_the_callers_transaction(bulk: FlowRunner) -> None:
    with pytest.raises(ZeroDivisionError), atomic():
        bulk.schedule_flows("bulk", [{"n": 1}, {"n": 2}], keys=["a", "b"])
        raise ZeroDivisionError
    for model in (FlowExecution, FlowTransition, ExecutionContextEntry, OrmQ):
        assert not model.objects.exists()


def test_ten_times_as_many_flows_take_hardly_more_statements(bulk: FlowRunner) -> None:
    def count(number: int) -> int:
        contexts = [{"n": n, "text": "x"} for n in range(number)]
        with CaptureQueriesContext(connection) as captured:
            bulk.schedule_flows("bulk", contexts, keys=[f"{number}-{n}" for n in range(number)])
        return len(captured)

    few, many = count(40), count(400)
    # SQLite takes a thousand parameters a statement.
    assert many <= few + (20 if connection.vendor == "sqlite" else 8)


@pytest.mark.django_db(transaction=True)
def test_the_same_keys_at_the_same_instant_make_one_flow_each(bulk: FlowRunner) -> None:
    keys = [f"k{n}" for n in range(20)]
    barrier, made, errors = threading.Barrier(4), [], []

    def schedule(turn: int) -> None:
        own = keys if turn % 2 else keys[::-1]
        try:
            barrier.wait(10)
            flows = bulk.schedule_flows("bulk", [{"n": 1}] * len(own), keys=own)
            made.append({flow.key: flow.pk for flow in flows})
        except Exception as error:  # noqa: BLE001 - shown by the assertion
            errors.append(error)
        finally:
            connections.close_all()

    threads = [threading.Thread(target=schedule, args=(turn,)) for turn in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert all(found == made[0] for found in made)
    assert FlowExecution.objects.count() == ExecutionContextEntry.objects.count() == len(keys)


# Parameters


def test_the_cleaned_parameters_are_the_first_context(bulk: FlowRunner) -> None:
    order = Order.objects.create(number="42")
    given = {"order": str(order.pk), "copies": "2", "day": "2026-02-03", "also": [order.pk]}
    flow = bulk.schedule_flow("invoice", given)
    context = flow.execution_context
    assert (context["order"], context["copies"]) == (order, 2)
    assert context["day"].isoformat() == "2026-02-03"
    assert context["also"] == [order]
    (other,) = bulk.schedule_flows("invoice", [{"order": order.pk, "copies": 1}])
    assert other.execution_context["day"] is None


@pytest.mark.parametrize(
    ("given", "fields"),
    [
        (None, {"order", "copies"}),
        ({"order": 999_999, "copies": 10}, {"order", "copies"}),
        ({"order": "FIRST", "copies": "x"}, {"copies"}),
        ({"order": "FIRST", "copies": 7}, {"__all__"}),
        ({"order": "FIRST", "copies": 1, "colour": "red"}, {"colour"}),
    ],
)
def test_bad_parameters_are_told_by_field_and_store_nothing(
    bulk: FlowRunner, given: dict[str, Any] | None, fields: set[str]
) -> None:
    order = Order.objects.create(number="42")
    if given and given["order"] == "FIRST":
        given = {**given, "order": order.pk}
    for call in (
        lambda: bulk.schedule_flow("invoice", given),
        lambda: bulk.schedule_flows("invoice", [{"order": order.pk, "copies": 1}, given]),
    ):
        with pytest.raises(InvalidParameters, match="'invoice' cannot be scheduled so") as caught:
            call()
        assert set(caught.value.errors) == fields
        assert all(name in str(caught.value) for name in fields)
        assert "\n" not in str(caught.value)
    assert not FlowExecution.objects.exists()


@pytest.mark.parametrize("given", [5, 0, "abc", [1], {3: 4}])
def test_parameters_are_named(bulk: FlowRunner, given: Any) -> None:
    with pytest.raises(EbbsAndFlowsError) as caught:
        bulk.schedule_flow("invoice", given)
    assert "\n" not in str(caught.value)


def test_the_command_refuses_bad_parameters_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    template = FlowTemplate("invoice", tasks=[keep], parameters=Invoice)
    monkeypatch.setitem(flow_runner._templates, "invoice", template)
    with pytest.raises(CommandError, match="copies: Enter a whole number") as caught:
        call_command("scheduleflow", "invoice", "--entry", "copies=many", "--entry", "order=1")
    assert "order: " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not FlowExecution.objects.exists()
    order = Order.objects.create(number="42")
    call_command("scheduleflow", "invoice", "--entry", "copies=2", "--entry", f"order={order.pk}")
    assert FlowExecution.objects.get().status == FlowStatus.SCHEDULED


def test_a_value_of_several_widgets_is_given_as_one(bulk: FlowRunner) -> None:
    at = datetime(2026, 3, 4, 5, 6, tzinfo=UTC)
    bulk.register_flow_template(FlowTemplate("appointment", tasks=[keep], parameters=Appointment))
    flow = bulk.schedule_flow("appointment", {"at": at})
    assert flow.execution_context["at"] == at
    with pytest.raises(InvalidParameters, match="at: Enter a list of values|at: This field"):
        bulk.schedule_flow("appointment", {})
