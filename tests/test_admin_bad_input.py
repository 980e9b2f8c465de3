"""Bad input is refused in a sentence, and nothing else is done instead."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from django import forms
from django.contrib.admin import site
from django.contrib.admin.models import DELETION, LogEntry
from django.contrib.auth.models import User
from django.http import HttpRequest
from django.test import Client

from ebbs_and_flows import flow_runner
from ebbs_and_flows.exceptions import InvalidParameters
from ebbs_and_flows.models import FlowExecution

from .operators import LIST, TEMPLATES, billing, failed, registered, request_of

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def template() -> Iterator[None]:
    with registered(billing()):
        yield


@pytest.mark.parametrize("task", ["2", "99", "-1", "x", "9" * 5000, "1\x00", "\u0661"])
def test_a_rerun_from_a_task_out_of_range_is_refused(task: str, admin_client: Client) -> None:
    flow = failed()
    response = admin_client.post(f"{LIST}{flow.pk}/rerun_from/", {"task": task})
    assert response.status_code == 200
    assert "Choose one of the tasks" in response.content.decode()
    assert FlowExecution.objects.count() == 1


def test_a_flow_that_was_rescheduled_after_the_look_at_it_is_not_deleted(admin_user: User) -> None:
    flow = failed()
    flow_runner.reschedule_flow_execution(flow.pk)
    site.get_model_admin(FlowExecution).delete_model(request_of(admin_user), flow)
    assert FlowExecution.objects.filter(pk=flow.pk).exists()


DEEP = 200_000
"""Levels that no version of Python reads."""


class Anything(forms.Form):
    anything = forms.JSONField(required=False)


@pytest.mark.parametrize(
    "text", ["[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP, "9" * 5000]
)
def test_a_parameter_that_django_cannot_read_is_refused(text: str, admin_client: Client) -> None:
    with registered(type(billing())("asks", tasks=billing().tasks, parameters=Anything)):
        response = admin_client.post(
            f"{TEMPLATES}asks/schedule/", {"priority": "0", "parameters-anything": text}
        )
        assert response.status_code == 400
        assert b"nested too deeply, or a number" in response.content
        with pytest.raises(InvalidParameters, match="nested too deeply"):
            flow_runner.schedule_flow("asks", {"anything": text})
        flow = flow_runner.schedule_flow("asks", {"anything": 1})
        response = admin_client.post(
            f"{LIST}{flow.pk}/rerun_from/",
            {"task": "0", "other_name": "anything", "other_value": json.dumps(text)},
        )
        assert response.status_code == 200
    assert FlowExecution.objects.count() == 1


def delete_after(client: Client, pks: list[int], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Confirm a deletion; before it takes its lock, the first flow is rescheduled."""
    model_admin: Any = site.get_model_admin(FlowExecution)
    delete = model_admin._delete

    def later(request: HttpRequest, asked: list[int]) -> int:
        if pks[0] in asked:
            flow_runner.reschedule_flow_execution(pks[0])
        done: int = delete(request, asked)
        return done

    monkeypatch.setattr(model_admin, "_delete", later)
    data = {"action": "delete_selected", "_selected_action": pks, "post": "yes"}
    response = client.post(LIST, data, follow=True)
    return [str(message) for message in response.context["messages"]]


def test_an_operator_is_told_how_many_flows_were_kept_and_why(
    admin_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    pks = [failed().pk for _number in range(3)]
    said = delete_after(admin_client, pks, monkeypatch)
    assert said == ["2 flows deleted.", "1 flow was kept: it is not over any more."]
    assert list(FlowExecution.objects.values_list("pk", flat=True)) == pks[:1]
    # Only what was deleted is logged as deleted.
    logged = LogEntry.objects.filter(action_flag=DELETION).values_list("object_id", flat=True)
    assert sorted(logged) == sorted(map(str, pks[1:]))


@pytest.mark.parametrize("is_late", [False, True])
def test_a_flow_s_own_page_says_that_it_was_kept(
    is_late: bool, admin_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = failed()
    model_admin: Any = site.get_model_admin(FlowExecution)
    delete = model_admin._delete

    def later(request: HttpRequest, pks: list[int]) -> int:
        flow_runner.reschedule_flow_execution(flow.pk)
        done: int = delete(request, pks)
        return done

    if is_late:
        monkeypatch.setattr(model_admin, "_delete", later)
    else:
        flow_runner.reschedule_flow_execution(flow.pk)
    response = admin_client.post(f"{LIST}{flow.pk}/delete/", {"post": "yes"}, follow=True)
    said = [str(message) for message in response.context["messages"]]
    assert said == ["1 flow was kept: it is not over any more."]
    assert not LogEntry.objects.filter(action_flag=DELETION).exists()


def test_a_flow_that_was_deleted_after_the_look_at_it_is_no_error(admin_user: User) -> None:
    flow = failed()
    FlowExecution.objects.all().delete()
    site.get_model_admin(FlowExecution).delete_model(request_of(admin_user), flow)
    assert not FlowExecution.objects.exists()
