"""Who looked at which flow's values is reported once a view of a page, and holds no value."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.test import Client

from ebbs_and_flows import flow_runner
from ebbs_and_flows.models import ExecutionContextEntry, FlowExecution
from ebbs_and_flows.signals import values_viewed

from .operators import LIST, TEMPLATES, addresses, billing, failed, registered, user_with
from .test_commands import run

pytestmark = pytest.mark.django_db

SECRET = "a-value-of-jane"
ENTRIES = "/admin/ebbs_and_flows/executioncontextentry/"


@pytest.fixture(autouse=True)
def template(settings: Any) -> Iterator[None]:
    settings.EBBS_AND_FLOWS = {**settings.EBBS_AND_FLOWS, "ACCESS_LOG": True}
    with registered(billing()):
        yield


@pytest.fixture
def views() -> Iterator[list[tuple[int, str, str]]]:
    """What the signal has reported: flow, user and page."""
    found: list[tuple[int, str, str]] = []

    def note(sender: Any, *, flow_id: int, actor: str, page: str, signal: Any) -> None:
        assert sender is FlowExecution
        found.append((flow_id, actor, page))

    values_viewed.connect(note)
    yield found
    values_viewed.disconnect(note)


def pages(flow: FlowExecution) -> dict[str, str]:
    """Return the addresses that show values of a flow, by what they are called in the log."""
    entry = ExecutionContextEntry.objects.get(flow_execution=flow, name="bad")
    return {
        "flow page": f"{LIST}{flow.pk}/change/",
        "rerun form": f"{LIST}{flow.pk}/rerun_from/?task=0",
        "done by hand": f"{LIST}{flow.pk}/by_hand/",
        "entry": f"{ENTRIES}{entry.pk}/change/",
        "schedule form": f"{TEMPLATES}billing/schedule/?like={flow.pk}",
    }


def test_each_page_that_shows_values_is_reported_once(
    admin_client: Client, views: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    flow = failed(SECRET)
    with caplog.at_level(logging.INFO, "ebbs_and_flows.access"):
        for name, address in pages(flow).items():
            assert SECRET in admin_client.get(address).content.decode(), name
    assert views == [(flow.pk, "user admin", name) for name in pages(flow)]
    records = [record for record in caplog.records if record.name == "ebbs_and_flows.access"]
    assert [record.getMessage() for record in records] == [
        f"user admin viewed values of flow {flow.pk} ({name})." for name in pages(flow)
    ]
    assert [(vars(record)["flow"], vars(record)["page"]) for record in records] == [
        (flow.pk, name) for name in pages(flow)
    ]
    assert SECRET not in "".join(repr(vars(record)) for record in records)


def test_a_form_that_comes_back_with_its_errors_shows_them_again(
    admin_client: Client, views: list[Any]
) -> None:
    flow = failed(SECRET)
    admin_client.post(f"{LIST}{flow.pk}/rerun_from/", {"task": "0", "other_name": "x"})
    assert views == [(flow.pk, "user admin", "rerun form")]


def test_the_refresh_of_a_page_is_the_same_view(admin_client: Client, views: list[Any]) -> None:
    flow = failed(SECRET)
    flow_runner.reschedule_flow_execution(flow)
    address = f"{LIST}{flow.pk}/change/"
    asked = admin_client.get(address).context["refresh_url"]
    assert len(views) == 1
    for _ in range(3):
        response = admin_client.get(asked)
        assert SECRET in response.content.decode()
        asked = response.context["refresh_url"]
    assert len(views) == 1
    # Neither another flow's, another user's, nor one that was made up.
    other = failed(SECRET)
    (query,) = asked.split("?")[1:]
    admin_client.get(f"{LIST}{other.pk}/change/?{query}")
    admin_client.get(f"{address}?viewed=1")
    assert len(views) == 3
    colleague = Client()
    colleague.force_login(User.objects.create_superuser("bob"))
    colleague.get(asked)
    assert views[-1] == (flow.pk, "user bob", "flow page")


def test_pages_without_values_and_users_without_the_right_are_not_reported(
    admin_client: Client, views: list[Any]
) -> None:
    flow = failed(SECRET)
    shown = {address.partition("?")[0] for address in pages(flow).values()}
    for address in addresses(flow):
        if address not in shown:
            admin_client.get(address)
    admin_client.get(f"{TEMPLATES}billing/schedule/")
    User.objects.all().delete()
    viewer = user_with("view_flowexecution", "rerun_flowexecution", "schedule_flow")
    for address in pages(flow).values():
        viewer.get(address)
    assert views == []


def test_it_is_off_unless_it_is_set(
    admin_client: Client, views: list[Any], settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    settings.EBBS_AND_FLOWS = {}
    flow = failed(SECRET)
    with caplog.at_level(logging.INFO, "ebbs_and_flows.access"):
        for address in pages(flow).values():
            admin_client.get(address)
    assert views == []
    assert not [record for record in caplog.records if record.name == "ebbs_and_flows.access"]


def test_a_command_that_shows_values_is_reported(views: list[Any]) -> None:
    flow = failed(SECRET)
    run("showflows", str(flow.pk))
    assert views == []
    run("showflows", str(flow.pk), "--values")
    ((seen, actor, page),) = views
    assert (seen, page) == (flow.pk, "showflows --values")
    assert actor.startswith("command showflows by ")


def test_a_receiver_that_raises_breaks_no_page(
    admin_client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    def break_it(**_: Any) -> None:
        raise RuntimeError

    values_viewed.connect(break_it)
    try:
        flow = failed(SECRET)
        assert admin_client.get(f"{LIST}{flow.pk}/change/").status_code == 200
    finally:
        values_viewed.disconnect(break_it)
    assert "raised" in caplog.text


@pytest.mark.parametrize("value", [1, "yes", None])
def test_the_setting_is_true_or_false(value: Any, settings: Any) -> None:
    settings.EBBS_AND_FLOWS = {"ACCESS_LOG": value}
    with pytest.raises(ValueError, match="give it True or False"):
        flow_runner.prune_kept()
