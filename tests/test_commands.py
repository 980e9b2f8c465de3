"""The commands, called in this process: what they do, say and refuse."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.utils import timezone
from django_q.models import OrmQ

from ebbs_and_flows import FlowStatus, RetryLater, flow_runner
from ebbs_and_flows.management.arguments import duration, entries, moment
from ebbs_and_flows.models import (
    ExecutionContextEntry,
    FlowExecution,
    FlowTransition,
    TaskExecution,
)
from ebbs_and_flows.testing import fail_task, move_clock

from .databases import connection

pytestmark = pytest.mark.django_db


def run(*arguments: str, code: int = 0) -> str:
    out = StringIO()
    if code:
        with pytest.raises(SystemExit, match=str(code)):
            call_command(*arguments, stdout=out)
    else:
        call_command(*arguments, stdout=out)
    return out.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return f"folder={tmp_path}"


def test_scheduleflow_reads_json_and_text(folder: str) -> None:
    said = run(
        "scheduleflow", "shop-quick", "--entry", folder, "--entry", "n=42", "--entry", 't="42"',
        "--entry", "free=a=b c", "--entry", "none=null", "--entry", "odd=NaN", "--priority", "7",
        "--key", "k",
    )  # fmt: skip
    flow = FlowExecution.objects.get()
    assert f"Flow {flow.pk} of template shop-quick is scheduled for " in said
    context = dict(flow.execution_context)
    context.pop("folder")
    assert context == {"n": 42, "t": "42", "free": "a=b c", "none": None, "odd": "NaN"}
    assert (flow.priority, flow.key) == (7, "k")
    assert flow.created_by
    again = run("scheduleflow", "shop-quick", "--key", "k")
    assert f"Flow {flow.pk} of template shop-quick was there already, with the key 'k'" in again
    assert FlowExecution.objects.count() == 1


def test_scheduleflow_takes_a_moment(folder: str) -> None:
    run("scheduleflow", "shop-quick", "--at", "2030-07-01T06:00", "--entry", folder)
    flow = FlowExecution.objects.get()
    # Berlin's summer time.
    assert flow.run_at.isoformat() == "2030-07-01T04:00:00+00:00"
    assert "No flow was due." in run("runflows")
    assert "1 waits for later." in run("runflows")


def test_runflows_runs_what_is_due_and_sums_up(folder: str) -> None:
    for _ in range(2):
        run("scheduleflow", "shop-quick", "--entry", folder)
    said = run("runflows")
    assert said.count("shop-quick #") == 2
    assert "SUCCEEDED (2 of 2 tasks)" in said
    assert "2 flows ran: 2 succeeded." in said
    assert "No flow was due." in run("runflows")


def test_runflows_exits_with_1_when_a_flow_failed(folder: str) -> None:
    run("scheduleflow", "shop-quick", "--entry", folder)
    run("scheduleflow", "shop-fails")
    said = run("runflows", code=1)
    assert "FAILED (0 of 1 tasks)" in said
    assert "fail: ValueError: the card is bad" in said
    failed = FlowExecution.objects.get(status=FlowStatus.FAILED)
    assert f"2 flows ran: 1 succeeded, 1 failed (shop-fails #{failed.pk})." in said


def test_runflows_narrows_by_template_status_and_limit(folder: str) -> None:
    run("scheduleflow", "shop-fails")
    for _ in range(3):
        run("scheduleflow", "shop-quick", "--entry", folder)
    assert "2 flows ran" in run("runflows", "--template", "shop-quick", "--limit", "2")
    assert "No flow was due" in run("runflows", "--status", "rescheduled")
    assert "1 flow ran: 1 failed" in run("runflows", "--template", "shop-fails", code=1)
    run("rerunflow", "--failed")
    assert "1 flow ran" in run("runflows", "--status", "scheduled")
    assert "1 flow ran: 1 failed" in run("runflows", "--status", "rescheduled", code=1)


def test_runflows_json_is_an_object_a_line(folder: str) -> None:
    run("scheduleflow", "shop-quick", "--entry", folder, "--key", "k")
    run("scheduleflow", "shop-fails")
    lines = [json.loads(line) for line in run("runflows", "--json", code=1).splitlines()]
    assert [line.get("status") for line in lines] == ["SUCCEEDED", "FAILED", None]
    assert lines[0]["key"] == "k"
    assert lines[1]["failed_task"] == "fail"
    assert lines[2] == {
        "flows": 2,
        "succeeded": 1,
        "failed": 1,
        "retried_later": 0,
        "cancelled": 0,
        "handed_back": 0,
        "waiting_for_later": 0,
        "not_registered": {},
        "left_to_other_code": {},
    }


def test_showflows_lists_and_details_without_values(
    folder: str, django_assert_max_num_queries: Any
) -> None:
    run("scheduleflow", "shop-fails", "--entry", "secret=tell-nobody")
    run("scheduleflow", "shop-quick", "--entry", folder)
    run("runflows", code=1)
    with django_assert_max_num_queries(2, connection=connection):
        listed = run("showflows")
    assert "ValueError: the card is bad" in listed
    assert listed.index("shop-quick") < listed.index("shop-fails")
    assert "shop-quick" not in run("showflows", "--status", "failed")
    assert "no such flows" in run("showflows", "--template", "shop-waits")
    failed = FlowExecution.objects.get(status=FlowStatus.FAILED)
    detail = run("showflows", str(failed.pk))
    assert "Traceback" in detail
    assert "Entries: secret." in detail
    assert "tell-nobody" not in detail
    assert json.loads(run("showflows", str(failed.pk), "--json"))["id"] == failed.pk


def test_showflows_says_what_it_is_a_rerun_of_and_was_rerun_as(folder: str) -> None:
    run("scheduleflow", "shop-quick", "--entry", folder)
    run("runflows")
    flow = FlowExecution.objects.get()
    run("rerunflow", str(flow.pk))
    run("rerunflow", str(flow.pk))
    first, second = FlowExecution.objects.filter(rerun_of=flow).order_by("pk")
    assert f"\nRerun as #{first.pk}, #{second.pk}.\n" in run("showflows", str(flow.pk))
    shown = run("showflows", str(first.pk))
    assert f"\nRerun of #{flow.pk}.\n" in shown
    assert "Rerun as" not in shown
    said = json.loads(run("showflows", str(flow.pk), "--json"))
    assert (said["rerun_of"], said["reruns"]) == (None, [first.pk, second.pk])
    assert json.loads(run("showflows", str(first.pk), "--json"))["rerun_of"] == flow.pk


def test_a_flow_that_waits_as_its_task_asked_to_is_told_of_as_no_error(folder: str) -> None:
    later = RetryLater(3600, "The parcel is on its way.")
    with fail_task("shop-quick", "last", later):
        run("scheduleflow", "shop-quick", "--entry", folder)
        said = run("runflows")
    flow = FlowExecution.objects.get()
    assert ": last waits: The parcel is on its way.\n" in said
    assert run("showflows").endswith("  last waits: The parcel is on its way.\n")
    listed = json.loads(run("showflows", "--json"))
    assert (listed["waits"], listed["error"], listed["failed_task"]) == (
        "last waits: The parcel is on its way.", None, None,
    )  # fmt: skip
    detail = run("showflows", str(flow.pk))
    assert "Traceback" not in detail
    assert "RetryLater" not in detail


@contextmanager
def unknown(*templates: str) -> Iterator[None]:
    """Have this process not know the templates, as one with other code does not."""
    known = {name: flow_runner._templates.pop(name) for name in templates}
    try:
        yield
    finally:
        flow_runner._templates.update(known)


def test_flows_of_a_template_that_is_not_registered_are_told_of(
    folder: str, django_assert_max_num_queries: Any
) -> None:
    for _ in range(2):
        run("scheduleflow", "shop-quick", "--entry", folder)
    run("scheduleflow", "shop-waits", "--at", "+2h")
    run("scheduleflow", "shop-fails")
    run("runflows", "--template", "shop-fails", code=1)
    flow = FlowExecution.objects.filter(template_name="shop-quick").earliest("pk")
    two = "2 flows wait for template 'shop-quick', which is not registered here.\n"
    one = "1 flow waits for template 'shop-waits', which is not registered here.\n"
    assert "registered" not in run("runflows", "--template", "shop-fails")
    assert "registered" not in run("showflows")
    with unknown("shop-quick", "shop-waits", "shop-fails"):
        # What has failed waits for nobody.
        assert run("runflows") == f"No flow was due.\n{two}{one}"
        assert "registered" not in run("runflows", "--status", "rescheduled")
        counts = {"shop-quick": 2, "shop-waits": 1}
        assert json.loads(run("runflows", "--json"))["not_registered"] == counts
        with django_assert_max_num_queries(4):
            assert run("showflows").endswith(f"\n{two}{one}")
        assert run("showflows", "--template", "shop-waits").endswith(f"\n{one}")
        waits = "\nIt waits for template 'shop-quick', which is not registered here.\n"
        assert waits in run("showflows", str(flow.pk))
        assert run("checkflows").endswith(f"4 flows were checked: nothing found.\n{two}{one}")
        assert json.loads(run("checkflows", "--json"))["not_registered"] == counts
    assert "registered" not in run("showflows", str(flow.pk))


MOMENT = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d CES?T"


def test_times_have_one_form_everywhere(folder: str) -> None:
    said = run("scheduleflow", "shop-fails", "--at", "2030-10-27T02:30+01:00")
    # This hour comes twice in Berlin.
    assert said.strip().endswith("is scheduled for 2030-10-27 02:30:00 CET.")
    run("scheduleflow", "shop-quick", "--entry", folder)
    took = r"(< 1|\d+) ms"
    assert re.search(rf"SUCCEEDED \(2 of 2 tasks\) in {took}\n", run("runflows"))
    assert re.search(rf"2 of 2  {MOMENT}  {MOMENT}  {took}\n", run("showflows"))
    done = FlowExecution.objects.get(status=FlowStatus.SUCCEEDED)
    assert re.search(rf"SUCCEEDED  {MOMENT}  {took}\n", run("showflows", str(done.pk)))


def test_showflows_tells_the_days_that_a_flow_lay_failed_from_its_work(folder: str) -> None:
    with fail_task("shop-quick", "last"):
        run("scheduleflow", "shop-quick", "--entry", folder)
        run("runflows", code=1)
    flow = FlowExecution.objects.get()
    assert "At work" not in run("showflows", str(flow.pk))
    move_clock(timedelta(days=3))
    run("rerunflow", str(flow.pk))
    run("runflows")
    shown = run("showflows", str(flow.pk))
    assert re.search(r"At work for \d+ ms of the 3 d 0 h that it took\.\n", shown)


def test_rerunflow_continues_what_failed_and_forks_what_succeeded(folder: str) -> None:
    run("scheduleflow", "shop-fails")
    run("scheduleflow", "shop-quick", "--entry", folder)
    run("runflows", code=1)
    failed = FlowExecution.objects.get(status=FlowStatus.FAILED)
    done = FlowExecution.objects.get(status=FlowStatus.SUCCEEDED)
    assert "continues at task 'fail'" in run("rerunflow", str(failed.pk))
    would = run("rerunflow", str(done.pk), "--dry-run")
    assert would == f"shop-quick #{done.pk} had succeeded: it would run again from the start.\n"
    said = run("rerunflow", str(done.pk))
    again = FlowExecution.objects.latest("pk")
    assert said == (
        f"shop-quick #{done.pk} had succeeded: it runs again from the start, as {again}.\n"
    )
    flow_runner.cancel_flow_execution(again)
    assert f"{again} had been cancelled: it runs again" in run("rerunflow", str(again.pk))
    said = run("rerunflow", str(done.pk), "--from-task", "last", "--entry", "extra=1")
    assert f"a rerun of shop-quick #{done.pk} from task 'last'" in said
    fork = FlowExecution.objects.latest("pk")
    assert fork.rerun_of_id == done.pk
    assert fork.first_task_index == 1
    assert fork.execution_context["extra"] == 1


def test_a_dry_run_of_rerunflow_changes_and_enqueues_nothing(folder: str) -> None:
    run("scheduleflow", "shop-fails")
    run("scheduleflow", "shop-quick", "--entry", folder)
    run("runflows", code=1)
    models = (FlowExecution, TaskExecution, ExecutionContextEntry, FlowTransition, OrmQ)
    before = [list(model.objects.order_by("pk").values()) for model in models]
    ids = [str(pk) for pk in FlowExecution.objects.order_by("pk").values_list("pk", flat=True)]
    assert "would continue at task 'fail'" in run("rerunflow", *ids, "--dry-run")
    assert "1 flow would be rescheduled" in run("rerunflow", "--failed", "--dry-run")
    assert [list(model.objects.order_by("pk").values()) for model in models] == before


def test_rerunflow_failed_takes_them_all_or_by_template_and_time(folder: str) -> None:
    for _ in range(3):
        run("scheduleflow", "shop-fails")
    run("runflows", code=1)
    assert "0 flows were rescheduled" in run("rerunflow", "--failed", "--template", "shop-quick")
    old = FlowExecution.objects.order_by("pk").first()
    assert old is not None
    FlowExecution.objects.filter(pk=old.pk).update(finished_at=timezone.now() - timedelta(days=9))
    assert "2 flows were rescheduled" in run("rerunflow", "--failed", "--since", "1d")
    assert "1 flow was rescheduled" in run("rerunflow", "--failed")


def test_rerunflow_failed_leaves_alone_what_a_rerun_made_good(folder: str) -> None:
    run("scheduleflow", "shop-fails")
    run("scheduleflow", "shop-fails")
    run("runflows", code=1)
    first, second = FlowExecution.objects.order_by("pk")
    fork = flow_runner.fork_flow_execution(first)
    FlowExecution.objects.filter(pk=fork.pk).update(status=FlowStatus.SUCCEEDED, ready_rank=None)
    assert "1 flow was rescheduled" in run("rerunflow", "--failed")
    second.refresh_from_db()
    assert second.status == FlowStatus.RESCHEDULED


def test_runflows_says_what_a_pause_holds_back(folder: str) -> None:
    run("scheduleflow", "shop-quick", "--entry", folder)
    flow_runner.pause_flow_template("shop-quick")
    assert "1 flow waits because the template shop-quick is paused." in run("runflows")
    assert "paused" not in run("runflows", "--template", "shop-fails")


def test_pruneflows_leaves_what_failed_unless_asked(folder: str) -> None:
    run("scheduleflow", "shop-fails")
    run("scheduleflow", "shop-quick", "--entry", folder)
    run("runflows", code=1)
    FlowExecution.objects.update(finished_at=timezone.now() - timedelta(days=91))
    assert "1 flow would be deleted" in run("pruneflows", "--older-than", "90d", "--dry-run")
    assert "1 flow was deleted" in run("pruneflows", "--older-than", "90d")
    assert "0 flows were deleted" in run("pruneflows", "--older-than", "92d", "--status", "failed")
    assert "1 flow was" in run("pruneflows", "--older-than", "90d", "--status", "failed")
    assert not TaskExecution.objects.exists()


BAD = [
    (["runflows", "--template", "unknown"], "'unknown'"),
    (["runflows", "--limit", "0"], "--limit 0"),
    (["runflows", "--workers", "-1"], "--workers -1"),
    (["runflows", "--workers", "x"], "'x'"),
    (["runflows", "--status", "failed"], "'failed'"),
    (["scheduleflow", "unknown"], "the registered ones are"),
    (["scheduleflow", "shop-quick", "--entry", "novalue"], "'novalue'"),
    (["scheduleflow", "shop-quick", "--entry", "=1"], "name=value"),
    (["scheduleflow", "shop-quick", "--entry", "a=1", "--entry", "a=2"], "'a' is given twice"),
    (["scheduleflow", "shop-quick", "--entry", " a=1"], "' a'"),
    (["scheduleflow", "shop-quick", "--entry", f"a={'x' * 2**20}"], "MAX_ENTRY_BYTES"),
    (["scheduleflow", "shop-quick", "--at", "noon"], "'noon'"),
    (["scheduleflow", "shop-quick", "--at", "2026-13-01"], "'2026-13-01'"),
    (["scheduleflow", "shop-quick", "--at", "999999999d"], "999999999d"),
    (["scheduleflow", "shop-quick", "--at", "0001-01-01"], "calendar|year"),
    (["scheduleflow", "shop-quick", "--priority", "101"], "101"),
    (["scheduleflow", "shop-quick", "--key", ""], "''"),
    (["showflows", "--limit", "0"], "--limit 0"),
    (["showflows", "--template", "unknown"], "'unknown'"),
    (["showflows", "999999"], "999999"),
    (["showflows", "x"], "'x'"),
    (["showflows", "9" * 5000], "no id"),
    (["rerunflow"], "--failed"),
    (["rerunflow", "FIRST", "--failed"], "--failed"),
    (["rerunflow", "--failed", "--entry", "a=1"], "--entry"),
    (["rerunflow", "--failed", "--since", "tuesday"], "'tuesday'"),
    (["rerunflow", "--failed", "--template", "unknown"], "'unknown'"),
    (["rerunflow", "FIRST", "--since", "1d"], "--since"),
    (["rerunflow", "999999"], "999999"),
    (["rerunflow", "FIRST", "999999"], "999999"),
    (["rerunflow", "FIRST", "--from-task", "unknown"], "'unknown'"),
    (["rerunflow", "FIRST", "--from-task", "9"], "9"),
    (["rerunflow", "SECOND"], "it waits for a worker already"),
    (["pruneflows"], "--older-than"),
    (["pruneflows", "--older-than", "ninety"], "'ninety'"),
    (["pruneflows", "--older-than", "90d", "--batch-size", "0"], "--batch-size 0"),
    (["pruneflows", "--older-than", "90d", "--status", "running"], "'running'"),
]


@pytest.mark.parametrize(("arguments", "says"), BAD, ids=lambda value: " ".join(value)[:50])
def test_bad_arguments_are_one_sentence_and_change_nothing(
    arguments: list[str], says: str, folder: str
) -> None:
    first = flow_runner.schedule_flow("shop-fails")
    flow_runner.run_flow_execution(first)
    second = flow_runner.schedule_flow("shop-quick", {"a": 1})
    names = {"FIRST": str(first.pk), "SECOND": str(second.pk)}
    models = (FlowExecution, TaskExecution, ExecutionContextEntry, FlowTransition, OrmQ)
    before = [list(model.objects.order_by("pk").values()) for model in models]
    with pytest.raises(CommandError, match=says) as caught:
        call_command(*[names.get(item, item) for item in arguments], stdout=StringIO())
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert [list(model.objects.order_by("pk").values()) for model in models] == before


def test_a_huge_age_deletes_nothing() -> None:
    assert "0 flows were deleted" in run("pruneflows", "--older-than", "9999999d")


def test_durations_and_moments() -> None:
    assert duration("x", "90d") == timedelta(days=90)
    assert duration("x", "2w") == timedelta(weeks=2)
    assert entries(None) == {}
    ahead = moment("x", "+2h") - timezone.now()
    assert timedelta(minutes=119) < ahead <= timedelta(hours=2)
    assert moment("x", "2026-12-31").isoformat() == "2026-12-30T23:00:00+00:00"
    assert moment("x", "2026-12-31T06:00Z").utcoffset() == timedelta(0)
