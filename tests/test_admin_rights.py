"""Who may see and do what in the admin; every address of the app is walked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import User
from django.db import transaction
from django.test import Client

from ebbs_and_flows.flows import RIGHTS
from ebbs_and_flows.models import (
    ExecutionContextEntry,
    FlowExecution,
    FlowTemplateState,
    FlowTransition,
    TaskExecution,
)

from .databases import FLOWS, atomic
from .operators import (
    LIST,
    TEMPLATES,
    addresses,
    billing,
    failed,
    page,
    registered,
    succeeded,
    user_with,
)

pytestmark = pytest.mark.django_db

SECRET = "visible-value"
TABLES = (
    FlowExecution,
    TaskExecution,
    ExecutionContextEntry,
    FlowTransition,
    FlowTemplateState,
    LogEntry,
)
# What a hand-made POST could try anywhere.
ATTEMPT = {
    "post": "yes",
    "task": "0",
    "reason": "because",
    "entries": '{"injected": 1}',
    "context": '{"injected": 1}',
    "other_name": "injected",
    "other_value": "1",
    "priority": "0",
}


@pytest.fixture(autouse=True)
def template() -> Iterator[None]:
    with registered(billing()):
        yield


def rows() -> list[Any]:
    return [list(table.objects.order_by("pk").values()) for table in TABLES]


def test_the_walk_has_every_page() -> None:
    found = addresses(failed())
    for ending in (
        "live/",
        "reschedule/",
        "rerun_now/",
        "rerun_from_start/",
        "rerun_from/",
        "by_hand/",
        "cancel/",
        "delete/",
        "billing/schedule/",
        "billing/pause/",
        "billing/resume/",
        "flowtemplatestate/",
        "taskexecution/",
        "executioncontextentry/",
    ):
        assert any(address.endswith(ending) for address in found), ending


def test_a_stranger_sees_and_changes_nothing() -> None:
    flow = failed(SECRET)
    before = rows()
    for who, client in {"anonymous": Client(), "no rights": user_with()}.items():
        for address in addresses(flow):
            for response in (client.get(address), client.post(address, ATTEMPT)):
                assert response.status_code in {302, 403, 405}, (who, address)
                assert SECRET not in response.content.decode(), (who, address)
    assert rows() == before


def test_who_may_only_look_changes_nothing_and_sees_no_value() -> None:
    flow = failed("an error that is no secret")
    ExecutionContextEntry.objects.filter(name="bad").update(value=f'"{SECRET}"')
    before = rows()
    viewer = user_with("view_flowexecution")
    seen = []
    for address in addresses(flow):
        response = viewer.get(address)
        assert response.status_code in {200, 302, 403, 405}, address
        seen += [address] if response.status_code == 200 else []
        assert SECRET not in response.content.decode(), address
        posted = viewer.post(address, ATTEMPT)
        assert posted.status_code in {200, 302, 403, 405}, address
        assert SECRET not in posted.content.decode(), address
    assert rows() == before
    assert f"{LIST}{flow.pk}/change/" in seen
    assert TEMPLATES in seen
    assert not any(address.endswith(("rerun_from/", "by_hand/", "schedule/")) for address in seen)


def test_a_get_changes_nothing_whoever_makes_it(admin_client: Client) -> None:
    flow = failed()
    before = rows()
    for address in addresses(flow):
        admin_client.get(address)
        admin_client.get(address, ATTEMPT)
    assert rows() == before


def test_every_post_needs_a_token(admin_user: User) -> None:
    flow = failed()
    before = rows()
    strict = Client(enforce_csrf_checks=True)
    strict.force_login(admin_user)
    for address in addresses(flow):
        assert strict.post(address, ATTEMPT).status_code in {403, 405}, address
    assert rows() == before


@pytest.mark.parametrize(
    ("address", "codename", "button"),
    [
        (LIST + "{pk}/rerun_from/", "rerun_flowexecution", "Rerun from…"),
        (LIST + "{pk}/by_hand/", "complete_flowexecution", "Done by hand…"),
        (TEMPLATES + "billing/schedule/", "schedule_flow", "Schedule a run…"),
        (TEMPLATES + "billing/pause/", "pause_flowtemplate", "Pause"),
    ],
)
def test_a_permission_opens_its_page_and_shows_its_button(
    address: str, codename: str, button: str
) -> None:
    flow = failed()
    address = address.format(pk=flow.pk)
    on = f"{LIST}{flow.pk}/change/" if "{pk}" in address or LIST in address else None
    shown_on = on or f"{TEMPLATES}billing/change/"
    viewer = user_with("view_flowexecution")
    assert button not in page(viewer, shown_on)
    assert viewer.get(address).status_code in {403, 405}
    assert viewer.post(address, ATTEMPT).status_code == 403
    User.objects.all().delete()
    permitted = user_with("view_flowexecution", codename)
    assert button in page(permitted, shown_on)
    assert permitted.post(address, ATTEMPT).status_code == 302


def test_without_the_right_to_values_a_rerun_takes_the_context_over_unseen() -> None:
    flow = failed(SECRET)
    client = user_with("view_flowexecution", "rerun_flowexecution")
    text = page(client, f"{LIST}{flow.pk}/rerun_from/?task=0")
    assert SECRET not in text
    assert "You have no permission to see the values" in text
    entry = ExecutionContextEntry.objects.get(flow_execution=flow, name="bad")
    forged = {"task": "0", f"value_{entry.pk}": '"other"', "other_name": "x", "other_value": "1"}
    response = client.post(f"{LIST}{flow.pk}/rerun_from/", forged)
    rerun = FlowExecution.objects.get(rerun_of=flow)
    assert response["Location"] == f"{LIST}{rerun.pk}/change/"
    assert dict(rerun.execution_context) == {"bad": SECRET}


def test_values_are_not_offered_for_a_new_run_without_the_right_to_them() -> None:
    succeeded(plain=SECRET)
    client = user_with("view_flowexecution", "schedule_flow")
    assert SECRET not in page(client, f"{TEMPLATES}billing/schedule/?like")


def test_no_record_is_added_or_edited_by_hand(admin_client: Client) -> None:
    flow = succeeded()
    for address in addresses(flow):
        if address.endswith("/add/"):
            assert admin_client.get(address).status_code == 403
            assert admin_client.post(address, {}).status_code == 403


# The matrix: each address, by GET and POST, for a user who may look and has one more permission

NEEDED = {
    f"{LIST}{{pk}}/reschedule/": "reschedule_flowexecution",
    f"{LIST}{{pk}}/rerun_now/": "rerun_flowexecution",
    f"{LIST}{{pk}}/rerun_from_start/": "rerun_flowexecution",
    f"{LIST}{{pk}}/rerun_from/": "rerun_flowexecution",
    f"{LIST}{{pk}}/by_hand/": "complete_flowexecution",
    f"{LIST}{{pk}}/cancel/": "cancel_flowexecution",
    f"{LIST}{{pk}}/delete/": "delete_flowexecution",
    f"{TEMPLATES}billing/schedule/": "schedule_flow",
    f"{TEMPLATES}billing/pause/": "pause_flowtemplate",
    f"{TEMPLATES}billing/resume/": "pause_flowtemplate",
}
PERMISSIONS = sorted({*NEEDED.values(), "view_taskexecution", "view_executioncontextentry"})


def changes(client: Client, method: str, address: str) -> tuple[int, bool]:
    """Return the answer's status, and whether any row was another after it; undo all of it."""
    before = rows()
    with transaction.atomic(), atomic():
        status = client.generic(
            method, address, urlencode(ATTEMPT), "application/x-www-form-urlencoded"
        ).status_code
        is_changed = rows() != before
        transaction.set_rollback(True)
        transaction.set_rollback(True, using=FLOWS)
    return status, is_changed


@pytest.mark.parametrize("permission", PERMISSIONS)
def test_the_matrix_of_rights(permission: str) -> None:
    flow = failed()
    needed = {address.format(pk=flow.pk): codename for address, codename in NEEDED.items()}
    client = user_with("view_flowexecution", permission)
    walked = addresses(flow)
    assert needed.keys() <= set(walked)
    for address in walked:
        status, is_changed = changes(client, "GET", address)
        assert not is_changed, ("GET", address)
        if address in needed:
            opens = needed[address] == permission
            assert status in ({200, 405} if opens else {403, 405}), ("GET", address, status)
        status, is_changed = changes(client, "POST", address)
        if needed.get(address) == permission:
            assert (status, is_changed) == (302, True), ("POST", address)
        else:
            assert not is_changed, ("POST", address)
            assert status in ({403} if address in needed else {200, 302, 403, 405}), address


def test_no_other_method_changes_anything(admin_client: Client) -> None:
    flow = failed()
    for address in addresses(flow):
        for method in ("HEAD", "OPTIONS", "PUT", "PATCH", "DELETE"):
            status, is_changed = changes(admin_client, method, address)
            assert not is_changed, (method, address)
            assert status < 500, (method, address)


def test_the_table_of_rights_is_the_documented_one() -> None:
    text = (Path(__file__).parent.parent / "SECURITY.md").read_text()
    table = text.partition("## Who can do what in the admin")[2].partition("\n## ")[0]
    for codename in {*PERMISSIONS, "view_flowexecution", "view_flowtemplatestate"}:
        assert f"`{codename}`" in table, codename
    for right in RIGHTS:
        assert f"| `{right}` |" in table, right
