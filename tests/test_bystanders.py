"""Each write touches the flow that it is for, and no row or announcement of another one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
from django.utils import timezone

from ebbs_and_flows import ExecutionContext, FlowRunner, FlowTemplate, TaskStatus, task
from ebbs_and_flows.conf import get_settings
from ebbs_and_flows.integrity import IntegrityCheck
from ebbs_and_flows.models import (
    ExecutionContextEntry,
    FlowExecution,
    FlowTransition,
    TaskExecution,
)
from ebbs_and_flows.outputs import Failure
from ebbs_and_flows.repository import ClaimedRun
from ebbs_and_flows.service import FlowService
from ebbs_and_flows.signals import flow_status_changed, task_finished
from ebbs_and_flows.status import FlowStatus
from ebbs_and_flows.worker import Worker

pytestmark = pytest.mark.django_db(transaction=True)

LEASE = timedelta(seconds=300)
MAX_INTERRUPTIONS = get_settings().MAX_INTERRUPTIONS
FAILURE = Failure.without_traceback("ValueError", "no")


@task
def a(context: ExecutionContext) -> ExecutionContext:
    if context["outcome"] == "fails" and context.attempt <= 2:
        raise ValueError("no")
    return context.with_entries(a=1)


@task
def b(context: ExecutionContext) -> ExecutionContext:
    return context


@dataclass
class Stage:
    """One flow that something is done to, among others."""

    runner: FlowRunner
    template: FlowTemplate
    flow: FlowExecution
    run: ClaimedRun

    @property
    def service(self) -> FlowService:
        return self.runner.service

    @property
    def now(self) -> FlowExecution:
        return self.service.get_flow_execution(self.flow.pk)

    @property
    def last(self) -> TaskExecution:
        return TaskExecution.objects.filter(flow_execution=self.flow.pk).order_by("pk").last()

    def others(self) -> list[Any]:
        tables = (FlowExecution, TaskExecution, ExecutionContextEntry, FlowTransition)
        return [
            list(
                table.objects.exclude(
                    **{"pk" if table is FlowExecution else "flow_execution": self.flow.pk}
                )
                .order_by("pk")
                .values()
            )
            for table in tables
        ]


def make_others_at_rest(runner: FlowRunner) -> None:
    """Make a flow that is over, one that has failed twice, and one that is due."""
    runner.run_flow_execution(runner.schedule_flow("order", {"outcome": "fine"}))
    failed = runner.run_flow_execution(runner.schedule_flow("order", {"outcome": "fails"}))
    runner.reschedule_flow_execution(failed)
    assert runner.run_flow_execution(failed).status == FlowStatus.FAILED
    runner.schedule_flow("order", {"outcome": "fine"})


def make_others_held(runner: FlowRunner, template: FlowTemplate) -> None:
    """Make a flow that another worker holds, and one that is to be cancelled besides."""
    service = runner.service
    for is_cancelled in (False, True):
        flow = runner.schedule_flow("order", {"outcome": "fails"}, priority=7)
        held = service.claim_flow(flow, template, "another worker")
        assert held is not None
        # Not the number that the attempt of the flow in question has.
        TaskExecution.objects.filter(pk=held.task_execution_id).update(attempt=3)
        assert service.succeed_step(held, {"a": "1"}, "b")
        if is_cancelled:
            service.cancel(flow, actor="ada")


@pytest.fixture
def stage(runner: FlowRunner) -> Stage:
    template = FlowTemplate("order", tasks=[a, b])
    runner.register_flow_template(template)
    make_others_at_rest(runner)
    make_others_held(runner, template)
    flow = runner.schedule_flow("order", {"outcome": "fine"}, priority=5)
    run = runner.service.claim_flow(flow, template, "a worker")
    assert run is not None
    make_others_held(runner, template)
    return Stage(runner, template, flow, run)


def claim(stage: Stage) -> None:
    hand_back(stage)
    run = stage.service.claim_flow(stage.now, stage.template, "a third worker")
    assert run is not None
    assert (run.task_name, run.attempt, run.stored) == ("b", 1, {"outcome": '"fine"', "x": "1"})
    assert (stage.now.claimed_by, stage.now.claim) == ("a third worker", 2)


def step(stage: Stage) -> None:
    assert stage.service.succeed_step(stage.run, {"x": "1"}, "b", log="said")
    assert (stage.run.task_index, stage.run.attempt, stage.run.task_name) == (1, 1, "b")
    first, second = TaskExecution.objects.filter(flow_execution=stage.flow.pk).order_by("pk")
    assert (first.status, first.log, first.claim) == ("SUCCEEDED", "said", 1)
    assert (second.status, second.attempt, second.claim) == ("RUNNING", 1, 1)
    assert second.started_at >= first.finished_at


def hand_back(stage: Stage) -> None:
    assert not stage.service.succeed_step(stage.run, {"x": "1"}, "b", hand_back=True)
    now = stage.now
    assert (now.status, now.claimed_by, now.ready_rank) == ("RUNNING", "", -5)
    assert (now.lease_expires_at, now.current_task_index) == (None, 1)


def last_step(stage: Stage) -> None:
    step(stage)
    assert not stage.service.succeed_step(stage.run, {}, None)
    assert_over(stage, FlowStatus.SUCCEEDED)


def assert_over(stage: Stage, status: FlowStatus, *, was_free: bool = False) -> None:
    now = stage.now
    assert (now.status, now.lease_expires_at, now.ready_rank) == (status, None, None)
    assert not now.cancel_requested
    assert now.finished_at is not None
    # The last attempt ends with the flow, if it was running.
    assert stage.last.finished_at is not None
    assert now.finished_at == stage.last.finished_at or was_free
    assert now.finished_at >= stage.last.finished_at >= stage.last.started_at
    path = FlowTransition.objects.filter(flow_execution=stage.flow.pk).order_by("pk")
    assert path.last().to_status == status


def step_that_settles(stage: Stage) -> None:
    before = stage.run.task_index
    stage.service.repository.finish_step(stage.run, {"x": "1"}, "b", lease=LEASE)
    assert stage.run.task_index == before
    assert stage.service.settle(stage.run) is True
    assert (stage.run.task_name, stage.run.attempt) == ("b", 1)
    assert stage.run.task_execution_id == stage.last.pk
    assert stage.run.stored == {"outcome": '"fine"', "x": "1"}


def cancelled_at_a_step(stage: Stage) -> None:
    stage.service.cancel(stage.flow, actor="ada", reason="twice")
    assert not stage.service.succeed_step(stage.run, {"x": "1"}, "b", log="said")
    assert_over(stage, FlowStatus.CANCELLED)
    assert (stage.last.status, stage.last.log) == ("SUCCEEDED", "said")
    assert stage.now.current_task_index == 1
    assert ExecutionContextEntry.objects.filter(flow_execution=stage.flow.pk, name="x").exists()
    made = FlowTransition.objects.filter(flow_execution=stage.flow.pk).order_by("pk").last()
    assert made is not None
    assert (made.from_status, made.actor, made.reason) == ("RUNNING", "ada", "twice")


def cancelled_at_a_step_by_no_one(stage: Stage) -> None:
    stage.service.cancel(stage.flow)
    assert not stage.service.succeed_step(stage.run, {}, "b")
    assert_over(stage, FlowStatus.CANCELLED)
    made = FlowTransition.objects.filter(flow_execution=stage.flow.pk).order_by("pk").last()
    assert made is not None
    assert (made.actor, made.reason) == ("a worker", "Cancelled at the end of a task")


def cancelled_too_late(stage: Stage) -> None:
    step(stage)
    stage.service.cancel(stage.flow, actor="ada")
    assert not stage.service.succeed_step(stage.run, {}, None)
    assert_over(stage, FlowStatus.SUCCEEDED)
    assert stage.now.current_task_index == 2
    assert stage.last.status == "SUCCEEDED"


def failure(stage: Stage) -> None:
    with stage.service.repository.step():
        assert not stage.service.fail_step(stage.run, FAILURE, log="said")
    assert_over(stage, FlowStatus.FAILED)
    assert (stage.last.status, stage.last.error_type, stage.last.log) == (
        "FAILED",
        "ValueError",
        "said",
    )


def failure_that_is_retried(stage: Stage) -> None:
    before = timezone.now()
    with stage.service.repository.step():
        stage.service.fail_step(stage.run, FAILURE, retry_after=500)
    now = stage.now
    assert (now.status, now.lease_expires_at, now.finished_at) == ("RESCHEDULED", None, None)
    assert (now.interruptions, now.forgiven_attempts, now.ready_rank) == (0, 0, None)
    assert now.run_at >= before + timedelta(seconds=400)
    made = FlowTransition.objects.filter(flow_execution=stage.flow.pk).order_by("pk")
    assert [(item.to_status, item.actor, item.reason) for item in made][-2:] == [
        ("FAILED", "a worker", "a failed: ValueError"),
        ("RESCHEDULED", "retry", "Attempt 2 in 500.0 s"),
    ]


def interruption_by_the_database(stage: Stage) -> None:
    with stage.service.repository.step():
        stage.service.fail_step(stage.run, FAILURE, retry_after=0, interrupted=True)
    now = stage.now
    assert (now.status, now.interruptions, now.forgiven_attempts) == ("RESCHEDULED", 1, 0)
    made = FlowTransition.objects.filter(flow_execution=stage.flow.pk).order_by("pk").last()
    assert made is not None
    assert made.actor == "recovery"


def failure_that_is_forgiven(stage: Stage) -> None:
    with stage.service.repository.step():
        stage.service.fail_step(stage.run, FAILURE, retry_after=0, forgive=True)
    now = stage.now
    assert (now.status, now.interruptions, now.forgiven_attempts) == ("RESCHEDULED", 0, 1)
    made = FlowTransition.objects.filter(flow_execution=stage.flow.pk).order_by("pk")
    assert [item.reason for item in made][-2] == "a asked to be called again"


def failure_that_may_not_be_retried(stage: Stage) -> None:
    with stage.service.repository.step():
        stage.service.fail_step(stage.run, FAILURE, forgive=True)
    assert_over(stage, FlowStatus.FAILED)
    made = FlowTransition.objects.filter(flow_execution=stage.flow.pk).order_by("pk").last()
    assert made is not None
    assert made.reason == "a failed: ValueError"


def failure_of_a_cancelled_flow(stage: Stage) -> None:
    stage.service.cancel(stage.flow, actor="ada")
    with stage.service.repository.step():
        stage.service.fail_step(stage.run, FAILURE, retry_after=5)
    assert_over(stage, FlowStatus.CANCELLED)
    assert stage.last.status == "FAILED"


def recovery(stage: Stage) -> None:
    before = timezone.now()
    expire(stage)
    assert stage.service.recover_expired() == 1
    now = stage.now
    assert (now.status, now.lease_expires_at, now.finished_at) == ("RESCHEDULED", None, None)
    assert (now.ready_rank, now.interruptions) == (-5, 1)
    assert now.run_at >= before - timedelta(seconds=1)
    assert (stage.last.status, stage.last.error_type) == ("FAILED", "TaskInterrupted")
    made = FlowTransition.objects.filter(flow_execution=stage.flow.pk).order_by("pk")
    assert [(item.from_status, item.to_status, item.actor, item.reason) for item in made][-2:] == [
        ("RUNNING", "FAILED", "recovery", stage.last.output),
        ("FAILED", "RESCHEDULED", "recovery", ""),
    ]
    assert stage.last.output.startswith("interrupted: worker a worker was lost")


def recovery_for_the_last_time(stage: Stage) -> None:
    FlowExecution.objects.filter(pk=stage.flow.pk).update(interruptions=MAX_INTERRUPTIONS)
    expire(stage)
    assert stage.service.recover_expired() == 1
    assert_over(stage, FlowStatus.FAILED)
    assert stage.now.interruptions == MAX_INTERRUPTIONS + 1
    assert f"lost its worker {MAX_INTERRUPTIONS + 1} times" in stage.last.output


def recovery_but_for_the_last_time(stage: Stage) -> None:
    FlowExecution.objects.filter(pk=stage.flow.pk).update(interruptions=MAX_INTERRUPTIONS - 1)
    expire(stage)
    assert stage.service.recover_expired() == 1
    assert stage.now.status == FlowStatus.RESCHEDULED


def recovery_of_a_cancelled_flow(stage: Stage) -> None:
    stage.service.cancel(stage.flow, actor="ada", reason="twice")
    expire(stage)
    assert stage.service.recover_expired() == 1
    assert_over(stage, FlowStatus.CANCELLED)
    made = FlowTransition.objects.filter(flow_execution=stage.flow.pk).order_by("pk")
    assert [(item.to_status, item.actor, item.reason) for item in made][-1] == (
        "CANCELLED",
        "ada",
        "twice",
    )


def expire(stage: Stage) -> None:
    past = timezone.now() - timedelta(seconds=5)
    FlowExecution.objects.filter(pk=stage.flow.pk).update(lease_expires_at=past)


def keyboard_interrupt(stage: Stage) -> None:
    Worker(stage.service)._interrupt(stage.run)
    assert (stage.now.status, stage.now.interruptions) == ("RESCHEDULED", 1)
    assert stage.last.error_type == "TaskInterrupted"


def renewal(stage: Stage) -> None:
    before = stage.now.lease_expires_at
    assert before is not None
    assert stage.service.repository.renew(stage.flow.pk, stage.run.claim, LEASE)
    assert stage.now.lease_expires_at > before


def renewal_after_a_lost_claim(stage: Stage) -> None:
    attempt = stage.run.task_execution_id
    step(stage)
    FlowExecution.objects.filter(pk=stage.flow.pk).update(claim=9)
    # The attempt has ended as this worker has stored it: nothing is wrong with it.
    stage.service.renew_lease(stage.run, attempt)
    FlowExecution.objects.filter(pk=stage.flow.pk).update(claim=1)


def progress(stage: Stage) -> None:
    assert stage.service.repository.report_progress(stage.run, '{"done": 1}', LEASE)
    assert stage.now.task_progress == '{"done": 1}'


def use_of_the_key(stage: Stage) -> None:
    stage.service.mark_idempotency_key_used(stage.run)
    assert stage.last.used_idempotency_key


def end_of_an_attempt(stage: Stage) -> None:
    finish = stage.service.repository.finish_attempt
    assert finish(stage.run.task_execution_id, status=TaskStatus.FAILED) == 1
    TaskExecution.objects.filter(pk=stage.run.task_execution_id).update(
        status=TaskStatus.RUNNING, finished_at=None
    )


def by_hand(stage: Stage) -> None:
    failure(stage)
    stage.service.complete_failed_task(stage.flow, {"y": 1}, reason="Sent by post.", actor="ada")
    now = stage.now
    assert (now.status, now.current_task_index, now.ready_rank) == ("RESCHEDULED", 1, -5)
    assert (now.interruptions, now.forgiven_attempts, now.finished_at) == (0, 0, None)
    assert (stage.last.status, stage.last.attempt) == ("SUCCEEDED", 2)


def reschedule(stage: Stage) -> None:
    FlowExecution.objects.filter(pk=stage.flow.pk).update(interruptions=2)
    failure(stage)
    stage.service.reschedule(stage.flow, actor="ada")
    now = stage.now
    assert (now.status, now.ready_rank, now.finished_at) == ("RESCHEDULED", -5, None)
    assert (now.interruptions, now.forgiven_attempts) == (0, 1)


def change_by_hand(stage: Stage) -> None:
    stage.service.update_flow_status(stage.flow, FlowStatus.FAILED, actor="ada")
    assert_over(stage, FlowStatus.FAILED)
    assert stage.last.error_type == "TaskInterrupted"


def cancellation_at_once(stage: Stage) -> None:
    hand_back(stage)
    stage.service.cancel(stage.flow, actor="ada")
    assert_over(stage, FlowStatus.CANCELLED, was_free=True)


def cancellation_of_a_held_flow(stage: Stage) -> None:
    stage.service.cancel(stage.flow, actor="ada", reason="twice")
    now = stage.now
    assert (now.status, now.cancel_requested) == ("RUNNING", True)
    assert (now.cancel_requested_by, now.cancel_reason) == ("ada", "twice")


def deletion_of_values(stage: Stage) -> None:
    last_step(stage)
    age(stage)
    assert stage.service.delete_values(timedelta(days=1)) == 1
    assert not ExecutionContextEntry.objects.filter(flow_execution=stage.flow.pk).exists()
    assert stage.now.values_deleted_at is not None
    assert (stage.last.log, stage.last.output) == ("", "")


def pruning(stage: Stage) -> None:
    last_step(stage)
    age(stage)
    assert stage.service.prune_finished(timedelta(days=1)) == 1
    assert not FlowExecution.objects.filter(pk=stage.flow.pk).exists()


def age(stage: Stage) -> None:
    """Make all that the flow did nine days old."""
    long_ago = timezone.now() - timedelta(days=9)
    FlowExecution.objects.filter(pk=stage.flow.pk).update(finished_at=long_ago)


ACTS: list[Callable[[Stage], None]] = [
    claim,
    step,
    hand_back,
    last_step,
    step_that_settles,
    cancelled_at_a_step,
    cancelled_at_a_step_by_no_one,
    cancelled_too_late,
    failure,
    failure_that_is_retried,
    interruption_by_the_database,
    failure_that_is_forgiven,
    failure_that_may_not_be_retried,
    failure_of_a_cancelled_flow,
    recovery,
    recovery_for_the_last_time,
    recovery_but_for_the_last_time,
    recovery_of_a_cancelled_flow,
    keyboard_interrupt,
    renewal,
    renewal_after_a_lost_claim,
    progress,
    use_of_the_key,
    end_of_an_attempt,
    by_hand,
    reschedule,
    change_by_hand,
    cancellation_at_once,
    cancellation_of_a_held_flow,
    deletion_of_values,
    pruning,
]


@dataclass
class Told:
    """What was announced: of flows, their transitions; the attempts that ended."""

    transitions: list[tuple[int, str, str, str, str]] = field(default_factory=list)
    attempts: list[int] = field(default_factory=list)

    def on_status(
        self,
        flow_execution: FlowExecution,
        from_status: str,
        to_status: str,
        actor: str,
        reason: str,
        **_: Any,
    ) -> None:
        self.transitions.append((flow_execution.pk, from_status, to_status, actor, reason))

    def on_task(self, task_execution: TaskExecution, **_: Any) -> None:
        self.attempts.append(task_execution.pk)


@pytest.fixture
def told(stage: Stage) -> Iterator[Told]:
    told = Told()
    flow_status_changed.connect(told.on_status)
    task_finished.connect(told.on_task)
    yield told
    flow_status_changed.disconnect(told.on_status)
    task_finished.disconnect(told.on_task)


@pytest.mark.parametrize("act", ACTS)
def test_i1_to_i6_what_is_done_to_one_flow_touches_no_other(
    stage: Stage, told: Told, act: Callable[[Stage], None]
) -> None:
    before = stage.others()
    last = FlowTransition.objects.order_by("pk").last()
    assert last is not None
    act(stage)
    assert stage.others() == before
    if act is pruning:
        return
    # What is stored is announced, once and in its order, and nothing else is.
    stored = FlowTransition.objects.filter(pk__gt=last.pk).order_by("pk")
    assert told.transitions == [
        (stage.flow.pk, item.from_status, item.to_status, item.actor, item.reason)
        for item in stored
    ]
    ended = TaskExecution.objects.filter(flow_execution=stage.flow.pk).exclude(status="RUNNING")
    assert told.attempts == list(ended.order_by("pk").values_list("pk", flat=True))
    if act is not deletion_of_values:
        found = [item for item in IntegrityCheck().findings() if item.flow_id == stage.flow.pk]
        assert found == []
