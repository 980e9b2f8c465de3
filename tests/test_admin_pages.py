"""The admin's own pages: rerun from, done by hand, templates, scheduling, the overview."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from django import forms
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import User
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from ebbs_and_flows import FlowStatus, FlowTemplate, Retry, flow_runner, task
from ebbs_and_flows.admin.attempts import log_lines
from ebbs_and_flows.admin.rules import retry_in_words
from ebbs_and_flows.admin.timeline import Axis, timeline_rows
from ebbs_and_flows.models import (
    ExecutionContextEntry,
    FlowExecution,
    TaskExecution,
    WorkerProcess,
)
from ebbs_and_flows.testing import fail_task, move_clock

from .databases import connection
from .operators import LIST, TEMPLATES, billing, charge, failed, first, page, registered, succeeded

pytestmark = pytest.mark.django_db


class Order(forms.Form):
    order_id = forms.IntegerField(min_value=1)
    due = forms.DateField(required=False)


@pytest.fixture(autouse=True)
def template() -> Iterator[None]:
    with registered(billing()):
        yield


def entry(flow: FlowExecution, name: str) -> int:
    return int(ExecutionContextEntry.objects.get(flow_execution=flow, name=name).pk)


def logged() -> list[str]:
    return list(LogEntry.objects.order_by("pk").values_list("change_message", flat=True))


# One flow


def test_the_days_that_a_flow_lay_failed_are_told_from_its_work(admin_client: Client) -> None:
    with fail_task("billing", "charge"):
        flow = failed("")
    shown = f"{LIST}{flow.pk}/change/"
    assert "at work for" not in page(admin_client, shown)
    move_clock(timedelta(days=3))
    flow_runner.run_flow_execution(flow_runner.reschedule_flow_execution(flow))
    assert re.search(r"3 d 0 h, at work for \d+ ms of it", page(admin_client, shown))


# Rerun from…


def rerun(client: Client, flow: FlowExecution, task: int, **fields: str) -> Any:
    address = f"{LIST}{flow.pk}/rerun_from/"
    shown = client.get(address, {"task": task}).context["form"]
    given = {name: shown[name].value() for name in shown.fields if name.startswith("value_")}
    return client.post(address, {"task": task, **given, **fields})


def test_a_text_says_that_it_stands_in_quotes(admin_client: Client) -> None:
    flow = failed("no")
    form = admin_client.get(f"{LIST}{flow.pk}/rerun_from/", {"task": 1}).context["form"]
    hints = {name: form[name].help_text for name in form.fields if name.startswith("value_")}
    assert hints == {
        f"value_{entry(flow, 'bad')}": "A text stands in quotes.",
        f"value_{entry(flow, 'first_result')}": "",
    }
    shown = page(admin_client, f"{LIST}{flow.pk}/rerun_from/?task=1")
    described = f"id_value_{entry(flow, 'bad')}_helptext"
    assert f'aria-describedby="{described}"' in shown
    assert f'id="{described}"' in shown
    assert "As JSON, a text in quotes: &quot;tea&quot;." in shown


def test_a_rerun_begins_at_the_chosen_task_with_the_mended_value(admin_client: Client) -> None:
    flow = failed("no")
    response = rerun(admin_client, flow, 1, **{f"value_{entry(flow, 'bad')}": '""'})
    fork = FlowExecution.objects.get(rerun_of=flow)
    assert response["Location"] == f"{LIST}{fork.pk}/change/"
    assert fork.current_task_index == 1
    assert dict(fork.execution_context) == {
        "bad": "",
        "first_result": {"password": "hunter2", "n": 1},
    }
    assert flow_runner.run_flow_execution(fork).status == FlowStatus.SUCCEEDED
    assert f">#{flow.pk}</a>" in page(admin_client, f"{LIST}{fork.pk}/change/")
    assert f">#{fork.pk}</a>" in page(admin_client, f"{LIST}{flow.pk}/change/")
    assert logged() == [
        f"Rerun from charge as #{fork.pk}; changed: bad",
        f"Rerun of #{flow.pk} from charge; changed: bad",
    ]


def test_a_rerun_offers_the_tasks_that_the_flow_reached(admin_client: Client) -> None:
    flow = failed()
    text = page(admin_client, f"{LIST}{flow.pk}/rerun_from/")
    assert re.findall(r'href="\?task=(\d)" ?(aria-current)?', text) == [
        ("0", ""),
        ("1", "aria-current"),
    ]
    waiting = flow_runner.schedule_flow("billing")
    text = page(admin_client, f"{LIST}{waiting.pk}/rerun_from/?task=1")
    assert re.findall(r'href="\?task=(\d)"', text) == ["0"]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("[1, 2", "Invalid JSON: Expecting"),
        ('{"a": 1, "a": 2}', "The name &#x27;a&#x27; is given twice"),
        ('{"$type": "decimal", "value": "1"}', "give the plain value, without its type"),
        ("7", "The entry has the type str, and this is of the type int"),
        ("", "Give a value as JSON"),
    ],
)
def test_what_cannot_be_read_is_said_beside_the_field_and_kept(
    admin_client: Client, typed: str, said: str
) -> None:
    flow = failed()
    name = f"value_{entry(flow, 'bad')}"
    response = rerun(
        admin_client, flow, 1, **{name: typed}, other_name="more", other_value='"kept"'
    )
    assert response.status_code == 200
    form = response.context["form"]
    assert list(form.errors) == [name]
    assert form[name].value() == typed
    assert form["other_value"].value() == '"kept"'
    assert said in response.content.decode()
    assert not FlowExecution.objects.filter(rerun_of=flow).exists()


def test_a_type_is_changed_deliberately_only(admin_client: Client) -> None:
    flow = failed()
    pk = entry(flow, "bad")
    refused = rerun(admin_client, flow, 0, **{f"value_{pk}": "null"})
    assert f'name="retype_{pk}"' in refused.content.decode()
    rerun(admin_client, flow, 0, **{f"value_{pk}": "null", f"retype_{pk}": "on"})
    fork = FlowExecution.objects.get(rerun_of=flow)
    assert dict(fork.execution_context) == {"bad": None}


def test_every_type_is_edited_as_plain_json(admin_client: Client) -> None:
    flow = succeeded(
        price=Decimal("1.50"), day=date(2026, 1, 2), rows=[{"n": 1}], big="y" * 20_000
    )
    changed = {
        f"value_{entry(flow, 'price')}": '"2.75"',
        f"value_{entry(flow, 'rows')}": '[\r\n  {"n": 2}\r\n]',
    }
    rerun(admin_client, flow, 0, **changed)
    fork = FlowExecution.objects.get(rerun_of=flow)
    assert dict(fork.execution_context) == {
        "price": Decimal("2.75"),
        "day": date(2026, 1, 2),
        "rows": [{"n": 2}],
        "big": "y" * 20_000,
    }


def test_what_is_secret_or_long_stays_as_it_is_unless_it_is_replaced(
    admin_client: Client,
) -> None:
    flow = succeeded(api_key="s3cret", big="y" * 20_000)
    text = page(admin_client, f"{LIST}{flow.pk}/rerun_from/?task=0")
    assert "s3cret" not in text
    assert text.count("Left empty, it stays as it is.") == 2
    rerun(admin_client, flow, 0, **{f"value_{entry(flow, 'big')}": '"short"'})
    fork = FlowExecution.objects.get(rerun_of=flow)
    assert dict(fork.execution_context) == {"api_key": "s3cret", "big": "short"}


def test_an_entry_beyond_those_shown_is_changed_by_its_name(admin_client: Client) -> None:
    flow = succeeded(**{f"e{n:03}": n for n in range(130)})
    text = page(admin_client, f"{LIST}{flow.pk}/rerun_from/?task=0")
    assert "and 30 more entries" in text
    rerun(admin_client, flow, 0, other_name="e129", other_value="-1")
    fork = FlowExecution.objects.get(rerun_of=flow)
    assert fork.execution_context["e129"] == -1
    assert fork.execution_context["e128"] == 128


def test_a_refusal_of_the_service_is_said_on_the_page(admin_client: Client) -> None:
    flow = failed()
    other = FlowTemplate("billing", tasks=[charge, first])
    flow_runner._templates["billing"] = other
    text = rerun(admin_client, flow, 1).content.decode()
    assert "completed &#x27;first&#x27; as task 0" in text
    flow_runner._templates.pop("billing")
    assert "is registered here, so it cannot be run again" in page(
        admin_client, f"{LIST}{flow.pk}/rerun_from/"
    )


# Done by hand…


def test_a_task_that_was_done_by_hand_is_recorded_and_the_flow_goes_on(
    admin_client: Client,
) -> None:
    flow = failed("card refused")
    address = f"{LIST}{flow.pk}/by_hand/"
    assert "card refused" in page(admin_client, address)
    response = admin_client.post(
        address, {"reason": "Paid in cash", "entries": '{"receipt": "R-17"}'}
    )
    assert response["Location"] == f"{LIST}{flow.pk}/change/"
    done = flow_runner.run_flow_execution(flow)
    assert done.status == FlowStatus.SUCCEEDED
    assert done.execution_context["receipt"] == "R-17"
    text = page(admin_client, f"{LIST}{flow.pk}/change/")
    assert "Done by hand by user admin: Paid in cash" in text
    assert logged() == ["Task charge done by hand: Paid in cash"]
    # It is over, so there is nothing left to say of it.
    assert admin_client.get(address).status_code == 302


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"reason": " ", "entries": "{}"}, "This field is required."),
        ({"reason": "Paid", "entries": "[1]"}, "Give a JSON object"),
        ({"reason": "Paid", "entries": '{"x": }'}, "Invalid JSON"),
        ({"reason": "Paid", "entries": '{"bad": 1}'}, "already has an entry &#x27;bad&#x27;"),
        ({"reason": "Paid", "entries": '{" x": 1}'}, "nor begin or end with a space"),
    ],
)
def test_nothing_is_recorded_while_the_form_is_wrong(
    admin_client: Client, fields: dict[str, str], said: str
) -> None:
    flow = failed()
    response = admin_client.post(f"{LIST}{flow.pk}/by_hand/", fields)
    text = response.content.decode()
    assert said in text
    assert response.context["form"]["entries"].value() == fields["entries"]
    flow.refresh_from_db()
    assert flow.status == FlowStatus.FAILED
    assert not LogEntry.objects.exists()


# Templates


def test_the_catalogue_shows_what_is_registered_and_what_only_ran(admin_client: Client) -> None:
    succeeded()
    failed()
    flow_runner.schedule_flow("billing")
    FlowExecution.objects.create(
        template_name="retired", task_names=[], run_at=timezone.now(), created_at=timezone.now()
    )
    text = page(admin_client, TEMPLATES)
    shown_entries = admin_client.get(TEMPLATES).context["entries"]
    (shown,) = [entry for entry in shown_entries if entry.name == "billing"]
    assert [(count.name, count.value) for count in shown.counts] == [
        ("waiting", "1"),
        ("running", "0"),
        ("failed", "1"),
    ]
    assert shown.success_rate == "50 %"
    assert "?template=retired" in text


def test_a_templates_page_says_its_rules_in_words(admin_client: Client) -> None:
    slow = task(
        name="slow", timeout=90, atomic=True, retry=Retry(attempts=5, delay=2, on=(OSError,))
    )(lambda context: context)
    template = FlowTemplate(
        "ruled",
        "From here to there",
        tasks=[first, slow],
        max_running=3,
        deadline=7200,
        keep_days=90,
        cron="0 6 * * *",
    )
    flow_runner._recurrences.pop("ruled", None)
    with registered(template):
        flow_runner.sync_recurring()
        text = page(admin_client, f"{TEMPLATES}ruled/change/")
        flow_runner._recurrences.pop("ruled")
        flow_runner.sync_recurring()
    for expected in (
        "From here to there",
        "Do the first thing.",
        "5 attempts in all, the first retry after 2 seconds",
        "on OSError only.",
        "At most 90 seconds an attempt.",
        "In one transaction with its record.",
        "At most 3 flows of it run at once.",
        "not over 2 hours after its moment",
        "is deleted after 90 days.",
        "<code>0 6 * * *</code>",
        "/admin/django_q/schedule/",
        "None of its runs is over yet.",
    ):
        assert expected in text, expected


def test_the_figures_of_a_template_are_those_of_its_last_runs(admin_client: Client) -> None:
    start = timezone.now() - timedelta(hours=2)
    FlowExecution.objects.bulk_create(
        FlowExecution(
            template_name="billing",
            task_names=["first"],
            current_task_index=1,
            status=FlowStatus.FAILED if n % 10 == 0 else FlowStatus.SUCCEEDED,
            run_at=start,
            created_at=start,
            started_at=start,
            finished_at=start + timedelta(seconds=n),
        )
        for n in range(1, 121)
    )
    shown = admin_client.get(f"{TEMPLATES}billing/change/").context["entry"]
    # Of 91 to 120, three failed; the 27 others took 105 s in the median.
    assert shown.success_rate == "90 %"
    assert shown.median == "1 min 45 s"
    assert shown.percentile == "1 min 58 s"
    assert shown.bars.count("<a ") == 30
    newest = FlowExecution.objects.latest("pk")
    assert f'href="{LIST}{newest.pk}/change/"' in shown.bars


def test_pausing_and_resuming(admin_client: Client) -> None:
    address = f"{TEMPLATES}billing/"
    assert admin_client.get(f"{address}pause/").status_code == 405
    response = admin_client.post(f"{address}pause/", follow=True)
    text = response.content.decode()
    assert "no flow of it starts until it is resumed" in text
    assert "by user admin" in text
    flow_runner.schedule_flow("billing")
    assert flow_runner.run_next() is None
    assert "Paused" in page(admin_client, TEMPLATES)
    admin_client.post(f"{address}resume/")
    assert flow_runner.run_next() is not None
    assert logged() == ["Paused", "Resumed"]
    # The log's own link knows the row by its id.
    link = LogEntry.objects.first().get_admin_url()  # type: ignore[union-attr]
    assert "billing" in page(admin_client, link)


def test_a_template_of_any_name_has_its_pages(admin_client: Client) -> None:
    name = "a/b c?d=é_2F&<i>"
    with registered(FlowTemplate(name, tasks=[first])):
        (shown,) = [e for e in admin_client.get(TEMPLATES).context["entries"] if e.name == name]
        assert "<i>" not in page(admin_client, shown.url)
        response = admin_client.post(
            shown.schedule_url, {"context": "", "priority": "0", "key": "", "run_at": ""}
        )
        assert response.status_code == 302
    assert FlowExecution.objects.get().template_name == name
    assert admin_client.get(f"{TEMPLATES}unknown/change/").status_code == 302


# Schedule a run


def test_a_run_for_the_past_is_due_now_and_not_ahead_of_what_waits(admin_client: Client) -> None:
    address = f"{TEMPLATES}billing/schedule/"
    assert "Empty or past: at once." in page(admin_client, address)
    waiting = flow_runner.schedule_flow("billing", {})
    admin_client.post(
        address, {"context": "", "run_at": "2020-01-02T03:04:05", "key": "", "priority": "0"}
    )
    flow = FlowExecution.objects.latest("pk")
    assert flow.pk != waiting.pk
    assert flow.run_at >= waiting.run_at


def test_a_run_is_scheduled_with_a_context_as_json(admin_client: Client) -> None:
    address = f"{TEMPLATES}billing/schedule/"
    response = admin_client.post(
        address,
        {
            "context": '{"price": "1.5"}',
            "run_at": "2030-01-02T03:04:05",
            "key": "once",
            "priority": "7",
        },
    )
    flow = FlowExecution.objects.get()
    assert response["Location"] == f"{LIST}{flow.pk}/change/"
    assert dict(flow.execution_context) == {"price": "1.5"}
    assert (flow.key, flow.priority, flow.created_by) == ("once", 7, "user admin")
    assert flow.run_at == datetime(2030, 1, 2, 2, 4, 5, tzinfo=UTC)
    assert logged() == ["Scheduled"]
    again = admin_client.post(
        address, {"context": "", "key": "once", "priority": "0"}, follow=True
    )
    assert "A flow with the key once is there already" in again.content.decode()
    assert FlowExecution.objects.count() == 1


def test_the_last_runs_context_is_offered_without_its_secrets(admin_client: Client) -> None:
    flow = succeeded(order_id=42, api_key="s3cret", rows=[1])
    ExecutionContextEntry.objects.create(
        flow_execution=flow, name="made", value="1", task_execution=flow.task_executions.first()
    )
    address = f"{TEMPLATES}billing/schedule/"
    assert f"flow #{flow.pk}, was" in page(admin_client, address)
    shown = admin_client.get(address, {"like": flow.pk}).context["form"]
    assert json.loads(shown["context"].value()) == {"order_id": 42, "rows": [1]}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"context": "{]"}, "Invalid JSON"),
        ({"context": '{"a": {"$type": "model", "model": "auth.user", "pk": 99}}'}, "without its"),
        ({"priority": "101"}, "less than or equal to 100"),
        ({"key": " x\ty"}, "give printable characters only"),
        ({"run_at": "tomorrow"}, "Enter a valid date/time."),
    ],
)
def test_nothing_is_scheduled_while_the_form_is_wrong(
    admin_client: Client, fields: dict[str, str], said: str
) -> None:
    given = {"context": '{"kept": 1}', "priority": "0", "key": "", "run_at": "", **fields}
    response = admin_client.post(f"{TEMPLATES}billing/schedule/", given)
    assert response.status_code == 200
    assert said in response.content.decode()
    assert response.context["form"]["context"].value() == given["context"]
    assert not FlowExecution.objects.exists()


def test_a_templates_own_form_asks_for_its_parameters(admin_client: Client) -> None:
    flow_runner._templates.pop("billing")
    with registered(billing(parameters=Order)):
        address = f"{TEMPLATES}billing/schedule/"
        text = page(admin_client, address)
        assert 'name="parameters-order_id"' in text
        assert 'name="context"' not in text
        wrong = admin_client.post(address, {"parameters-order_id": "0", "priority": "0"})
        assert "greater than or equal to 1" in wrong.content.decode()
        assert not FlowExecution.objects.exists()
        admin_client.post(
            address,
            {"parameters-order_id": "42", "parameters-due": "2026-03-04", "priority": "0"},
        )
        flow = FlowExecution.objects.get()
        assert dict(flow.execution_context) == {"order_id": 42, "due": date(2026, 3, 4)}
        offered = admin_client.get(address, {"like": flow.pk}).context["parameters"]
        assert offered["order_id"].value() == 42


def test_a_form_of_references_and_of_derived_data_is_scheduled(
    admin_client: Client, admin_user: User
) -> None:
    class Recipients(forms.Form):
        owner = forms.ModelChoiceField(User.objects.all())
        others = forms.ModelMultipleChoiceField(User.objects.all())
        note = forms.JSONField(required=False)
        title = forms.JSONField()
        starts = forms.SplitDateTimeField()

        def clean(self) -> dict[str, Any]:
            return {**self.cleaned_data, "derived": 1}

    flow_runner._templates.pop("billing")
    with registered(billing(parameters=Recipients)):
        response = admin_client.post(
            f"{TEMPLATES}billing/schedule/",
            {
                "parameters-owner": admin_user.pk,
                "parameters-others": [admin_user.pk],
                "parameters-note": '["text"]',
                "parameters-title": '"a text"',
                "parameters-starts_0": "2026-03-04",
                "parameters-starts_1": "05:06",
                "priority": "0",
            },
        )
    assert response.status_code == 302
    context = FlowExecution.objects.get().execution_context
    assert context["owner"] == admin_user
    assert context["others"] == [admin_user]
    assert context["note"] == ["text"]
    assert (context["title"], type(context["title"])) == ("a text", str)
    assert context["starts"].isoformat() == "2026-03-04T05:06:00+01:00"
    assert context["derived"] == 1


# The overview


def test_the_overview_counts_and_warns_when_nobody_works(
    admin_client: Client, settings: Any
) -> None:
    succeeded()
    failed()
    flow = flow_runner.schedule_flow("billing")
    assert "No worker is running" not in page(admin_client, LIST)
    FlowExecution.objects.filter(pk=flow.pk).update(run_at=timezone.now() - timedelta(minutes=5))
    response = admin_client.get(LIST)
    assert "No worker is running, and a flow has been due for 5 min" in response.content.decode()
    figures = [figure.value for figure in response.context["overview"].figures]
    assert figures[:3] == ["1", "0", "1"]
    assert figures[3].startswith("5 min")
    flow_runner.pause_flow_template("billing")
    assert "No worker is running" not in page(admin_client, LIST)
    flow_runner.resume_flow_template("billing")
    now = timezone.now()
    WorkerProcess.objects.create(name="w:1", started_at=now, seen_at=now)
    text = page(admin_client, LIST)
    assert "No worker is running" not in text
    assert "w:1" in text
    WorkerProcess.objects.update(seen_at=now - timedelta(minutes=2))
    text = page(admin_client, LIST)
    assert "Start one with manage.py qcluster." in text
    # What is gone is no worker.
    assert "w:1" not in text
    assert "No worker at the moment." in text
    settings.EBBS_AND_FLOWS = {"ENGINE": "ebbs_and_flows.engines.foreground.ForegroundEngine"}
    assert "Start one with manage.py runflows --watch." in page(admin_client, LIST)


def test_the_overview_warns_when_free_workers_leave_due_flows(admin_client: Client) -> None:
    flow = flow_runner.schedule_flow("billing")
    now = timezone.now()
    FlowExecution.objects.filter(pk=flow.pk).update(run_at=now - timedelta(minutes=5))
    for name, idle_since in (("w:1", now - timedelta(hours=1)), ("w:2", None)):
        WorkerProcess.objects.create(name=name, started_at=now, seen_at=now, idle_since=idle_since)
    response = admin_client.get(LIST)
    text = response.content.decode()
    assert 'class="ebbs-warning" role="alert">A flow has been due for 5 min' in text
    assert "and 1 free worker does not take it. Restart what runs manage.py qcluster." in text
    assert "2 workers" in text
    assert response.context["overview"].figures[3].tone == "bad"
    WorkerProcess.objects.update(idle_since=None)
    assert "Restart what runs" not in page(admin_client, LIST)


def test_the_overview_warns_when_no_live_worker_has_the_code(admin_client: Client) -> None:
    flow = flow_runner.schedule_flow("billing")
    now = timezone.now()
    FlowExecution.objects.filter(pk=flow.pk).update(run_at=now - timedelta(minutes=5))
    older = ["billing", 1, ["first"]]
    WorkerProcess.objects.create(name="w:1", started_at=now, seen_at=now, templates=[older])
    response = admin_client.get(LIST)
    text = response.content.decode()
    assert 'class="ebbs-warning" role="alert">A flow has been due for 5 min' in text
    assert "and no running worker has the code for it. Restart what runs manage.py" in text
    assert response.context["overview"].figures[3].tone == "bad"
    why = "has &#x27;charge&#x27; as task 1, where template &#x27;billing&#x27;, version 1, has no"
    assert why in page(admin_client, f"{LIST}{flow.pk}/change/")
    now_known = ["billing", 1, ["first", "charge"]]
    WorkerProcess.objects.update(templates=[now_known])
    assert "has the code for it" not in page(admin_client, LIST)
    assert why not in page(admin_client, f"{LIST}{flow.pk}/change/")


def test_the_overview_finds_the_oldest_due_flow_behind_others_of_every_priority(
    admin_client: Client,
) -> None:
    for minutes, priority in ((3, 0), (9, -5), (1, 50)):
        flow = flow_runner.schedule_flow("billing", priority=priority)
        FlowExecution.objects.filter(pk=flow.pk).update(
            run_at=timezone.now() - timedelta(minutes=minutes)
        )
    figure = admin_client.get(LIST).context["overview"].figures[3]
    assert figure.value.startswith("9 min")


def test_the_live_rows_are_those_asked_for(admin_client: Client) -> None:
    flow, other = flow_runner.schedule_flow("billing"), flow_runner.schedule_flow("billing")
    text = page(admin_client, LIST)
    assert f'data-ebbs-refresh="{LIST}live/?id={other.pk}&amp;id={flow.pk}"' in text
    flow_runner.run_flow_execution(flow)
    text = page(admin_client, f"{LIST}live/?id={flow.pk}&id=x&id={'9' * 30}")
    assert f'data-ebbs-live="status_pill-{flow.pk}"' in text
    assert "ebbs-succeeded" in text
    # It is over, so that it is not asked for again.
    assert f'data-ebbs-refresh="{LIST}live/?"' in text


# The number of queries


def test_no_page_asks_more_when_there_is_more(admin_client: Client) -> None:
    flow = failed()
    flow_runner.schedule_flow("billing")
    templates = [FlowTemplate(f"t{n}", tasks=[first, charge]) for n in range(3)]
    addresses = [
        LIST,
        f"{LIST}?q=o",
        f"{LIST}?status=FAILED&template=billing",
        f"{LIST}live/?" + "&".join(f"id={n}" for n in range(100)),
        f"{LIST}{flow.pk}/change/",
        f"{LIST}{flow.pk}/rerun_from/",
        f"{LIST}{flow.pk}/by_hand/",
        TEMPLATES,
        f"{TEMPLATES}billing/change/",
        f"{TEMPLATES}billing/schedule/?like",
        "/admin/ebbs_and_flows/taskexecution/",
        "/admin/ebbs_and_flows/executioncontextentry/",
    ]

    def counted() -> dict[str, int]:
        counts = {}
        for address in addresses:
            with CaptureQueriesContext(connection) as queries:
                assert admin_client.get(address).status_code == 200
            counts[address] = len(queries)
        return counts

    counted()
    few = counted()
    with registered(*templates):
        for each in templates:
            for _ in range(3):
                flow_runner.run_flow_execution(flow_runner.schedule_flow(each.name, {"bad": "x"}))
            flow_runner.schedule_flow(each.name)
        for _ in range(10):
            failed()
            succeeded()
        assert counted() == few
    assert max(few.values()) < 25


# The drawing


def attempt(index: int, number: int, start: float, end: float | None, status: str) -> Any:
    base = datetime(2026, 1, 1, tzinfo=UTC)
    return TaskExecution(
        task_index=index,
        task_name=f"t{index}",
        attempt=number,
        status=status,
        started_at=base + timedelta(seconds=start),
        finished_at=None if end is None else base + timedelta(seconds=end),
    )


def test_the_timeline_draws_attempts_and_waits_to_scale() -> None:
    attempts = [
        attempt(0, 1, 0, 2, "SUCCEEDED"),
        attempt(1, 1, 2, 4, "FAILED"),
        attempt(1, 2, 5, 10, "SUCCEEDED"),
    ]
    now = datetime(2026, 1, 1, tzinfo=UTC)
    axis, rows = timeline_rows(["t0", "t1", "t2"], attempts, now=now, waits_at=None)
    assert axis is not None
    assert [text for _x, text in axis.ticks] == ["2 s", "4 s", "6 s", "8 s", "10 s"]
    assert 'x="0.00%" y="4" width="20.00%"' in rows[0].drawing
    assert 'x="20.00%" y="4" width="20.00%"' in rows[1].drawing
    assert 'class="ebbs-wait" x1="40.00%" x2="50.00%"' in rows[1].drawing
    assert rows[1].words == "Attempt 1: Failed, 2.0 s; Attempt 2: Succeeded, 5.0 s"
    assert rows[1].took == "7.0 s"
    assert rows[2].words == "Not started"


def test_a_running_bar_grows_and_a_wait_of_days_is_drawn_short() -> None:
    day = 86_400.0
    attempts = [attempt(0, 1, 0, 10, "FAILED"), attempt(0, 2, 2 * day, None, "RUNNING")]
    now = datetime(2026, 1, 3, 0, 0, 10, tzinfo=UTC)
    axis, (row,) = timeline_rows(["t0"], attempts, now=now, waits_at=None)
    assert axis is not None
    assert [(gap.left, gap.width) for gap in axis.breaks] == [(45.5, 9.0)]
    assert "⋯ 47 h 59 min" in axis.drawing()
    assert 'ebbs-running" x="54.50%" y="4" width="45.50%"' in row.drawing
    _axis, (longer,) = timeline_rows(
        ["t0"], attempts, now=now + timedelta(seconds=30), waits_at=None
    )
    assert longer.took == "50.0 s"


def test_a_timeline_without_a_length_is_drawn_all_the_same() -> None:
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    axis = Axis([(moment, moment), (moment, moment)])
    assert axis.ticks == []
    assert axis.at(moment) == 0


# Outputs, logs, rules


def test_a_log_is_shown_whatever_is_in_it() -> None:
    good = {
        "at": "2026-01-01T00:00:00+00:00",
        "level": "INFO",
        "logger": "a",
        "message": "b\u2028c",
    }
    lines = log_lines(json.dumps(good, ensure_ascii=False) + '\nno json\n{"at": 7}\n[]\n')
    assert [line.message for line in lines] == ["b\u2028c", "no json", '{"at": 7}', "[]"]
    assert lines[0].at == datetime(2026, 1, 1, tzinfo=UTC)


def test_what_a_task_logged_is_beside_its_output(admin_client: Client) -> None:
    flow = failed()
    line = {"at": "2026-01-01T00:00:00+00:00", "level": "ERROR", "logger": "a.b", "message": "hm"}
    TaskExecution.objects.filter(flow_execution=flow, task_index=1).update(log=json.dumps(line))
    text = page(admin_client, f"{LIST}{flow.pk}/change/")
    assert "ebbs-level-error" in text
    assert '<td class="ebbs-message" dir="auto">hm</td>' in text


def test_progress_counts_only_while_its_attempt_runs(admin_client: Client) -> None:
    flow = failed()
    attempt = TaskExecution.objects.filter(flow_execution=flow).latest("pk")
    TaskExecution.objects.filter(pk=attempt.pk).update(status="RUNNING", finished_at=None)
    report = {"task_execution": attempt.pk, "done": 3, "total": 7, "message": "<b>rows"}
    FlowExecution.objects.filter(pk=flow.pk).update(
        status="RUNNING", finished_at=None, task_progress=json.dumps(report)
    )
    for address in (LIST, f"{LIST}{flow.pk}/change/"):
        assert '<progress max="7" value="3"' in page(admin_client, address)
        assert "<bdi>&lt;b&gt;rows</bdi>" in page(admin_client, address)
    for outdated in ({**report, "task_execution": attempt.pk - 1}, [], {"done": 1}):
        FlowExecution.objects.filter(pk=flow.pk).update(task_progress=json.dumps(outdated))
        assert "rows" not in page(admin_client, LIST)


@pytest.mark.parametrize(
    ("retry", "words"),
    [
        (Retry(attempts=1), "One attempt, no retry."),
        (Retry(attempts=3, delay=0), "3 attempts in all, without a wait."),
        (Retry(attempts=2, delay=60), "2 attempts in all, 60 seconds apart."),
        (
            Retry(attempts=20, delay=300, backoff=3, max_delay=7200, never_on=(KeyError,)),
            (
                "20 attempts in all, the first retry after 5 minutes, each later one after 3 times"
                " as long, at most 2 hours, never on KeyError."
            ),
        ),
    ],
)
def test_retries_in_words(retry: Retry, words: str) -> None:
    assert retry_in_words(retry) == words


# A flow's trace


TRACE = "0af7651916cd43dd8448eb211c80319c"


def traced(flags: str) -> FlowExecution:
    flow = succeeded()
    flow.traceparent = f"00-{TRACE}-b7ad6b7169203331-{flags}"
    flow.save()
    return flow


def test_a_flow_s_trace_is_in_its_head_and_a_link_where_traces_are_shown(
    admin_client: Client, settings: Any
) -> None:
    address = f"{LIST}{traced('01').pk}/change/"
    text = page(admin_client, address)
    assert re.search(rf"<dt>Trace</dt>\s*<dd>\s*<bdi>{TRACE}</bdi>", text)
    settings.EBBS_AND_FLOWS = {"TRACE_URL": 'https://traces.example.com/{trace_id}?a=1&b="'}
    text = page(admin_client, address)
    href = f"https://traces.example.com/{TRACE}?a=1&amp;b=&quot;"
    assert f'<bdi><a href="{href}">{TRACE}</a></bdi>' in text


@pytest.mark.parametrize("flags", ["00", "02"])
def test_a_trace_that_is_not_recorded_is_not_shown(
    admin_client: Client, settings: Any, flags: str
) -> None:
    settings.EBBS_AND_FLOWS = {"TRACE_URL": "https://traces.example.com/{trace_id}"}
    text = page(admin_client, f"{LIST}{traced(flags).pk}/change/")
    assert "<dt>Trace</dt>" not in text
    assert TRACE not in text
