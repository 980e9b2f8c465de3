"""A subclass that narrows the queryset or a permission narrows every page, action and count."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from django.contrib.auth.backends import BaseBackend
from django.contrib.auth.models import Permission, User
from django.test import Client, override_settings

from ebbs_and_flows import FlowTemplate, InvalidFlowTemplate, flow_runner
from ebbs_and_flows.models import ExecutionContextEntry, FlowExecution, FlowTransition

from .operators import LIST, TEMPLATES, billing, charge, first, page, registered, user_with

pytestmark = pytest.mark.django_db

ENTRIES = "/admin/ebbs_and_flows/executioncontextentry/"
ATTEMPTS = "/admin/ebbs_and_flows/taskexecution/"
EVERYTHING = (  # noqa: SIM905 - as a list it takes a page
    "view_flowexecution delete_flowexecution view_taskexecution view_executioncontextentry"
    " schedule_flow reschedule_flowexecution rerun_flowexecution cancel_flowexecution"
    " complete_flowexecution pause_flowtemplate"
).split()
ACTIONS = ("reschedule", "rerun_now", "rerun_from_start", "cancel")
SECRET = "of-another-tenant"


@pytest.fixture(autouse=True)
def template() -> Iterator[None]:
    with registered(billing()):
        yield


def run(key: str, **context: Any) -> FlowExecution:
    flow = flow_runner.schedule_flow("billing", context, key=key)
    return flow_runner.run_flow_execution(flow)


@pytest.fixture
def mine() -> FlowExecution:
    return run("ada-1", bad="my-own-error")


@pytest.fixture
def other() -> FlowExecution:
    return run("bob-1", bad=SECRET)


@pytest.fixture
def tenant() -> Iterator[Client]:
    with override_settings(ROOT_URLCONF="tests.tenants"):
        yield user_with(*EVERYTHING)


def test_a_tenant_sees_its_own_flows_on_every_page_and_in_every_count(
    tenant: Client, mine: FlowExecution, other: FlowExecution
) -> None:
    with registered(FlowTemplate("theirs", tasks=[first])):
        theirs = flow_runner.schedule_flow("theirs", key="bob-2")
    running = flow_runner.schedule_flow("billing", key="bob-3")
    FlowExecution.objects.filter(pk=running.pk).update(
        status="RUNNING", claim=1, claimed_by=SECRET, lease_expires_at="2999-01-01T00:00Z"
    )
    hidden = (other, theirs, running)
    for address in (
        LIST,
        f"{LIST}?q=bob",
        f"{LIST}?q={other.pk}",
        f"{LIST}?template=theirs",
        f"{LIST}live/?" + "&".join(f"id={flow.pk}" for flow in (mine, *hidden)),
        f"{LIST}{mine.pk}/change/",
        TEMPLATES,
        f"{TEMPLATES}billing/change/",
        f"{TEMPLATES}billing/schedule/",
        ATTEMPTS,
        ENTRIES,
        f"{ATTEMPTS}?flow_execution__id__exact={other.pk}",
        f"{ENTRIES}?flow_execution__id__exact={other.pk}",
    ):
        text = page(tenant, address)
        assert SECRET not in text, address
        # A filter that was typed is echoed.
        assert "theirs" not in text or "template=theirs" in address, address
        for flow in hidden:
            assert f"/flowexecution/{flow.pk}/change/" not in text, address
            assert f'data-ebbs-live="status_pill-{flow.pk}"' not in text, address
    figures = {f.name: f.value for f in tenant.get(LIST).context["overview"].figures}
    assert figures["Failed in 24 hours"] == "1"
    assert (figures["Running"], figures["Waiting"]) == ("0", "0")
    assert figures["Oldest that is due"] == "none"
    shown = {entry.name: entry for entry in tenant.get(TEMPLATES).context["entries"]}
    entry = shown["billing"]
    assert [count.value for count in entry.counts] == ["0", "0", "1"]
    assert tenant.get(TEMPLATES).context["unknown"] == []
    assert tenant.get(ATTEMPTS).context["cl"].result_count == 2
    assert "my-own-error" in page(tenant, f"{LIST}{mine.pk}/change/")


def test_another_tenants_flow_is_as_one_that_does_not_exist(
    tenant: Client, mine: FlowExecution, other: FlowExecution
) -> None:
    attempt, entry = other.task_executions.first(), other.entries.first()
    assert attempt is not None
    assert entry is not None
    before = list(FlowExecution.objects.order_by("pk").values())
    transitions = FlowTransition.objects.count()
    said: dict[int, list[str]] = {}
    for pk in (other.pk, other.pk + 1000):
        for name in ("change", "rerun_from", "by_hand", "delete", "history"):
            response = tenant.get(f"{LIST}{pk}/{name}/", follow=True)
            assert SECRET not in response.content.decode()
            found = " ".join(map(str, response.context["messages"]))
            said.setdefault(pk, []).append(found.replace(str(pk), "ID"))
        for name in (
            "reschedule",
            "rerun_now",
            "rerun_from_start",
            "cancel",
            "rerun_from",
            "by_hand",
            "delete",
        ):
            given = {"post": "yes", "task": "0", "reason": "x", "entries": "{}"}
            response = tenant.post(f"{LIST}{pk}/{name}/", given)
            assert response.status_code in {302, 403, 404}, name
        # The messages of the posts are shown, and gone.
        page(tenant, LIST)
    # The same words for both.
    assert said[other.pk] == said[other.pk + 1000]
    for address in (f"{ATTEMPTS}{attempt.pk}/change/", f"{ENTRIES}{entry.pk}/change/"):
        assert SECRET not in tenant.get(address, follow=True).content.decode()
    like = f"{TEMPLATES}billing/schedule/?like={other.pk}"
    assert SECRET not in page(tenant, like)
    for action in (*ACTIONS, "delete_selected"):
        tenant.post(
            LIST,
            {
                "action": action,
                "_selected_action": [other.pk],
                "post": "yes",
                "select_across": "0",
            },
        )
    assert list(FlowExecution.objects.order_by("pk").values()) == before
    assert FlowTransition.objects.count() == transitions


def test_all_across_pages_is_all_of_the_tenant(
    tenant: Client, mine: FlowExecution, other: FlowExecution
) -> None:
    chosen = {"action": "cancel", "_selected_action": [mine.pk], "select_across": "1"}
    tenant.post(LIST, {**chosen, "post": "yes"})
    mine.refresh_from_db()
    other.refresh_from_db()
    assert (mine.status, other.status) == ("CANCELLED", "FAILED")


def test_a_rerun_of_another_tenants_flow_does_not_link_to_it(
    tenant: Client, other: FlowExecution
) -> None:
    rerun = flow_runner.fork_flow_execution(other)
    FlowExecution.objects.filter(pk=rerun.pk).update(key="ada-9")
    assert "Rerun of</dt>" not in page(tenant, f"{LIST}{rerun.pk}/change/").replace("\n", "")
    assert f"/{other.pk}/change/" not in page(tenant, f"{LIST}{rerun.pk}/change/")


def test_a_permission_that_a_subclass_narrows_is_asked_everywhere() -> None:
    open_flow, locked, hidden = (
        run("open", bad="x"),
        run("locked", bad="x"),
        run("hidden", bad="x"),
    )
    with override_settings(ROOT_URLCONF="tests.locked_urls"):
        client = user_with(*EVERYTHING)
        text = page(client, f"{LIST}{open_flow.pk}/change/")
        for button in ("Reschedule", "Rerun from…", "Done by hand…"):
            assert f">{button}<" in text
        assert ">Cancel<" not in text
        text = page(client, f"{LIST}{locked.pk}/change/")
        for button in ("Reschedule", "Rerun from…", "Done by hand…", "Cancel"):
            assert f">{button}<" not in text
        for name in ("reschedule", "rerun_from", "by_hand", "cancel"):
            assert client.post(f"{LIST}{locked.pk}/{name}/", {"task": "0"}).status_code == 403
        assert client.get(f"{LIST}{hidden.pk}/change/").status_code == 302
        attempt = hidden.task_executions.first()
        assert attempt is not None
        assert client.get(f"{ATTEMPTS}{attempt.pk}/change/").status_code == 403
        assert 'value="cancel"' not in page(client, LIST)
        response = client.post(
            LIST,
            {
                "action": "reschedule",
                "_selected_action": [open_flow.pk, locked.pk],
                "post": "yes",
            },
            follow=True,
        )
        said = [str(message) for message in response.context["messages"]]
        assert said == ["1 flow rescheduled.", "1 skipped: you have no permission for it."]
    locked.refresh_from_db()
    assert locked.status == "FAILED"


# A template's own permissions


def test_the_permissions_of_a_template_are_checked_when_it_is_written() -> None:
    for wrong in (
        {"run": "shop.x"},
        {"cancel": "x"},
        {"cancel": 1},
        {"cancel": "a.b.c"},
        "shop.x",
    ):
        with pytest.raises(InvalidFlowTemplate, match="permission"):
            billing(permissions=wrong)
    assert billing(permissions={"cancel": "shop.refund"}).permissions == {"cancel": "shop.refund"}


RIGHTS = ("schedule", "reschedule", "rerun", "cancel", "complete", "pause")
GUARDED = dict.fromkeys(RIGHTS, "auth.delete_group")


@pytest.fixture
def guarded() -> Iterator[FlowTemplate]:
    template = FlowTemplate("guarded", tasks=[first, charge], permissions=GUARDED)
    with registered(template):
        yield template


def fail_guarded(key: str = "k") -> FlowExecution:
    flow = flow_runner.schedule_flow("guarded", {"bad": "x"}, key=key)
    return flow_runner.run_flow_execution(flow)


POSTS = (
    (LIST + "{pk}/reschedule/", "Reschedule"),
    (LIST + "{pk}/rerun_now/", "Rerun now"),
    (LIST + "{pk}/rerun_from_start/", "Rerun from the start"),
    (LIST + "{pk}/rerun_from/", "Rerun from…"),
    (LIST + "{pk}/by_hand/", "Done by hand…"),
    (LIST + "{pk}/cancel/", "Cancel"),
    (TEMPLATES + "guarded/schedule/", "Schedule a run…"),
    (TEMPLATES + "guarded/pause/", "Pause"),
)


@pytest.mark.usefixtures("guarded")
def test_a_templates_permission_is_needed_beside_the_apps_own() -> None:
    flow = fail_guarded()
    client = user_with(*EVERYTHING)
    shown = page(client, f"{LIST}{flow.pk}/change/") + page(client, f"{TEMPLATES}guarded/change/")
    given = {"task": "0", "reason": "x", "entries": "{}", "priority": "0", "context": "{}"}
    for address, button in POSTS:
        assert not re.search(rf">\s*{button}\s*<", shown), button
        assert client.post(address.format(pk=flow.pk), given).status_code == 403, address
    assert f"{TEMPLATES}guarded/schedule/" not in page(client, TEMPLATES)
    assert f"{TEMPLATES}billing/schedule/" in page(client, TEMPLATES)
    free = run("free", bad="x")
    chosen = {"action": "cancel", "_selected_action": [flow.pk, free.pk], "post": "yes"}
    response = client.post(LIST, chosen, follow=True)
    said = [str(message) for message in response.context["messages"]]
    assert said[-1] == "1 skipped: you have no permission for it."
    flow.refresh_from_db()
    assert flow.status == "FAILED"
    # With it, all of that is there.
    User.objects.get(username="ada").user_permissions.add(
        Permission.objects.get(codename="delete_group")
    )
    shown = page(client, f"{LIST}{flow.pk}/change/") + page(client, f"{TEMPLATES}guarded/change/")
    for _address, button in POSTS:
        assert re.search(rf">\s*{button}\s*<", shown), button
    # And alone it is not enough.
    User.objects.all().delete()
    viewer = user_with("view_flowexecution")
    User.objects.get(username="ada").user_permissions.add(
        Permission.objects.get(codename="delete_group")
    )
    for address, _button in POSTS:
        assert viewer.post(address.format(pk=flow.pk), given).status_code == 403, address


class OwnFlows(BaseBackend):
    """Grants the template's permission for the flows whose key is the user's name."""

    def has_perm(self, user_obj: Any, perm: str, obj: Any = None) -> bool:
        is_own = isinstance(obj, FlowExecution) and obj.key == user_obj.get_username()
        return perm == "auth.delete_group" and is_own


@pytest.mark.usefixtures("guarded")
def test_an_object_permission_of_a_backend_is_asked_for_the_flow(settings: Any) -> None:
    settings.AUTHENTICATION_BACKENDS = [
        "django.contrib.auth.backends.ModelBackend",
        f"{__name__}.OwnFlows",
    ]
    own, other = fail_guarded("ada"), fail_guarded("bob")
    client = user_with(*EVERYTHING)
    assert client.post(f"{LIST}{other.pk}/reschedule/").status_code == 403
    assert client.post(f"{LIST}{own.pk}/reschedule/").status_code == 302
    own.refresh_from_db()
    other.refresh_from_db()
    assert (own.status, other.status) == ("RESCHEDULED", "FAILED")


# Outputs


def test_who_may_not_see_attempts_sees_no_output_and_no_link_to_one() -> None:
    flow = run("k", bad="what-went-wrong")
    viewer = user_with(
        "view_flowexecution", "complete_flowexecution", "view_executioncontextentry"
    )
    ExecutionContextEntry.objects.filter(name="bad").update(value='"other"')
    for address in (
        LIST,
        f"{LIST}live/?id={flow.pk}",
        f"{LIST}{flow.pk}/change/",
        f"{LIST}{flow.pk}/by_hand/",
    ):
        text = page(viewer, address)
        assert "what-went-wrong" not in text, address
        assert "Traceback" not in text, address
    text = page(viewer, f"{LIST}{flow.pk}/change/")
    links = set(re.findall(r'href="(/admin/[^"?]*)', text)) - {"/admin/password_change/"}
    for address in links:
        assert viewer.get(address).status_code != 403, address
    assert "ValueError" in page(viewer, LIST)
    User.objects.all().delete()
    permitted = user_with("view_flowexecution", "view_taskexecution")
    assert "what-went-wrong" in page(permitted, f"{LIST}{flow.pk}/change/")
