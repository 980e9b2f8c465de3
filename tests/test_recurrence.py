"""Recurring flows: declared in code, fired by django-q2, each due time once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from django import forms
from django.core.checks import run_checks
from django.db import connections
from django.test import Client
from django.utils import timezone
from django_q.models import OrmQ, Schedule
from django_q.scheduler import scheduler

from ebbs_and_flows import (
    DuplicateFlowTemplate,
    FlowRunner,
    FlowTemplate,
    FlowTemplateNotFound,
    InvalidArgument,
    InvalidFlowTemplate,
    InvalidParameters,
    flow_runner,
    task,
)
from ebbs_and_flows.engines.django_q import DjangoQEngine, fire_recurring
from ebbs_and_flows.models import FlowExecution
from ebbs_and_flows.pacemaker import Pacemaker
from ebbs_and_flows.recurrence import MAX_CAUGHT_UP, Recurrence
from ebbs_and_flows.signals import recurrence_refused

from .databases import FLOWS
from .test_cluster import until

pytestmark = pytest.mark.django_db

BERLIN = ZoneInfo("Europe/Berlin")
only = task(name="only")(lambda context: context)


def recurrence(cron: str, *, catch_up: bool = False) -> Recurrence:
    return Recurrence(name="r", template_name="t", cron=cron, catch_up=catch_up)


@pytest.mark.parametrize("cron", ["", "0 6 * *", "0 6 * * * *", "61 * * * *", "@daily", None, 6])
def test_a_bad_cron_expression_is_refused_with_an_example(cron: object) -> None:
    with pytest.raises(InvalidFlowTemplate, match=r"five fields, such as '0 6 \* \* \*'"):
        recurrence(cron)  # type: ignore[arg-type]


def test_six_in_the_morning_stays_six_when_the_clocks_change() -> None:
    at_six = recurrence("0 6 * * *")
    moment = datetime(2026, 3, 27, 12, tzinfo=BERLIN)
    found = []
    for _ in range(3):
        moment = at_six.next_after(moment)
        found.append(moment.astimezone(UTC).isoformat())
    assert found == [
        "2026-03-28T05:00:00+00:00",
        "2026-03-29T04:00:00+00:00",
        "2026-03-30T04:00:00+00:00",
    ]
    autumn = at_six.next_after(datetime(2026, 10, 24, 12, tzinfo=BERLIN))
    assert autumn.astimezone(UTC).isoformat() == "2026-10-25T05:00:00+00:00"


def due_after(cron: str, start: datetime, end: datetime) -> list[datetime]:
    """The due times from one moment to another; the first one at least."""
    found = [recurrence(cron).next_after(start)]
    while (following := recurrence(cron).next_after(found[-1])) <= end:
        found.append(following)
    return found


def due_on(cron: str, start: datetime, number: int) -> list[str]:
    """The due times after a moment, in UTC."""
    found: list[datetime] = []
    for _ in range(number):
        found.append(recurrence(cron).next_after(found[-1] if found else start))
    return [f"{moment.astimezone(UTC):%d %H:%M}" for moment in found]


@pytest.mark.parametrize(
    ("cron", "spring", "autumn"),
    [
        # Two is skipped in spring, and in autumn comes twice: at 00:30 and 01:30 in UTC.
        ("30 2 * * *", ["28 01:30", "29 01:00", "30 00:30"], ["24 00:30", "25 00:30", "26 01:30"]),
        ("0 0 * * *", ["28 23:00", "29 22:00", "30 22:00"], ["24 22:00", "25 23:00", "26 23:00"]),
    ],
)
def test_a_time_of_day_is_due_once_a_day_whatever_the_clocks_do(
    cron: str, spring: list[str], autumn: list[str]
) -> None:
    assert due_on(cron, datetime(2026, 3, 28, 0, 30, tzinfo=BERLIN), 3) == spring
    assert due_on(cron, datetime(2026, 10, 24, 0, 30, tzinfo=BERLIN), 3) == autumn


def test_hours_of_a_day_are_due_once_each_when_one_comes_twice() -> None:
    autumn = due_on("0 1-3 * * *", datetime(2026, 10, 25, 0, 30, tzinfo=BERLIN), 4)
    assert autumn == ["24 23:00", "25 00:00", "25 02:00", "26 00:00"]


def test_what_recurs_by_the_hour_goes_on_through_both_twos() -> None:
    autumn = due_on("0 * * * *", datetime(2026, 10, 25, 1, 30, tzinfo=BERLIN), 3)
    assert autumn == ["25 00:00", "25 01:00", "25 02:00"]
    spring = due_on("*/30 * * * *", datetime(2026, 3, 29, 1, 10, tzinfo=BERLIN), 3)
    assert spring == ["29 00:30", "29 01:00", "29 01:30"]


def test_the_second_two_of_a_day_makes_no_flow_even_if_the_queue_fires_it() -> None:
    daily = recurrence("30 2 * * *", catch_up=True)
    second = datetime(2026, 10, 25, 1, 30, tzinfo=UTC)
    assert list(daily.missed(second, second)) == []
    assert list(daily.missed(second, second + timedelta(days=1))) == [second + timedelta(days=1)]
    hourly = recurrence("30 * * * *")
    assert list(hourly.missed(second, second)) == [second]


def test_missed_times_are_caught_up_or_only_the_latest_is() -> None:
    first, now = datetime(2026, 5, 1, 4, tzinfo=UTC), datetime(2026, 5, 4, 12, tzinfo=UTC)
    assert [moment.day for moment in recurrence("0 6 * * *").missed(first, now)] == [4]
    every = recurrence("0 6 * * *", catch_up=True)
    assert [moment.day for moment in every.missed(first, now)] == [1, 2, 3, 4]
    assert list(every.missed(first, first)) == [first]


@pytest.mark.parametrize("cron", ["* * * * *", "*/7 3-9 * * 1-5", "30 2 * * *", "0 0 1 1 *"])
def test_the_latest_missed_time_is_found_however_many_there_were(cron: str) -> None:
    times = due_after(cron, datetime(2026, 3, 28, tzinfo=UTC), datetime(2026, 4, 2, 9, tzinfo=UTC))
    for now in (times[-1] + timedelta(seconds=1), times[len(times) // 2]):
        (latest,) = recurrence(cron).missed(times[0], now)
        assert latest == max(moment for moment in times if moment <= now)
    many = list(recurrence(cron, catch_up=True).missed(times[0], times[-1]))
    assert many == times[:MAX_CAUGHT_UP]


@pytest.fixture
def declared() -> Iterator[FlowRunner]:
    """The project's own runner, with a recurring template."""
    flow_runner.register_flow_template(FlowTemplate("nightly", tasks=[only], cron="0 6 * * *"))
    yield flow_runner
    flow_runner._templates.pop("nightly")
    flow_runner._recurrences.clear()


def schedules() -> list[tuple[str, str]]:
    return list(Schedule.objects.order_by("name").values_list("name", "cron"))


def test_a_schedule_is_made_once_and_follows_the_code(declared: FlowRunner) -> None:
    declared.sync_recurring()
    declared.sync_recurring()
    assert schedules() == [("flow: nightly", "0 6 * * *")]
    next_run = timezone.localtime(Schedule.objects.get().next_run)
    assert (next_run.hour, next_run.minute) == (6, 0)

    declared._recurrences.clear()
    declared.schedule_recurring("nightly", "30 7 * * *")
    declared.schedule_recurring("nightly", "0 1 1 * *", recurring_name="monthly")
    declared.sync_recurring()
    assert schedules() == [("flow: monthly", "0 1 1 * *"), ("flow: nightly", "30 7 * * *")]

    declared._recurrences.pop("monthly")
    Schedule.objects.create(name="somebody else's", func="math.floor")
    declared.sync_recurring()
    assert {name for name, _ in schedules()} == {"flow: nightly", "somebody else's"}


def test_a_schedule_calls_what_the_code_says_whatever_was_put_in_its_place(
    declared: FlowRunner,
) -> None:
    declared.sync_recurring()
    ours = Schedule.objects.get()
    Schedule.objects.update(func="os.abort", args="('other',)")
    declared.sync_recurring()
    row = Schedule.objects.get()
    assert (row.pk, row.func, row.args) == (ours.pk, ours.func, ours.args)
    Schedule.objects.update(func="os.abort")
    declared._recurrences.clear()
    declared.sync_recurring()
    assert schedules() == []


@pytest.mark.parametrize("kwargs", ["{}", None, "not read", "{'declared': 1}", "a=1", "(" * 500])
def test_only_what_it_has_made_is_changed_or_deleted(
    declared: FlowRunner, kwargs: str | None
) -> None:
    for name in ("flow: nightly", "flow: rates", "flow: "):
        Schedule.objects.create(name=name, func="math.floor", args="(1,)", kwargs=kwargs)
    theirs = list(Schedule.objects.order_by("pk").values())
    declared.sync_recurring()
    declared.sync_recurring()
    made = Schedule.objects.exclude(func="math.floor").get()
    assert made.name == "flow: nightly"
    assert DjangoQEngine().schedules()["nightly"].pk == made.pk
    assert set(DjangoQEngine().schedules()) == {"nightly"}
    declared._recurrences.clear()
    declared.sync_recurring()
    assert list(Schedule.objects.order_by("pk").values()) == theirs


def test_what_an_operator_changed_stays_until_the_code_changes(declared: FlowRunner) -> None:
    declared.sync_recurring()
    Schedule.objects.update(cron="0 9 * * *")
    declared.sync_recurring()
    assert schedules() == [("flow: nightly", "0 9 * * *")]


def test_a_schedule_that_two_clusters_made_is_one_again(declared: FlowRunner) -> None:
    declared.sync_recurring()
    twin = Schedule.objects.get()
    twin.pk = None
    twin.save(force_insert=True)
    declared.sync_recurring()
    assert Schedule.objects.count() == 1


@pytest.mark.django_db(transaction=True)
def test_what_a_worker_with_older_code_has_put_back_is_mended(
    declared: FlowRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ebbs_and_flows.pacemaker.SYNC_SECONDS", 0.1)
    with Pacemaker(declared):
        until(lambda: schedules() == [("flow: nightly", "0 6 * * *")], "the schedule")
        FlowRunner().sync_recurring()
        until(lambda: schedules() == [("flow: nightly", "0 6 * * *")], "the schedule")


# django-q2's scheduler closes the connections that it finds.
@pytest.mark.django_db(transaction=True)
def test_django_q2_fires_it_and_twice_the_same_time_makes_one_flow(declared: FlowRunner) -> None:
    declared.sync_recurring()
    intended = timezone.now().replace(microsecond=0) - timedelta(minutes=5)
    for _ in range(2):
        Schedule.objects.update(next_run=intended)
        scheduler()
    messages = [row.task for row in OrmQ.objects.all()]
    assert len(messages) == 2
    for message in messages:
        assert message["func"] == "ebbs_and_flows.engines.django_q.fire_recurring"
        assert message["save"] is False
        fire_recurring(*message["args"], **message["kwargs"])
    flow = FlowExecution.objects.get()
    assert flow.template_name == "nightly"
    assert flow.key == f"nightly {intended:%Y-%m-%dT%H:%MZ}"
    assert Schedule.objects.get().next_run > timezone.now()


@pytest.mark.django_db(transaction=True)
def test_two_clusters_that_fire_one_time_at_once_make_one_flow(declared: FlowRunner) -> None:
    intended = timezone.now().replace(second=0, microsecond=0)
    made: list[int] = []
    barrier = threading.Barrier(4)

    def fire() -> None:
        try:
            barrier.wait(10)
            made.extend(flow.pk for flow in declared.fire_recurring("nightly", intended))
        finally:
            connections.close_all()

    threads = [threading.Thread(target=fire) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [FlowExecution.objects.get().pk] * 4
    assert FlowExecution.objects.get().transitions.count() == 2


def test_a_recurring_flow_has_its_context_and_priority(declared: FlowRunner) -> None:
    declared.schedule_recurring(
        "nightly", "0 7 * * *", recurring_name="eu", context={"region": "eu"}, priority=5
    )
    (flow,) = declared.fire_recurring("eu", timezone.now())
    assert dict(flow.execution_context) == {"region": "eu"}
    assert (flow.priority, flow.created_by) == (5, "recurring")


def test_a_time_of_what_the_code_has_dropped_makes_nothing(declared: FlowRunner) -> None:
    assert declared.fire_recurring("dropped", timezone.now()) == []
    assert not FlowExecution.objects.exists()


def test_bad_declarations_are_refused(runner: FlowRunner) -> None:
    with pytest.raises(InvalidFlowTemplate, match="cron"):
        FlowTemplate("t", tasks=[only], cron="daily")
    with pytest.raises(FlowTemplateNotFound):
        runner.schedule_recurring("unknown", "0 6 * * *")
    runner.register_flow_template(FlowTemplate("t", tasks=[only], cron="0 6 * * *"))
    with pytest.raises(DuplicateFlowTemplate, match="'t' is declared already"):
        runner.schedule_recurring("t", "0 7 * * *")
    with pytest.raises(InvalidArgument, match="priority"):
        runner.schedule_recurring("t", "0 7 * * *", recurring_name="u", priority=1000)
    for name in ("u" * 81, "", " u", "u\n", "u\tv"):
        with pytest.raises(InvalidFlowTemplate, match="1 to 80 printable"):
            runner.schedule_recurring("t", "0 7 * * *", recurring_name=name)


# What can never be, or is refused


@pytest.mark.parametrize(
    "cron", ["0 0 31 4 *", "0 0 30 2 *", "0 0 31 2,4,6,9,11 *", "0 0 5 2 mon#5"]
)
def test_a_cron_that_no_date_fits_is_refused_where_it_is_declared(
    runner: FlowRunner, cron: str
) -> None:
    with pytest.raises(InvalidFlowTemplate, match="no date ever fits it"):
        FlowTemplate("t", cron=cron)
    runner.register_flow_template(FlowTemplate("t", tasks=[only]))
    with pytest.raises(InvalidFlowTemplate, match="give a day that exists"):
        runner.schedule_recurring("t", cron)
    assert runner.recurrences == {}


@pytest.mark.parametrize("cron", ["R * * * *", "H * * * *", "0 0 " + "1," * 50 + "1 * *"])
def test_a_cron_that_each_process_would_read_otherwise_is_refused(cron: str) -> None:
    with pytest.raises(InvalidFlowTemplate, match="give five fields"):
        recurrence(cron)


def test_a_leap_day_is_a_date() -> None:
    assert recurrence("0 0 29 2 *").next_after(datetime(2026, 3, 1, tzinfo=UTC)).year == 2028


def test_a_schedule_that_was_edited_to_a_time_that_never_comes_is_put_back(
    runner: FlowRunner, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("good", "edited"):
        runner.register_flow_template(FlowTemplate(name, tasks=[only], cron="0 6 * * *"))
    runner.sync_recurring()
    edited = Schedule.objects.filter(name="flow: edited")
    edited.update(cron="0 0 30 2 *")
    runner.sync_recurring()
    assert edited.get().cron == "0 6 * * *"
    (said,) = [message for message in caplog.messages if "'edited' was changed" in message]
    assert "'0 0 30 2 *', which never comes" in said
    edited.update(cron="0 7 * * *")
    runner.sync_recurring()
    assert edited.get().cron == "0 7 * * *"


class NeedsRegion(forms.Form):
    region = forms.CharField()


class AsksDatabase(forms.Form):
    def clean(self) -> dict[str, Any]:
        if not FlowExecution.objects.filter(pk=0).exists():
            raise forms.ValidationError("there is no flow 0")
        return {}


@pytest.fixture
def refused() -> Iterator[str]:
    """The name of a recurring flow whose template's form refuses its context."""
    template = FlowTemplate("refused", tasks=[only], cron="0 6 * * *", parameters=NeedsRegion)
    flow_runner.register_flow_template(template)
    yield "refused"
    flow_runner._templates.pop("refused")
    flow_runner._recurrences.pop("refused")


def test_a_refused_due_time_is_one_log_entry_a_signal_each_and_shown(
    refused: str, caplog: pytest.LogCaptureFixture, admin_client: Client
) -> None:
    heard: list[tuple[datetime, bool]] = []

    def hear(sender: type, **named: Any) -> None:
        assert (sender, named["recurrence"].name) == (Recurrence, refused)
        assert isinstance(named["error"], InvalidParameters)
        heard.append((named["intended_at"], named["is_first"]))

    due = timezone.now() - timedelta(minutes=5)
    recurrence_refused.connect(hear)
    try:
        for number in range(3):
            fire_recurring(refused, intended_at=(due + timedelta(minutes=number)).isoformat())
    finally:
        recurrence_refused.disconnect(hear)
    entries = [record for record in caplog.records if "could not be scheduled" in record.message]
    assert [record.levelname for record in entries] == ["ERROR"]
    assert heard == [(due + timedelta(minutes=n), n == 0) for n in range(3)]
    assert not FlowExecution.objects.exists()
    address = "/admin/ebbs_and_flows/flowtemplatestate/refused/change/"
    shown = admin_client.get(address).content.decode()
    assert "Last firing refused, for" in shown
    assert "region: This field is required." in shown
    # Once it makes a flow again, nothing of it is left.
    flow_runner.templates[refused].parameters = None
    fire_recurring(refused, intended_at=due.isoformat())
    assert FlowExecution.objects.count() == 1
    assert "Last firing refused" not in admin_client.get(address).content.decode()


def test_a_check_finds_a_context_that_its_form_refuses(refused: str) -> None:
    (found,) = [item for item in run_checks() if item.id == "ebbs_and_flows.W021"]
    assert "The recurring flow 'refused' is refused each time" in found.msg
    template = flow_runner.templates[refused]
    template.parameters = None
    assert "ebbs_and_flows.W021" not in {item.id for item in run_checks()}
    # One that asks the database is tried only where the checks may.
    template.parameters = AsksDatabase
    assert "ebbs_and_flows.W021" not in {item.id for item in run_checks()}
    found_there = {item.id for item in run_checks(databases=[FLOWS])}
    assert "ebbs_and_flows.W021" in found_there
