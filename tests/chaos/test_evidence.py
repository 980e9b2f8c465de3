"""The court itself is tried: each thing that must not be is seen, and what may be is not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from ebbs_and_flows import ExecutionContext, FlowRunner, FlowStatus, FlowTemplate, task
from ebbs_and_flows.models import ExecutionContextEntry, FlowExecution, TaskExecution
from tests.shop.models import Order

from . import evidence
from .evidence import Court, Line, Verdict, noted

pytestmark = pytest.mark.django_db

SUCCEEDED = (FlowStatus.SUCCEEDED,)


@task
@noted
def quick(context: ExecutionContext) -> ExecutionContext:
    return context.with_entries(quick=context.attempt)


@task(atomic=True)
@noted
def order(context: ExecutionContext) -> ExecutionContext:
    Order.objects.create(number=f"{context.flow_execution_id} {context.attempt}")
    return context.with_entries(order=context.attempt)


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(evidence.LOG, str(tmp_path / "log"))
    return tmp_path / "log"


@pytest.fixture
def flow(runner: FlowRunner, log: Path) -> FlowExecution:
    runner.register_flow_template(FlowTemplate("tried", tasks=[quick, order]))
    return runner.run_flow_execution(runner.schedule_flow("tried"))


def judge(flow: FlowExecution, log: Path, statuses: Iterable[str] = SUCCEEDED) -> Verdict:
    return Court({flow.pk: statuses}, log).judge()


def rewrite(log: Path, change: Callable[[list[str]], Iterable[str]]) -> None:
    log.write_text("".join(f"{line}\n" for line in change(log.read_text().splitlines())))


def test_what_went_well_is_found_well(flow: FlowExecution, log: Path) -> None:
    verdict = judge(flow, log)
    assert verdict.problems == []
    assert (verdict.flows, verdict.attempts, verdict.interrupted) == (1, 2, 0)
    lines = list(evidence.read_log(log))
    assert [(line.event, line.task, line.attempt) for line in lines] == [
        ("start", "quick", 1),
        ("end", "quick", 1),
        ("start", "order", 1),
        ("end", "order", 1),
    ]
    assert Line.read(str(lines[0])) == lines[0]


def test_a_flow_that_did_not_end_is_lost(flow: FlowExecution, log: Path) -> None:
    assert judge(flow, log, ["FAILED"]).lost == [f"Flow {flow.pk} is SUCCEEDED, not FAILED."]
    missing = Court({flow.pk: SUCCEEDED, flow.pk + 1: SUCCEEDED}, log).judge()
    assert missing.lost == [f"Flow {flow.pk + 1} is None, not SUCCEEDED."]


def test_a_flow_that_nobody_scheduled_is_seen(flow: FlowExecution, log: Path) -> None:
    assert Court({}, log).judge().unsound == [f"Flow {flow.pk} ran, and nobody scheduled it."]


def test_a_success_without_the_work_is_lost(flow: FlowExecution, log: Path) -> None:
    rewrite(log, lambda lines: lines[2:])
    sentence = f"Stored as done, not seen to be: flow {flow.pk}, quick, attempt 1."
    assert judge(flow, log).lost == [sentence]


def test_a_success_whose_end_was_not_seen_is_lost(flow: FlowExecution, log: Path) -> None:
    rewrite(log, lambda lines: lines[:-1])
    sentence = f"Stored as done, not seen to be: flow {flow.pk}, order, attempt 1."
    assert judge(flow, log).lost == [sentence]


def test_an_attempt_that_was_made_twice_is_repeated(flow: FlowExecution, log: Path) -> None:
    rewrite(log, lambda lines: [*lines, *lines[:2]])
    verdict = judge(flow, log)
    assert f"Twice: flow {flow.pk}, quick, attempt 1." in verdict.repeated
    assert f"After its success: flow {flow.pk}, quick, attempt 1." in verdict.repeated


def test_an_attempt_without_a_record_is_seen(flow: FlowExecution, log: Path) -> None:
    rewrite(log, lambda lines: [*lines, f"start {flow.pk} quick 2 1 0"])
    verdict = judge(flow, log)
    assert verdict.unsound == [f"Of flow {flow.pk}, quick, attempt 2 there is no record."]
    assert verdict.repeated == [f"After its success: flow {flow.pk}, quick, attempt 2."]


def test_tasks_at_the_same_time_overlap(flow: FlowExecution, log: Path) -> None:
    rewrite(log, lambda lines: [lines[0], lines[2], lines[1], lines[3]])
    assert judge(flow, log).overlapping == [
        f"While attempt ('quick', 1) was in progress: flow {flow.pk}, order, attempt 1."
    ]


def test_an_attempt_that_was_taken_over_may_go_on_and_proves_nothing(
    flow: FlowExecution, log: Path
) -> None:
    # The worker was stopped in the first attempt, and went on with it after the second.
    TaskExecution.objects.filter(task_name="quick").update(attempt=2)
    ExecutionContextEntry.objects.filter(name="quick").update(value="2")
    row = TaskExecution.objects.get(task_name="quick")
    # Attempts are read in the order of their keys, and this one was made first.
    row.pk, row.attempt, row.status, row.error_type = -1, 1, "FAILED", "TaskInterrupted"
    row.finished_at = row.started_at
    row.save(force_insert=True)
    rewrite(
        log,
        lambda lines: [
            lines[0],
            *(line.replace("quick 1", "quick 2") for line in lines),
            lines[1],
        ],
    )
    verdict = judge(flow, log)
    assert verdict.problems == []
    assert (verdict.attempts, verdict.interrupted) == (3, 1)
    # Or just before it.
    rewrite(log, lambda lines: [*lines[1:-1], lines[0], lines[-1]])
    assert judge(flow, log).problems == []


def test_an_error_that_no_task_raises_is_seen(flow: FlowExecution, log: Path) -> None:
    TaskExecution.objects.filter(task_name="quick").update(error_type="AttributeError")
    sentence = (
        f"Of flow {flow.pk}, quick, attempt 1 failed by AttributeError, which no task raises."
    )
    assert judge(flow, log).unsound == [sentence]


def test_an_order_too_many_and_one_too_few_are_seen(flow: FlowExecution, log: Path) -> None:
    Order.objects.create(number=f"{flow.pk} 2")
    sentence = f"Flow {flow.pk} wrote orders in the attempts [1, 2], and [1] succeeded."
    assert judge(flow, log).repeated == [sentence]
    Order.objects.all().delete()
    sentence = f"Flow {flow.pk} wrote orders in the attempts [], and [1] succeeded."
    assert judge(flow, log).lost == [sentence]


def test_an_entry_of_another_attempt_is_seen(flow: FlowExecution, log: Path) -> None:
    ExecutionContextEntry.objects.filter(name="quick").update(value="7")
    sentence = (
        f"Flow {flow.pk} has the entries {{'quick': 7, 'order': 1}} of the successes"
        " {'quick': 1, 'order': 1}."
    )
    assert judge(flow, log).unsound == [sentence]


def test_what_the_records_alone_prove_is_seen(flow: FlowExecution, log: Path) -> None:
    FlowExecution.objects.update(claim=0)
    assert len(judge(flow, log).unsound) == 2
