"""`checkflows`: a healthy database finds nothing, and each thing that cannot be is found."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from io import StringIO
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.db import models
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from ebbs_and_flows import (
    ExecutionContext,
    FlowRunner,
    FlowStatus,
    FlowTemplate,
    Retry,
    RetryLater,
    task,
)
from ebbs_and_flows.integrity import IntegrityCheck
from ebbs_and_flows.models import (
    ExecutionContextEntry,
    FlowExecution,
    FlowTransition,
    TaskExecution,
)

from .databases import connection

pytestmark = pytest.mark.django_db


@task
def first(context: ExecutionContext) -> ExecutionContext:
    return context.with_entries(first=1)


@task(retry=Retry(attempts=2, delay=0))
def flaky(context: ExecutionContext) -> ExecutionContext:
    if context.attempt == 1:
        raise ConnectionError("not yet")
    return context.with_entries(flaky=2)


@task
def picky(context: ExecutionContext) -> ExecutionContext:
    if context.get("later") and context.attempt == 1:
        raise RetryLater(0)
    if context.get("bad"):
        raise ValueError("no")
    return context


@pytest.fixture
def template(runner: FlowRunner) -> FlowTemplate:
    return runner.register_flow_template(FlowTemplate("checked", tasks=[first, flaky, picky]))


@pytest.fixture
def flow(runner: FlowRunner, template: FlowTemplate) -> FlowExecution:
    """A flow that succeeded, with four attempts."""
    return ended(runner, runner.schedule_flow("checked"))


def ended(runner: FlowRunner, flow: FlowExecution) -> FlowExecution:
    while runner.run_next() is not None:
        pass
    flow.refresh_from_db()
    return flow


def found(**options: Any) -> list[tuple[str, str]]:
    return [(item.invariant, item.sentence) for item in IntegrityCheck(**options).findings()]


def attempts(flow: FlowExecution, **wanted: Any) -> models.QuerySet[TaskExecution]:
    return TaskExecution.objects.filter(flow_execution=flow, **wanted)


def break_off(runner: FlowRunner, flow: FlowExecution) -> None:
    """Leave the flow as a worker does that dies in its first task."""
    template = runner.get_flow_template(flow.template_name)
    assert runner.service.claim_flow(flow, template, "elsewhere:1") is not None


def test_all_that_flows_go_through_is_sound(runner: FlowRunner, template: FlowTemplate) -> None:
    succeeded = ended(runner, runner.schedule_flow("checked", {"later": True}))
    failed = ended(runner, runner.schedule_flow("checked", {"bad": True}))
    by_hand = ended(runner, runner.schedule_flow("checked", {"bad": True}))
    runner.complete_failed_task(by_hand, {"picked": 1}, reason="Picked by hand.")
    rescheduled = ended(runner, runner.schedule_flow("checked", {"bad": True}))
    runner.reschedule_flow_execution(rescheduled)
    runner.fork_flow_execution(failed, from_task="picky", changes={"bad": False})
    ended(runner, failed)
    runner.schedule_flow("checked", run_at=timezone.now() + timedelta(days=1))
    runner.cancel_flow_execution(runner.schedule_flow("checked"))
    handed_back = runner.schedule_flow("checked")
    runner.run_next(stop=lambda: True)
    held = runner.schedule_flow("checked")
    break_off(runner, held)
    lost = runner.schedule_flow("checked")
    for _ in range(2):
        break_off(runner, runner.service.get_flow_execution(lost))
        FlowExecution.objects.filter(pk=lost.pk).update(lease_expires_at=timezone.now())
        assert runner.service.recover_expired() == 1
    statuses = dict(FlowExecution.objects.values_list("pk", "status"))
    assert (statuses[succeeded.pk], statuses[by_hand.pk]) == ("SUCCEEDED", "SUCCEEDED")
    assert (statuses[handed_back.pk], statuses[held.pk]) == ("RUNNING", "RUNNING")
    assert set(statuses.values()) == set(FlowStatus.values) - {"CREATED"}
    assert found() == []


@pytest.mark.parametrize(
    ("values", "invariant", "sentence"),
    [
        ({"status": "CREATED"}, "I1", "It is CREATED, and no worker will ever take it."),
        ({"finished_at": None}, "I1", "It is SUCCEEDED, and no time is stored as its end."),
        ({"current_task_index": 2}, "I1", "It is SUCCEEDED at task 2, and has 3 tasks."),
        ({"current_task_index": 2}, "I2", "Task picky has succeeded, and the flow is to start it"),
        (
            {"current_task_index": 4},
            "I3",
            "Task ? has not succeeded, and the flow went on behind it",
        ),
        ({"first_task_index": 1}, "I3", "first (task 0, attempt 1) is ahead of task 1, its"),
        ({"status": "FAILED"}, "I5", "It is FAILED, and its transitions lead to SUCCEEDED."),
        ({"claim": 1}, "I6", "flaky (task 1, attempt 2) has claim 2, above 1 of the flow."),
    ],
)
def test_a_flow_that_cannot_be_is_found(
    flow: FlowExecution, values: dict[str, Any], invariant: str, sentence: str
) -> None:
    FlowExecution.objects.filter(pk=flow.pk).update(**values)
    assert any(i == invariant and text.startswith(sentence) for i, text in found()), found()


def test_i2_i3_a_task_that_was_started_after_its_success_is_found(flow: FlowExecution) -> None:
    row = attempts(flow, task_index=0).get()
    row.pk, row.attempt = None, 2
    row.save()
    said = found()
    assert ("I2", "Task first succeeded in attempt 1 and was started again.") in said
    # And its time was that of the first.
    started = (
        "The end of picky (task 2, attempt 1) was written after first (task 0, attempt 2) had been"
        " started under claim 1."
    )
    assert ("I6", started) in said


def test_i3_a_task_that_did_not_wait_for_the_one_ahead_is_found(flow: FlowExecution) -> None:
    row = attempts(flow, task_index=1, attempt=1).get()
    attempts(flow, pk=row.pk).update(started_at=row.started_at - timedelta(hours=1))
    assert found() == [
        ("I3", "flaky (task 1, attempt 1) was started before first (task 0, attempt 1) had ended.")
    ]


@pytest.mark.parametrize("name", ["first", "flaky", "picky"])
@pytest.mark.parametrize("index", [3, 2])
def test_i3_a_flow_that_succeeded_without_a_task_of_its_plan_is_found(
    flow: FlowExecution, name: str, index: int
) -> None:
    missing = attempts(flow, task_name=name)
    ExecutionContextEntry.objects.filter(task_execution__in=missing).delete()
    missing.delete()
    FlowExecution.objects.filter(pk=flow.pk).update(current_task_index=index)
    sentence = f"Task {name} has not succeeded, and the flow went on behind it."
    assert [said for said in found() if said[0] == "I3"] == [("I3", sentence)]


def test_i1_i3_a_worker_that_knew_a_task_less_than_the_plan_is_found(
    runner: FlowRunner, flow: FlowExecution
) -> None:
    longer = FlowTemplate("checked", tasks=[first, flaky, picky, task(name="notify")(picky.run)])
    plan = longer.plan
    FlowExecution.objects.filter(pk=flow.pk).update(
        task_names=list(plan.task_names), plan_digest=plan.digest
    )
    assert found() == [
        ("I1", "It is SUCCEEDED at task 3, and has 4 tasks."),
        ("I3", "Task notify has not succeeded, and the flow went on behind it."),
    ]


def test_i3_a_claim_that_went_down_is_found(flow: FlowExecution) -> None:
    attempts(flow, task_index=1, attempt=1).update(claim=2)
    attempts(flow, task_index=1, attempt=2).update(claim=1)
    assert (
        "I3",
        "flaky (task 1, attempt 2) has claim 1, below 2 of flaky (task 1, attempt 1).",
    ) in found()


def test_i3_attempts_that_nobody_runs_are_found(flow: FlowExecution) -> None:
    attempts(flow, task_index__gte=1).update(status="RUNNING", finished_at=None)
    said = [text for invariant, text in found() if invariant == "I3"]
    assert said[0].startswith("Task flaky has not succeeded")
    assert any(
        text.startswith("3 attempts are running: flaky (task 1, attempt 1), ") for text in said
    )
    assert (
        "flaky (task 1, attempt 1) is running, and no worker holds the flow, which is SUCCEEDED."
    ) in said


def test_i3_what_a_worker_holds_is_running_where_the_flow_is(
    runner: FlowRunner, template: FlowTemplate
) -> None:
    flow = runner.schedule_flow("checked")
    break_off(runner, flow)
    FlowExecution.objects.filter(pk=flow.pk).update(ready_rank=0)
    sentence = "It is held and ranked as ready, and would not be taken back from a lost worker."
    assert found() == [("I1", sentence)]
    FlowExecution.objects.filter(pk=flow.pk).update(claim=2, ready_rank=None)
    sentence = (
        "first (task 0, attempt 1) is running under claim 1, and the flow is at task 0 under"
        " claim 2."
    )
    assert found() == [("I3", sentence)]
    attempts(flow).delete()
    assert found() == [("I3", "Worker elsewhere:1 holds it, and no attempt is running.")]


def test_i4_an_entry_of_a_failed_attempt_or_of_another_flow_is_found(
    runner: FlowRunner, flow: FlowExecution
) -> None:
    other = ended(runner, runner.schedule_flow("checked"))
    failed = attempts(flow, status="FAILED").get()
    ExecutionContextEntry.objects.filter(flow_execution=flow, name="flaky").update(
        task_execution=failed
    )
    ExecutionContextEntry.objects.filter(flow_execution=other, name="first").update(
        task_execution=attempts(flow, task_index=0).get()
    )
    assert found() == [
        ("I4", "The entry 'flaky' was not written by an attempt of the flow that succeeded."),
        ("I4", "The entry 'first' was not written by an attempt of the flow that succeeded."),
    ]


def test_i5_a_transition_that_is_missing_or_not_allowed_is_found(flow: FlowExecution) -> None:
    rows = FlowTransition.objects.filter(flow_execution=flow).order_by("pk")
    running = rows.filter(to_status="RUNNING").last()
    assert running is not None
    running.delete()
    assert found() == [("I5", "It was RESCHEDULED, and a transition leads from RUNNING.")]
    rows.filter(from_status="RUNNING", to_status="SUCCEEDED").update(from_status="RESCHEDULED")
    assert found() == [("I5", "It went from RESCHEDULED to SUCCEEDED, which is not allowed.")]
    rows.filter(from_status="").update(from_status="nonsense")
    assert ("I5", "It was new, and a transition leads from nonsense.") in found()
    rows.delete()
    assert found() == [("I5", "It is SUCCEEDED, and its transitions lead to nothing.")]


def test_i6_an_attempt_that_is_missing_is_found(flow: FlowExecution) -> None:
    attempts(flow, task_index=1, attempt=1).delete()
    assert found() == [("I6", "Task flaky has attempts 2.")]


def test_i6_a_write_after_the_takeover_is_found(flow: FlowExecution) -> None:
    row = attempts(flow, task_index=1, attempt=1).get()
    attempts(flow, pk=row.pk).update(finished_at=timezone.now() + timedelta(hours=1))
    sentence = (
        "The end of flaky (task 1, attempt 1) was written after flaky (task 1, attempt 2) had been"
        " started under claim 2."
    )
    assert found() == [("I6", sentence)]


@contextmanager
def without(model: type[models.Model], suffix: str) -> Iterator[None]:
    """Take a constraint away that keeps the database from holding what is to be found."""
    stated = model._meta.constraints
    constraint = next(c for c in stated if c.name.endswith(suffix))
    # SQLite makes the table anew, with what the model states.
    model._meta.constraints = [c for c in stated if c is not constraint]
    with connection.schema_editor() as editor:
        editor.remove_constraint(model, constraint)
    try:
        yield
    finally:
        FlowExecution.objects.all().delete()
        model._meta.constraints = stated
        with connection.schema_editor() as editor:
            editor.add_constraint(model, constraint)


@pytest.mark.django_db(transaction=True)
def test_i4_an_entry_that_was_written_twice_is_found(flow: FlowExecution) -> None:
    with without(ExecutionContextEntry, "entry_once"):
        row = ExecutionContextEntry.objects.get(name="first")
        row.pk = None
        row.save()
        assert found() == [("I4", "The entry 'first' is stored more than once.")]


@pytest.mark.django_db(transaction=True)
def test_i6_an_attempt_that_was_counted_twice_is_found(flow: FlowExecution) -> None:
    with without(TaskExecution, "attempt_once"):
        attempts(flow, task_index=1, attempt=2).update(attempt=1)
        assert ("I6", "Task flaky has attempts 1, 1.") in found()


@pytest.mark.django_db(transaction=True)
def test_i1_a_lease_of_a_flow_that_is_over_is_found(flow: FlowExecution) -> None:
    with without(FlowExecution, "flow_lease"):
        FlowExecution.objects.update(lease_expires_at=timezone.now(), claimed_by="w:1")
        assert found() == [("I1", "It is SUCCEEDED, and yet leased to w:1.")]


@pytest.mark.django_db(transaction=True)
def test_a_flow_that_is_at_work_meanwhile_is_not_found(
    runner: FlowRunner, template: FlowTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = runner.schedule_flow("checked")
    read: Callable[..., Any] = IntegrityCheck._read

    def read_late(check: IntegrityCheck, flows: list[FlowExecution]) -> Any:
        if not attempts(flow).exists():
            # Between the reading of the flow and that of its attempts, it runs to its end.
            thread = threading.Thread(target=run_to_the_end)
            thread.start()
            thread.join()
        return read(check, flows)

    def run_to_the_end() -> None:
        try:
            ended(runner, runner.service.get_flow_execution(flow))
        finally:
            connection.close()

    monkeypatch.setattr(IntegrityCheck, "_read", read_late)
    assert found() == []
    flow.refresh_from_db()
    assert flow.status == FlowStatus.SUCCEEDED


def test_many_flows_are_read_in_batches_of_a_few_queries(
    runner: FlowRunner, template: FlowTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ebbs_and_flows.integrity.BATCH_SIZE", 4)
    for _ in range(10):
        runner.schedule_flow("checked")
    check = IntegrityCheck()
    with CaptureQueriesContext(
        connection,
    ) as captured:
        assert list(check.findings()) == []
    assert check.checked == 10
    # Three batches of five, and the look that finds no fourth.
    assert len(captured) == 3 * 5 + 1


# The command


def said(*arguments: str, code: int = 0) -> str:
    out = StringIO()
    if code:
        with pytest.raises(SystemExit, match=str(code)):
            call_command("checkflows", *arguments, stdout=out)
    else:
        call_command("checkflows", *arguments, stdout=out)
    return out.getvalue()


def test_checkflows_says_what_it_finds_and_exits_with_1(flow: FlowExecution) -> None:
    assert said() == "1 flow was checked: nothing found.\n"
    FlowExecution.objects.update(claim=1)
    sentence = "flaky (task 1, attempt 2) has claim 2, above 1 of the flow."
    assert said(code=1).splitlines() == [
        f"checked #{flow.pk}, I6: {sentence}",
        f"checked #{flow.pk}, I6: picky (task 2, attempt 1) has claim 2, above 1 of the flow.",
        "1 flow was checked: 2 things found.",
    ]
    line, _, total = map(json.loads, said("--json", code=1).splitlines())
    assert line == {
        "flow_id": flow.pk,
        "template_name": "checked",
        "invariant": "I6",
        "sentence": sentence,
    }
    assert total == {"checked": 1, "findings": 2, "not_registered": {}}


def test_checkflows_of_one_template(runner: FlowRunner, flow: FlowExecution) -> None:
    FlowExecution.objects.update(claim=1)
    runner.register_flow_template(FlowTemplate("other", tasks=[first]))
    runner.schedule_flow("other")
    assert "1 flow was checked: nothing found." in said("--template", "other")
    assert "2 things found" in said("--template", "checked", code=1)
    with pytest.raises(CommandError, match="No flow template 'unknown' is registered"):
        said("--template", "unknown")
