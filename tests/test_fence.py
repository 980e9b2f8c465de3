"""The fence: a worker writes only to the flow and the attempt that it still holds."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from django.db.models import F
from django.utils import timezone

from ebbs_and_flows import ExecutionContext, FlowRunner, FlowTemplate, task
from ebbs_and_flows.exceptions import ClaimLost
from ebbs_and_flows.models import FlowExecution, TaskExecution
from ebbs_and_flows.outputs import Failure
from ebbs_and_flows.repository import ClaimedRun
from ebbs_and_flows.service import FlowService
from ebbs_and_flows.status import FlowStatus, TaskStatus

from .databases import connection

pytestmark = pytest.mark.django_db(transaction=True)

LEASE = timedelta(seconds=300)


@pytest.fixture
def run(runner: FlowRunner) -> ClaimedRun:
    """A flow of two tasks that a worker has just claimed."""
    template = FlowTemplate("order", tasks=[task(name=name)(lambda c: c) for name in "ab"])
    runner.register_flow_template(template)
    claimed = runner.service.claim_flow(runner.schedule_flow("order"), template, "a worker")
    assert claimed is not None
    return claimed


def stored(run: ClaimedRun) -> dict[str, Any]:
    rows = [*FlowExecution.objects.filter(pk=run.flow.pk).values()]
    return {"flow": rows[0], "attempts": [*TaskExecution.objects.order_by("pk").values()]}


def take_over(run: ClaimedRun) -> None:
    """Have another worker hold the flow."""
    FlowExecution.objects.filter(pk=run.flow.pk).update(
        claim=F("claim") + 1, claimed_by="another worker"
    )


def end(run: ClaimedRun) -> None:
    """Have the flow fail under the claim that the worker has."""
    FlowExecution.objects.filter(pk=run.flow.pk).update(
        status=FlowStatus.FAILED, lease_expires_at=None, finished_at=timezone.now()
    )


def hand_back(run: ClaimedRun) -> None:
    """Give the flow back between two tasks, free for any worker."""
    FlowExecution.objects.filter(pk=run.flow.pk).update(
        lease_expires_at=None, claimed_by="", ready_rank=0
    )


LOST = pytest.mark.parametrize("lose", [take_over, end, hand_back])


@pytest.mark.parametrize("lose", [take_over, end])
def test_i6_a_step_is_not_written_to_a_flow_that_is_not_running_under_the_claim(
    service: FlowService, run: ClaimedRun, lose: Any
) -> None:
    lose(run)
    before = stored(run)
    assert service.repository.finish_step(run, {"a": "1"}, "b", lease=LEASE) is None
    assert stored(run) == before
    assert not service.repository.fenced(run).exists()


@LOST
def test_i6_a_lost_claim_renews_no_lease(service: FlowService, run: ClaimedRun, lose: Any) -> None:
    lose(run)
    before = stored(run)
    assert service.repository.renew(run.flow.pk, run.claim, LEASE) is False
    assert stored(run) == before


@LOST
def test_i6_a_lost_claim_reports_no_progress(
    service: FlowService, run: ClaimedRun, lose: Any
) -> None:
    lose(run)
    before = stored(run)
    assert service.repository.report_progress(run, "{}", LEASE) is False
    assert stored(run) == before


@LOST
def test_i6_a_worker_learns_at_its_next_beat_that_its_claim_is_lost(
    service: FlowService, run: ClaimedRun, lose: Any
) -> None:
    lose(run)
    before = stored(run)
    for progress in (None, "{}"):
        with pytest.raises(ClaimLost, match=f"Flow {run.flow.pk} "):
            service.renew_lease(run, run.task_execution_id, progress)
    assert stored(run) == before


@LOST
@pytest.mark.parametrize("next_task", ["b", None])
def test_i6_a_step_under_a_lost_claim_raises_and_writes_nothing(
    service: FlowService, run: ClaimedRun, lose: Any, next_task: str | None
) -> None:
    if lose is hand_back:
        FlowExecution.objects.filter(pk=run.flow.pk).update(cancel_requested=True)
    lose(run)
    before = stored(run)
    with pytest.raises(ClaimLost, match=f"Flow {run.flow.pk} "):
        service.succeed_step(run, {"a": "1"}, next_task)
    assert stored(run) == before


@pytest.mark.parametrize("next_task", ["b", None])
def test_i6_a_fence_that_does_not_hold_is_no_reason_to_cancel(
    service: FlowService, run: ClaimedRun, next_task: str | None
) -> None:
    FlowExecution.objects.filter(pk=run.flow.pk).update(current_task_index=1)
    before = stored(run)
    with pytest.raises(ClaimLost, match=f"Flow {run.flow.pk} "):
        service.succeed_step(run, {"a": "1"}, next_task)
    with pytest.raises(ClaimLost), service.repository.step():
        service.fail_step(run, Failure.without_traceback("ValueError", "no"))
    assert stored(run) == before


@pytest.mark.parametrize("lose", [take_over, end])
def test_i6_an_attempt_that_is_lost_or_over_marks_no_key(
    service: FlowService, run: ClaimedRun, lose: Any
) -> None:
    lose(run)
    with pytest.raises(ClaimLost):
        service.mark_idempotency_key_used(run)
    assert not stored(run)["attempts"][0]["used_idempotency_key"]


def test_i6_an_attempt_that_has_ended_marks_no_key(service: FlowService, run: ClaimedRun) -> None:
    service.repository.finish_attempt(run.task_execution_id, status=TaskStatus.SUCCEEDED)
    assert service.repository.mark_idempotency_key_used(run) is False
    assert not stored(run)["attempts"][0]["used_idempotency_key"]


@pytest.mark.parametrize("status", [status for status in FlowStatus if status != "RUNNING"])
def test_i6_only_a_running_flow_is_held(
    service: FlowService, run: ClaimedRun, status: FlowStatus
) -> None:
    held = service.repository.held(run.flow.pk, run.claim)
    assert held.exists()
    FlowExecution.objects.filter(pk=run.flow.pk).update(status=status, lease_expires_at=None)
    assert not held.exists()


def test_i6_a_keyboard_interrupt_gives_back_no_flow_that_another_worker_holds(
    runner: FlowRunner,
) -> None:
    def body(context: ExecutionContext) -> ExecutionContext:
        FlowExecution.objects.update(claim=F("claim") + 1, claimed_by="another worker")
        raise KeyboardInterrupt

    runner.register_flow_template(FlowTemplate("order", tasks=[task(name="a")(body)]))
    flow = runner.schedule_flow("order")
    with pytest.raises(KeyboardInterrupt):
        runner.run_flow_execution(flow)
    flow = runner.service.get_flow_execution(flow)
    assert (flow.status, flow.claimed_by, flow.interruptions) == ("RUNNING", "another worker", 0)
    assert flow.lease_expires_at is not None
    assert flow.task_executions.get().status == TaskStatus.RUNNING


def test_i2_an_attempt_that_has_ended_ends_once(service: FlowService, run: ClaimedRun) -> None:
    finish = service.repository.finish_attempt
    assert finish(run.task_execution_id, status=TaskStatus.SUCCEEDED) == 1
    before = stored(run)
    assert finish(run.task_execution_id, status=TaskStatus.FAILED, output="late") == 0
    assert stored(run) == before


def test_i5_recovery_does_not_overwrite_a_cancel_request(
    service: FlowService, run: ClaimedRun
) -> None:
    seen = service.get_flow_execution(run.flow.pk)
    service.cancel(run.flow.pk, actor="ada", reason="ordered twice")
    assert service.interrupt(seen, "interrupted: the worker was lost") is False
    asked = service.get_flow_execution(run.flow.pk)
    assert (asked.status, asked.cancel_requested) == ("RUNNING", True)
    assert service.interrupt(asked, "interrupted: the worker was lost") is True
    assert service.get_flow_execution(run.flow.pk).status == FlowStatus.CANCELLED


class Before:
    """Does something just before the first statement that has all of the words."""

    def __init__(self, action: Any, *words: str) -> None:
        self.action: Any = action
        self.words = words

    def __call__(self, execute: Any, sql: str, parameters: Any, many: bool, context: Any) -> Any:
        if self.action is not None and all(word in sql for word in self.words):
            action, self.action = self.action, None
            action()
        return execute(sql, parameters, many, context)


def test_i1_a_flow_that_is_rescheduled_while_old_ones_are_pruned_is_kept(
    runner: FlowRunner,
) -> None:
    def fail(context: ExecutionContext) -> ExecutionContext:
        raise ValueError

    runner.register_flow_template(FlowTemplate("order", tasks=[task(name="a")(fail)]))
    flow = runner.run_flow_execution(runner.schedule_flow("order"))
    old = FlowExecution.objects.filter(pk=flow.pk)
    old.update(finished_at=timezone.now() - timedelta(days=9))

    def reschedule() -> None:
        old.update(status=FlowStatus.RESCHEDULED, finished_at=None)

    # The look is by age and status; the first statement after it is by the ids that it found.
    look = Before(lambda: None, "finished_at", "LIMIT")
    then = Before(reschedule, "SELECT", " IN (")

    def after_the_look(*arguments: Any) -> Any:
        return (look if look.action is not None else then)(*arguments)

    with connection.execute_wrapper(after_the_look):
        assert runner.service.prune_finished(timedelta(days=1)) == 0
    assert then.action is None
    assert old.get().status == FlowStatus.RESCHEDULED


def test_i3_a_flow_that_a_worker_holds_is_not_ranked(
    service: FlowService, run: ClaimedRun
) -> None:
    write = Before(lambda: None, "UPDATE", " SET ")
    with connection.execute_wrapper(write):
        assert service.repository.rank_due() == 0
    # Nor is it looked at, or a batch of held flows would be looked at again and again.
    assert write.action is not None
    assert stored(run)["flow"]["ready_rank"] is None


def test_i3_a_flow_that_is_claimed_while_it_is_ranked_is_not_ranked(
    service: FlowService, run: ClaimedRun
) -> None:
    flow = FlowExecution.objects.filter(pk=run.flow.pk)
    lease = stored(run)["flow"]["lease_expires_at"]
    flow.update(lease_expires_at=None)
    claim = Before(lambda: flow.update(lease_expires_at=lease), "UPDATE", "ready_rank")
    with connection.execute_wrapper(claim):
        assert service.repository.rank_due() == 0
    assert claim.action is None
    assert stored(run)["flow"]["ready_rank"] is None
