"""What changes more than a page of flows asks first, and changes as many as it said."""

from __future__ import annotations

import gc
import re
import tracemalloc
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.test import Client

from ebbs_and_flows import FlowStatus, flow_runner
from ebbs_and_flows.admin.flow_executions import FlowExecutionAdmin
from ebbs_and_flows.models import FlowExecution

from .operators import LIST, billing, registered, user_with
from .test_admin_hostile import Markup

pytestmark = pytest.mark.django_db

ACROSS = {"select_across": "1", "index": "0"}


@pytest.fixture(autouse=True)
def template(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(FlowExecutionAdmin, "list_per_page", 3)
    with registered(billing()):
        yield


def make(number: int, status: FlowStatus = FlowStatus.FAILED) -> list[int]:
    flows = flow_runner.schedule_flows("billing", [{}] * number)
    pks = [flow.pk for flow in flows]
    over = {"finished_at": flows[0].created_at, "ready_rank": None}
    rows = FlowExecution.objects.filter(pk__in=pks)
    rows.update(status=status, **(over if status != FlowStatus.SCHEDULED else {}))
    return pks


def count(status: FlowStatus) -> int:
    return FlowExecution.objects.filter(status=status).count()


class Form(HTMLParser):
    """The hidden fields of the page's own form, as a browser without JavaScript sends them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fields: list[tuple[str, str]] = []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        names = dict(attrs)
        if tag == "form":
            self._inside = "ebbs-form" in (names.get("class") or "")
        if self._inside and tag == "input":
            self.fields.append((names["name"], names.get("value") or ""))

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag != "form"

    @property
    def data(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name, value in self.fields:
            found.setdefault(name, []).append(value)
        return found


def choose(client: Client, action: str, pks: list[int], query: str = "", **more: str) -> Any:
    data = {"action": action, "_selected_action": pks, "index": "0", **more}
    return client.post(f"{LIST}{query}", data)


def said(response: Any) -> list[str]:
    return [str(message) for message in response.context["messages"]]


def test_one_page_is_changed_at_once(admin_client: Client) -> None:
    pks = make(3)
    assert choose(admin_client, "reschedule", pks).status_code == 302
    assert count(FlowStatus.RESCHEDULED) == 3
    # Selected across all pages, of which there is one.
    assert choose(admin_client, "cancel", pks[:1], **ACROSS).status_code == 302
    assert count(FlowStatus.CANCELLED) == 3


@pytest.mark.parametrize(
    ("action", "status"),
    [
        ("reschedule", FlowStatus.RESCHEDULED),
        ("rerun_now", FlowStatus.RESCHEDULED),
        ("cancel", FlowStatus.CANCELLED),
        ("rerun_from_start", FlowStatus.SCHEDULED),
    ],
)
def test_more_than_a_page_asks_first_and_does_what_it_said(
    action: str, status: FlowStatus, admin_client: Client
) -> None:
    pks = make(7)
    before = count(status)
    response = choose(admin_client, action, pks[:1], **ACROSS)
    assert response.status_code == 200
    assert count(status) == before
    text = response.content.decode()
    assert "7 flows will be changed." in text
    assert Markup(text).found == []
    done = admin_client.post(LIST, Form(text).data, follow=True)
    assert count(status) == before + 7
    assert len(said(done)) == 1
    assert re.match("7 ", said(done)[0])


def test_what_the_action_leaves_as_it_is_is_not_counted(admin_client: Client) -> None:
    make(5)
    make(2, FlowStatus.SUCCEEDED)
    response = choose(admin_client, "reschedule", [1], **ACROSS)
    text = response.content.decode()
    assert "5 flows will be changed." in text
    assert "2 are skipped" in text
    done = admin_client.post(LIST, Form(text).data, follow=True)
    assert said(done) == ["5 flows rescheduled.", "2 left alone: they have not failed."]


def test_the_lists_filters_hold(admin_client: Client) -> None:
    make(5)
    make(5, FlowStatus.SUCCEEDED)
    query = "?status=FAILED"
    response = choose(admin_client, "rerun_from_start", [1], query, **ACROSS)
    text = response.content.decode()
    assert "5 flows will be changed." in text
    admin_client.post(f"{LIST}{query}", Form(text).data)
    assert count(FlowStatus.SCHEDULED) == 5


def test_flows_that_came_after_the_question_are_left_out(admin_client: Client) -> None:
    make(5)
    text = choose(admin_client, "reschedule", [1], **ACROSS).content.decode()
    make(4)
    done = admin_client.post(LIST, Form(text).data, follow=True)
    assert said(done) == ["5 flows rescheduled."]
    assert count(FlowStatus.FAILED) == 4


def test_another_number_than_the_one_that_was_said_asks_again(admin_client: Client) -> None:
    pks = make(6)
    text = choose(admin_client, "reschedule", [1], **ACROSS).content.decode()
    flow_runner.reschedule_flow_execution(pks[0])
    response = admin_client.post(LIST, Form(text).data)
    assert response.status_code == 200
    text = response.content.decode()
    assert "5 flows will be changed." in text
    assert "have changed since" in text
    assert count(FlowStatus.RESCHEDULED) == 1
    done = admin_client.post(LIST, Form(text).data, follow=True)
    assert said(done)[0] == "5 flows rescheduled."


@pytest.mark.parametrize(
    "forged",
    [
        {"confirmed": "7"},
        {"confirmed": "", "up_to": ""},
        {"confirmed": "9" * 5000, "up_to": "9" * 5000},
        {"confirmed": "5\x00", "up_to": "-1"},
        {"confirmed": "\u0665", "up_to": "1e9"},
    ],
)
def test_a_made_up_answer_asks_again(forged: dict[str, str], admin_client: Client) -> None:
    make(5)
    response = choose(admin_client, "reschedule", [1], **{**ACROSS, **forged})
    assert response.status_code == 200
    assert "5 flows will be changed." in response.content.decode()
    assert count(FlowStatus.FAILED) == 5


def test_ids_by_hand_are_no_way_around_the_question(admin_client: Client) -> None:
    pks = make(5)
    response = choose(admin_client, "cancel", pks)
    assert "5 flows will be changed." in response.content.decode()
    admin_client.post(LIST, Form(response.content.decode()).data)
    assert count(FlowStatus.CANCELLED) == 5


@pytest.mark.parametrize("action", ["reschedule", "rerun_now", "cancel", "rerun_from_start"])
def test_the_answer_needs_a_token_and_the_permission(admin_user: User, action: str) -> None:
    make(5)
    client = Client(enforce_csrf_checks=True)
    client.force_login(admin_user)
    token = client.get(LIST).context["csrf_token"]
    response = choose(client, action, [1], **ACROSS, csrfmiddlewaretoken=str(token))
    data = Form(response.content.decode()).data
    without = {name: value for name, value in data.items() if name != "csrfmiddlewaretoken"}
    assert client.post(LIST, without).status_code == 403
    assert user_with("view_flowexecution").post(LIST, data).status_code == 403
    assert (count(FlowStatus.FAILED), FlowExecution.objects.count()) == (5, 5)
    assert client.post(LIST, data).status_code == 302
    assert (count(FlowStatus.FAILED), FlowExecution.objects.count()) != (5, 5)


def peak(act: Callable[[], Any]) -> int:
    """Return how many bytes something takes at most, of those that it has asked for."""
    gc.collect()
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_number_of_flows(
    admin_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ebbs_and_flows.admin.actions._BATCH", 25)

    def change(number: int) -> int:
        make(number)
        text = choose(admin_client, "reschedule", [1], **ACROSS).content.decode()
        assert f"{number} flows will be changed." in text
        data = Form(text).data
        return peak(lambda: admin_client.post(LIST, data))

    # The first one fills caches; each is of more flows than a batch.
    change(30)
    few, many = change(50), change(300)
    assert count(FlowStatus.RESCHEDULED) == 380
    held = peak(lambda: list(FlowExecution.objects.all())) / 380
    # What waits for the commit of the test's own transaction grows; a flow that is held is more.
    assert (many - few) / 250 < held / 3, (few, many, held)
