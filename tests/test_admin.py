"""The admin: what operators see and may do, and what no stored value can do to a page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.admin import site
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import User
from django.test import Client
from django.utils import timezone

from ebbs_and_flows import FlowStatus, FlowTemplate, RetryLater, flow_runner, task
from ebbs_and_flows.models import (
    ExecutionContextEntry,
    FlowExecution,
    TaskExecution,
    WorkerProcess,
)
from ebbs_and_flows.redaction import Redactor
from ebbs_and_flows.testing import fail_task

from .databases import connection
from .operators import (
    LIST,
    addresses,
    billing,
    charge,
    failed,
    page,
    registered,
    request_of,
    succeeded,
    user_with,
)

pytestmark = pytest.mark.django_db

ACTIONS = ("reschedule", "rerun_now", "rerun_from_start", "cancel")


@pytest.fixture(autouse=True)
def template() -> Iterator[None]:
    with registered(billing()):
        yield


def choose(client: Client, action: str, *flows: FlowExecution, **more: Any) -> list[str]:
    data = {"action": action, "_selected_action": [flow.pk for flow in flows], "index": 0, **more}
    response = client.post(LIST, data, follow=True)
    assert response.status_code == 200
    return [str(message) for message in response.context["messages"]]


# The list


def test_the_list_says_what_went_wrong_where(admin_client: Client) -> None:
    failed("the card is bad")
    text = page(admin_client, LIST)
    assert "ebbs-pill ebbs-failed" in text
    assert "1 of 2" in text
    assert "<b><bdi>charge</bdi></b>: <bdi>ValueError: the card is bad</bdi>" in text
    assert "Add flow execution" not in text


def test_a_task_that_asked_for_later_is_shown_as_waiting_and_no_error(
    admin_client: Client,
) -> None:
    with fail_task("billing", "charge", RetryLater(60, "The <parcel> is on its way.")):
        flow = flow_runner.run_flow_execution(flow_runner.schedule_flow("billing"))
    text = page(admin_client, LIST)
    assert "<bdi>charge</bdi> waits: <bdi>The &lt;parcel&gt; is on its way.</bdi>" in text
    shown = page(admin_client, f"{LIST}{flow.pk}/change/")
    assert "The &lt;parcel&gt; is on its way." in shown
    assert "ebbs-error" not in shown
    assert "Traceback" not in shown


def test_the_list_filters_and_searches(admin_client: Client) -> None:
    flow = flow_runner.schedule_flow("billing", key="order-42")
    other = succeeded()
    found = {
        f"?q={flow.pk}": {flow.pk},
        "?q=order": {flow.pk},
        "?q=bill": {flow.pk, other.pk},
        "?q=rder": set(),
        "?q=9999999999999999999999": set(),
        "?status=SUCCEEDED": {other.pk},
        "?status=waiting": {flow.pk},
        "?when=hour": {flow.pk, other.pk},
        "?when=month&status=SUCCEEDED": {other.pk},
        "?template=billing": {flow.pk, other.pk},
        "?template=unknown": set(),
    }
    for query, expected in found.items():
        if query == f"?q={flow.pk}":
            expected = expected | set(
                FlowExecution.objects.filter(key__startswith=str(flow.pk)).values_list("pk")
            )
        shown = admin_client.get(LIST + query).context["cl"].result_list
        assert {row.pk for row in shown} == expected, query


def test_a_template_that_is_only_in_the_table_can_be_filtered_for(admin_client: Client) -> None:
    flow = succeeded()
    FlowExecution.objects.filter(pk=flow.pk).update(template_name="retired")
    text = page(admin_client, LIST)
    assert "?template=retired" in text
    assert "?template=billing" in text


def test_the_number_of_queries_does_not_grow_with_the_rows(
    admin_client: Client, django_assert_num_queries: Any
) -> None:
    from django.test.utils import CaptureQueriesContext

    failed()
    page(admin_client, LIST)
    with CaptureQueriesContext(connection) as few:
        page(admin_client, LIST)
    for _ in range(10):
        failed()
    with django_assert_num_queries(len(few), connection=connection):
        page(admin_client, LIST)


# Actions


def test_each_action_does_what_is_legal_and_says_so(admin_client: Client) -> None:
    one, two, done = failed(), failed(), succeeded()
    assert choose(admin_client, "reschedule", one, two, done) == [
        "2 flows rescheduled.",
        "1 left alone: it has not failed.",
    ]
    assert {flow_runner.service.get_flow_execution(flow).status for flow in (one, two)} == {
        FlowStatus.RESCHEDULED
    }
    three = failed()
    assert choose(admin_client, "rerun_now", three) == ["1 flow will run next."]
    assert flow_runner.run_next().pk == three.pk  # type: ignore[union-attr]
    assert choose(admin_client, "rerun_from_start", done, one) == [
        "1 new flow scheduled from the start.",
        "1 left alone: it is not over yet.",
    ]
    assert FlowExecution.objects.filter(rerun_of=done).count() == 1
    assert choose(admin_client, "cancel", one, two, done) == [
        "2 flows cancelled, after the task in progress where one was running.",
        "1 left alone: it is over already.",
    ]
    logged = LogEntry.objects.filter(object_id=str(one.pk)).values_list(
        "change_message", flat=True
    )
    assert set(logged) == {"Reschedule", "Cancel"}
    assert one.transitions.latest("pk").actor == "user admin"


def test_an_action_reports_an_unknown_template_in_a_sentence(admin_client: Client) -> None:
    done = succeeded()
    flow_runner._templates.pop("billing")
    (said,) = choose(admin_client, "rerun_from_start", done)
    assert "'billing'" in said
    assert FlowExecution.objects.count() == 1


def test_all_across_pages_are_taken_in_batches(
    admin_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ebbs_and_flows.admin.actions._BATCH", 3)
    flows = [failed() for _ in range(10)]
    said = choose(admin_client, "reschedule", flows[0], select_across=1)
    assert said == ["10 flows rescheduled."]


@pytest.mark.parametrize("name", ACTIONS)
def test_without_the_permission_there_is_no_button_and_a_post_is_403(name: str) -> None:
    flow = failed()
    client = user_with("view_flowexecution")
    assert f'action="{LIST}{flow.pk}/{name}/"' not in page(client, f"{LIST}{flow.pk}/change/")
    assert f'value="{name}"' not in page(client, LIST)
    assert client.post(f"{LIST}{flow.pk}/{name}/").status_code == 403
    data = {"action": name, "_selected_action": [flow.pk], "index": 0}
    assert client.post(LIST, data).status_code == 403
    flow.refresh_from_db()
    assert flow.status == FlowStatus.FAILED
    assert FlowExecution.objects.count() == 1


@pytest.mark.parametrize("name", ACTIONS)
def test_the_buttons_of_a_flow_act_by_post_only(admin_client: Client, name: str) -> None:
    flow = failed()
    url = f"{LIST}{flow.pk}/{name}/"
    assert f'action="{url}"' in page(admin_client, f"{LIST}{flow.pk}/change/")
    assert admin_client.get(url).status_code == 405
    strict = Client(enforce_csrf_checks=True)
    strict.force_login(User.objects.get(username="admin"))
    assert strict.post(url).status_code == 403
    flow.refresh_from_db()
    assert flow.status == FlowStatus.FAILED
    assert admin_client.post(f"{LIST}{flow.pk}/change/").status_code == 405
    response = admin_client.post(url)
    assert response["Location"] == f"{LIST}{flow.pk}/change/"
    flow.refresh_from_db()
    assert (flow.status != FlowStatus.FAILED) or FlowExecution.objects.filter(
        rerun_of=flow
    ).exists()


def test_one_permission_gives_one_button() -> None:
    flow = failed()
    client = user_with("view_flowexecution", "reschedule_flowexecution")
    text = page(client, f"{LIST}{flow.pk}/change/")
    assert re.findall(rf'action="{LIST}{flow.pk}/(\w+)/"', text) == ["reschedule"]
    assert client.post(f"{LIST}{flow.pk}/reschedule/").status_code == 302


# One flow


def test_the_page_shows_tasks_context_and_history(admin_client: Client) -> None:
    flow = failed("the card is bad")
    flow_runner.reschedule_flow_execution(flow, actor="ada", reason="mended")
    text = page(admin_client, f"{LIST}{flow.pk}/change/")
    for expected in (
        "Do the first thing.",
        "ValueError: the card is bad",
        "Traceback",
        "At scheduling",
        "first_result",
        "mended",
    ):
        assert expected in text, expected
    assert "hunter2" not in text
    assert "To come" not in text


def test_what_looks_secret_is_masked_on_every_page(admin_client: Client) -> None:
    flow = succeeded(api_key="s3cret-1", nested=[{"x": {"TOKEN": "s3cret-2"}}], pw={("a"): 1})
    urls = [f"{LIST}{flow.pk}/change/", *addresses(flow)]
    entries = ExecutionContextEntry.objects.filter(flow_execution=flow)
    urls += [f"/admin/ebbs_and_flows/executioncontextentry/{row.pk}/change/" for row in entries]
    text = "".join(admin_client.get(url).content.decode() for url in urls)
    assert "api_key" in text
    assert "s3cret" not in text


class OnlyColours(Redactor):
    mask = "hidden"

    def is_secret(self, name: str) -> bool:
        return name == "colour"


def test_what_is_secret_is_a_setting_of_the_project(admin_client: Client, settings: Any) -> None:
    flow = succeeded(colour="DE00", api_key="shown now")
    settings.EBBS_AND_FLOWS = {**settings.EBBS_AND_FLOWS, "REDACT": f"{__name__}.OnlyColours"}
    text = page(admin_client, f"{LIST}{flow.pk}/change/")
    assert "DE00" not in text
    assert "hidden" in text
    assert "shown now" in text


def test_a_long_value_is_folded_and_cut_and_stays_masked(admin_client: Client) -> None:
    flow = succeeded(long="y" * 1_000_000, other={"password": "s3cret", "z": "y" * 100_000})
    text = page(admin_client, f"{LIST}{flow.pk}/change/")
    assert "cut here: 1000002 characters in all" in text
    assert "s3cret" not in text
    assert len(text) < 100_000


def test_many_entries_and_tasks_stay_one_page(
    admin_client: Client, django_assert_max_num_queries: Any
) -> None:
    tasks = [task(name=f"t{n}")(lambda context: context) for n in range(500)]
    flow_runner.register_flow_template(FlowTemplate("long", tasks=tasks))
    try:
        flow = flow_runner.schedule_flow("long", {f"e{n}": n for n in range(300)})
        with django_assert_max_num_queries(15, connection=connection):
            text = page(admin_client, f"{LIST}{flow.pk}/change/")
    finally:
        flow_runner._templates.pop("long")
    assert "and 100 more entries" in text
    assert "t499" in text
    assert "<progress" in text


def test_a_missing_or_drifted_template_is_said_on_top(admin_client: Client) -> None:
    flow = failed()
    flow_runner._templates["billing"] = FlowTemplate("billing", tasks=[charge])
    assert "completed &#x27;first&#x27; as task 0" in page(
        admin_client, f"{LIST}{flow.pk}/change/"
    )
    flow_runner._templates.pop("billing")
    assert "No template &#x27;billing&#x27; is registered here" in page(
        admin_client, f"{LIST}{flow.pk}/change/"
    )


def test_a_flow_that_fits_no_live_worker_is_said_on_top(admin_client: Client) -> None:
    flow = failed()
    now = timezone.now()
    WorkerProcess.objects.create(
        name="one", started_at=now, seen_at=now, templates=[["other", 1, ["a"]]]
    )
    shown = page(admin_client, f"{LIST}{flow.pk}/change/")
    assert "no live worker knows &#x27;billing&#x27;: restart the workers" in shown


def test_an_unknown_flow_is_a_message_and_no_traceback(admin_client: Client) -> None:
    for pk in ("999999", "x", "9" * 30):
        response = admin_client.get(f"{LIST}{pk}/change/", follow=True)
        assert "There is no flow execution" in response.content.decode()
        assert admin_client.post(f"{LIST}{pk}/cancel/").status_code == 302


# Deleting


def test_only_finished_flows_are_deleted(admin_client: Client) -> None:
    waiting, done = flow_runner.schedule_flow("billing"), succeeded()
    assert admin_client.get(f"{LIST}{waiting.pk}/delete/").status_code == 403
    assert admin_client.post(f"{LIST}{waiting.pk}/delete/", {"post": "yes"}).status_code == 302
    response = admin_client.post(f"{LIST}{done.pk}/delete/", {"post": "yes"})
    assert response.status_code == 302
    assert list(FlowExecution.objects.values_list("pk", flat=True)) == [waiting.pk]
    assert not TaskExecution.objects.exists()
    more = succeeded()
    choose(admin_client, "delete_selected", waiting, more, post="yes")
    assert list(FlowExecution.objects.values_list("pk", flat=True)) == [waiting.pk]


def test_a_flow_that_is_rescheduled_while_it_is_being_deleted_stays(admin_user: User) -> None:
    waiting, done = flow_runner.schedule_flow("billing"), succeeded()
    model_admin = site.get_model_admin(FlowExecution)
    model_admin.delete_queryset(request_of(admin_user), FlowExecution.objects.all())
    assert list(FlowExecution.objects.values_list("pk", flat=True)) == [waiting.pk]
    assert done.pk


def test_a_user_may_delete_flows_without_a_right_to_each_record() -> None:
    done = succeeded()
    client = user_with("view_flowexecution", "delete_flowexecution")
    assert client.post(f"{LIST}{done.pk}/delete/", {"post": "yes"}).status_code == 302
    assert not FlowExecution.objects.exists()


def test_durations_read_well() -> None:
    from ebbs_and_flows.durations import duration

    shown = [duration(timedelta(seconds=s)) for s in (0.25, 0.9997, 75, 3700, 200_000)]
    assert shown == ["250 ms", "1.0 s", "1 min 15 s", "1 h 1 min", "2 d 7 h"]
    assert duration(None) == ""
