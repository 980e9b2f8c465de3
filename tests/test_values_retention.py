"""The values of old flows are deleted, and their history stays; failed flows have a time too."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.test import Client
from django.test.utils import CaptureQueriesContext

from ebbs_and_flows import FlowRunner, FlowStatus, ValuesDeleted, flow_runner
from ebbs_and_flows.integrity import IntegrityCheck
from ebbs_and_flows.models import (
    ExecutionContextEntry,
    FlowExecution,
    FlowTransition,
    PacemakerBeat,
    TaskExecution,
)
from ebbs_and_flows.testing import move_clock

from .databases import connection
from .operators import LIST, billing, failed, page, registered, succeeded, user_with
from .test_commands import run

pytestmark = pytest.mark.django_db

JANE = "jane@example.com"
DAYS = timedelta(days=40)


@pytest.fixture(autouse=True)
def template() -> Any:
    with registered(billing()):
        yield


@pytest.fixture
def old() -> tuple[FlowExecution, FlowExecution, FlowExecution]:
    """One that succeeded, one that was cancelled and one that failed, forty days ago."""
    flows = (
        succeeded(customer=JANE),
        flow_runner.cancel_flow_execution(flow_runner.schedule_flow("billing", {"who": JANE})),
        failed(JANE),
    )
    TaskExecution.objects.update(log=f'{{"message": "{JANE}"}}')
    move_clock(DAYS, runner=flow_runner)
    return tuple(flow_runner.service.get_flow_execution(flow) for flow in flows)  # type: ignore[return-value]


def everything_stored() -> str:
    """Return all texts of all tables of flows."""
    tables = (FlowExecution, TaskExecution, ExecutionContextEntry, FlowTransition)
    return repr([list(table.objects.values()) for table in tables])


def prune() -> bool:
    PacemakerBeat.objects.all().delete()
    return flow_runner.prune_kept()


def has_values(flow: FlowExecution) -> bool:
    again = flow_runner.service.get_flow_execution(flow)
    found = ExecutionContextEntry.objects.filter(flow_execution=flow).exists()
    assert found is (again.values_deleted_at is None)
    return found


def test_pruneflows_deletes_the_values_and_keeps_the_history(old: Any) -> None:
    good, cancelled, bad = old
    recent = succeeded(customer="joe")
    attempts = list(TaskExecution.objects.order_by("pk").values("pk", "task_name", "status"))
    transitions = list(FlowTransition.objects.order_by("pk").values())
    said = run("pruneflows", "--values-older-than", "30d", "--dry-run")
    assert said == "The values of 2 flows would be deleted.\n"
    assert has_values(good)
    said = run("pruneflows", "--values-older-than", "30d", "--batch-size", "1")
    assert said == "The values of 2 flows were deleted.\n"
    assert [has_values(flow) for flow in (good, cancelled, bad, recent)] == [
        False, False, True, True,
    ]  # fmt: skip
    assert attempts == list(
        TaskExecution.objects.order_by("pk").values("pk", "task_name", "status")
    )
    assert transitions == list(FlowTransition.objects.order_by("pk").values())
    assert run("pruneflows", "--values-older-than", "30d") == (
        "The values of 0 flows were deleted.\n"
    )
    said = run("pruneflows", "--values-older-than", "30d", "--status", "failed")
    assert said == "The values of 1 flow were deleted.\n"
    assert JANE not in everything_stored()
    assert TaskExecution.objects.get(flow_execution=bad, status="FAILED").error_type == (
        "ValueError"
    )
    assert list(IntegrityCheck().findings()) == []


def test_pruneflows_takes_one_of_the_two_durations(old: Any) -> None:
    for arguments in ([], ["--older-than", "30d", "--values-older-than", "30d"]):
        with pytest.raises(CommandError, match="either --older-than or --values-older-than"):
            call_command("pruneflows", *arguments)
    run("pruneflows", "--values-older-than", "30d", "--template", "billing")
    assert not has_values(old[0])
    with pytest.raises(CommandError, match="no duration"):
        call_command("pruneflows", "--values-older-than", "soon")


def refused(old: Any) -> dict[str, Callable[[], Any]]:
    good, _cancelled, bad = old
    return {
        "reschedule": lambda: flow_runner.reschedule_flow_execution(bad),
        "fork": lambda: flow_runner.fork_flow_execution(good),
        "fork the failed": lambda: flow_runner.fork_flow_execution(bad, from_task="charge"),
        "by hand": lambda: flow_runner.complete_failed_task(bad, {"n": 1}, reason="by phone"),
        "status": lambda: flow_runner.service.update_flow_status(bad, FlowStatus.RESCHEDULED),
    }


def test_a_flow_without_its_values_cannot_go_on_or_run_again(old: Any) -> None:
    flow_runner.service.delete_values(timedelta(days=30), statuses=FlowStatus)
    before = FlowExecution.objects.count()
    for what, act in refused(old).items():
        with pytest.raises(ValuesDeleted, match=r"The values of flow \d+ were deleted") as error:
            act()
        assert "schedule a new flow" in str(error.value), what
    assert flow_runner.reschedule_flow_executions([old[2].pk]) == []
    with pytest.raises(CommandError, match="values of flow"):
        call_command("rerunflow", str(old[0].pk))
    assert run("rerunflow", "--failed") == "0 flows were rescheduled.\n"
    assert FlowExecution.objects.count() == before
    # Cancelling it needs none.
    assert flow_runner.cancel_flow_execution(old[2]).status == "CANCELLED"


def test_a_rerun_of_a_flow_whose_values_are_deleted_meanwhile_is_refused(old: Any) -> None:
    good = old[0]
    run("pruneflows", "--values-older-than", "30d")
    # Read before: it does not know.
    assert good.values_deleted_at is None
    template = flow_runner.get_flow_template("billing")
    with pytest.raises(ValuesDeleted):
        flow_runner.service.fork(template, good, from_task=0)
    assert not FlowExecution.objects.filter(rerun_of=good).exists()


def test_the_admin_says_so_and_offers_nothing_that_needs_them(
    admin_client: Client, old: Any
) -> None:
    good, _cancelled, bad = old
    flow_runner.service.delete_values(timedelta(days=30), statuses=FlowStatus)
    for flow in (good, bad):
        text = page(admin_client, f"{LIST}{flow.pk}/change/")
        assert "The values of this flow were deleted" in text
        assert "/rerun_from/" not in text
        assert "/by_hand/" not in text
        assert "/reschedule/" not in text
        assert "/rerun_from_start/" not in text
        for name in ("rerun_from", "by_hand"):
            response = admin_client.get(f"{LIST}{flow.pk}/{name}/")
            assert response["Location"] == f"{LIST}{flow.pk}/change/", name
        for name in ("reschedule", "rerun_now", "rerun_from_start", "rerun_from"):
            response = admin_client.post(f"{LIST}{flow.pk}/{name}/", {"task": "0"}, follow=True)
            assert "deleted" in response.content.decode(), name
    assert FlowExecution.objects.count() == 3
    response = admin_client.post(
        LIST, {"action": "reschedule", "_selected_action": [good.pk, bad.pk]}, follow=True
    )
    text = response.content.decode()
    assert "2 skipped: their values were deleted." in text
    assert user_with("view_flowexecution").get(f"{LIST}{bad.pk}/change/").status_code == 200


def test_a_pacemaker_deletes_values_and_failed_flows_by_the_settings(
    old: Any, settings: Any
) -> None:
    good, cancelled, _bad = old
    assert not prune()
    settings.EBBS_AND_FLOWS = {"KEEP_VALUES_DAYS": 30}
    prune()
    assert [has_values(flow) for flow in old] == [False, False, True]
    settings.EBBS_AND_FLOWS = {"KEEP_FAILED_DAYS": 41}
    prune()
    assert FlowExecution.objects.count() == 3
    settings.EBBS_AND_FLOWS = {"KEEP_FAILED_DAYS": 39}
    prune()
    assert sorted(FlowExecution.objects.values_list("pk", flat=True)) == [good.pk, cancelled.pk]
    settings.EBBS_AND_FLOWS = {"KEEP_DAYS": 39}
    prune()
    assert not FlowExecution.objects.exists()


def test_a_batch_at_once_and_what_is_left_next_time(
    old: Any, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ebbs_and_flows.runner.PRUNE_BATCH", 1)
    settings.EBBS_AND_FLOWS = {"KEEP_VALUES_DAYS": 30}
    assert prune()
    assert [has_values(flow) for flow in old].count(True) == 2
    assert prune()
    assert [has_values(flow) for flow in old].count(True) == 1
    assert not prune()


def test_flows_whose_values_are_gone_are_not_read_again(old: Any, settings: Any) -> None:
    settings.EBBS_AND_FLOWS = {"KEEP_VALUES_DAYS": 30}
    prune()
    with CaptureQueriesContext(connection) as captured:
        prune()
    said = [query["sql"] for query in captured]
    assert not [sql for sql in said if "executioncontextentry" in sql]
    if connection.vendor == "sqlite":
        (look,) = [sql for sql in said if "values_deleted_at" in sql]
        with connection.cursor() as cursor:
            cursor.execute(f"EXPLAIN QUERY PLAN {look}")
            plan = repr(cursor.fetchall())
        assert "ebbs_flow_values" in plan
        assert "TEMP B-TREE" not in plan


@pytest.mark.parametrize("name", ["KEEP_VALUES_DAYS", "KEEP_FAILED_DAYS"])
def test_days_are_days(name: str, runner: FlowRunner, settings: Any) -> None:
    settings.EBBS_AND_FLOWS = {name: -1}
    with pytest.raises(ValueError, match="give it at least 0"):
        runner.prune_kept()
