"""What a claim, a step, a failure and a recovery store, and what they store together."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from django.db import DatabaseError, OperationalError, transaction
from django.utils import timezone

from ebbs_and_flows import (
    ExecutionContext,
    FlowRunner,
    FlowTemplate,
    OuterTransaction,
    Retry,
    RetryLater,
    task,
)
from ebbs_and_flows.body import BodyFailed
from ebbs_and_flows.conf import get_settings
from ebbs_and_flows.models import FlowExecution, FlowTransition, TaskExecution
from ebbs_and_flows.repository import ClaimedRun
from ebbs_and_flows.repository.database import FLOW, STATE, TRANSITION
from ebbs_and_flows.service import FlowService
from ebbs_and_flows.signals import task_finished
from ebbs_and_flows.status import FlowStatus
from ebbs_and_flows.worker import _Again

from .databases import connection
from .test_fence import Before

pytestmark = pytest.mark.django_db(transaction=True)


def template_of(*names: str, **options: Any) -> FlowTemplate:
    return FlowTemplate("order", tasks=[task(name=name)(lambda c: c) for name in names], **options)


def claimed(runner: FlowRunner, template: FlowTemplate, worker: str = "a worker") -> ClaimedRun:
    flow = runner.schedule_flow(template.name)
    run = runner.service.claim_flow(flow, template, worker)
    assert run is not None
    return run


def everything() -> list[Any]:
    tables = (FlowExecution, TaskExecution, FlowTransition)
    return [list(table.objects.order_by("pk").values()) for table in tables]


def cancelled_at_a_boundary(service: FlowService, run: ClaimedRun) -> None:
    FlowExecution.objects.filter(pk=run.flow.pk).update(cancel_requested=True)
    with pytest.raises(DatabaseError):
        service.succeed_step(run, {}, "b")


def refused_after_a_deploy(service: FlowService, run: ClaimedRun) -> None:
    FlowExecution.objects.filter(pk=run.flow.pk).update(current_task_index=1)
    run.task_index = 1
    with pytest.raises(DatabaseError):
        service.begin(run, template_of("x", "y"))


def ended_after_a_deploy(service: FlowService, run: ClaimedRun) -> None:
    run.attempt = 0
    with pytest.raises(DatabaseError):
        service.begin(run, template_of("a", "b"))


def recovered(service: FlowService, run: ClaimedRun) -> None:
    past = timezone.now() - timedelta(seconds=5)
    FlowExecution.objects.filter(pk=run.flow.pk).update(lease_expires_at=past)
    with pytest.raises(DatabaseError):
        service.recover_expired()


def changed_by_hand(service: FlowService, run: ClaimedRun) -> None:
    with pytest.raises(DatabaseError):
        service.update_flow_status(run.flow, FlowStatus.FAILED)


def rescheduled(service: FlowService, run: ClaimedRun) -> None:
    FlowExecution.objects.filter(pk=run.flow.pk).update(
        status=FlowStatus.FAILED, lease_expires_at=None
    )
    with pytest.raises(DatabaseError):
        service.reschedule(run.flow)


def done_by_hand(service: FlowService, run: ClaimedRun) -> None:
    FlowExecution.objects.filter(pk=run.flow.pk).update(
        status=FlowStatus.FAILED, lease_expires_at=None
    )
    with pytest.raises(DatabaseError):
        service.complete_failed_task(run.flow, {"x": 1}, reason="By post.")


def cancelled_at_once(service: FlowService, run: ClaimedRun) -> None:
    FlowExecution.objects.filter(pk=run.flow.pk).update(lease_expires_at=None)
    with pytest.raises(DatabaseError):
        service.cancel(run.flow)


@pytest.mark.parametrize(
    "act",
    [
        cancelled_at_a_boundary,
        refused_after_a_deploy,
        ended_after_a_deploy,
        recovered,
        changed_by_hand,
        rescheduled,
        done_by_hand,
        cancelled_at_once,
    ],
)
def test_i5_a_change_of_status_is_stored_with_its_transition_or_not_at_all(
    runner: FlowRunner, act: Callable[[FlowService, ClaimedRun], None]
) -> None:
    template = runner.register_flow_template(template_of("a", "b"))
    run = claimed(runner, template)

    def refuse(execute: Any, sql: str, parameters: Any, many: bool, context: Any) -> Any:
        if TRANSITION in sql and "INSERT" in sql:
            raise DatabaseError("no more room")
        return execute(sql, parameters, many, context)

    with connection.execute_wrapper(refuse):
        act(runner.service, run)
    flows, attempts, transitions = everything()
    assert [item["to_status"] for item in transitions] == ["CREATED", "SCHEDULED", "RUNNING"]
    assert [item["status"] for item in attempts] == ["RUNNING"]
    expected = "FAILED" if act in {rescheduled, done_by_hand} else "RUNNING"
    assert [item["status"] for item in flows] == [expected]
    assert not runner.service.repository.stored_entries(run.flow.pk)


def test_what_asks_for_later_gives_the_next_task_no_further_attempts(runner: FlowRunner) -> None:
    @task
    def asks(context: ExecutionContext) -> ExecutionContext:
        if context.attempt < 3:
            raise RetryLater(0)
        return context

    @task(retry=Retry(attempts=2, delay=0))
    def fails(context: ExecutionContext) -> ExecutionContext:
        raise ValueError("no")

    runner.register_flow_template(FlowTemplate("order", tasks=[asks, fails]))
    flow = runner.schedule_flow("order")
    while runner.run_next() is not None:
        pass
    attempts = TaskExecution.objects.filter(flow_execution=flow.pk).order_by("pk")
    assert [item.task_name for item in attempts] == ["asks"] * 3 + ["fails"] * 2


def test_i2_a_task_that_a_deploy_puts_at_the_cursor_has_its_whole_allowance(
    runner: FlowRunner,
) -> None:
    runner.register_flow_template(template_of("a", "b"))
    flow = runner.schedule_flow("order")
    FlowExecution.objects.filter(pk=flow.pk).update(forgiven_attempts=2, interruptions=1)
    new = template_of("c", "b", version=2)
    run = runner.service.claim_flow(runner.service.get_flow_execution(flow), new, "a worker")
    assert run is not None
    assert runner.service.begin(run, new)
    now = runner.service.get_flow_execution(flow)
    assert (now.forgiven_attempts, now.interruptions) == (0, 0)
    assert (run.forgiven_attempts, run.interruptions) == (0, 0)
    assert now.task_names == ["c", "b"]


def test_a_task_that_was_never_tried_has_no_last_attempt(runner: FlowRunner) -> None:
    run = claimed(runner, runner.register_flow_template(template_of("a", "b")))
    last = runner.service.repository.last_attempt
    assert [last(run.flow.pk, name) for name in "ab"] == [1, 0]


@pytest.mark.parametrize("max_running", [None, 2])
@pytest.mark.parametrize("at_once", [True, False])
def test_i1_what_is_to_be_recovered_comes_first_unless_asked_otherwise(
    runner: FlowRunner, max_running: int | None, at_once: bool
) -> None:
    template = runner.register_flow_template(template_of("a", max_running=max_running))
    run = claimed(runner, template)
    past = timezone.now() - timedelta(seconds=5)
    FlowExecution.objects.filter(pk=run.flow.pk).update(lease_expires_at=past)
    ready = runner.schedule_flow("order")
    taken, due = runner.service.look_and_claim([template], "another worker", at_once=at_once)
    assert due.expired
    assert (taken.flow.pk if taken else None) == (ready.pk if at_once else None)
    if not at_once:
        again = runner.service.claim([template], "another worker")
        assert again is not None
        assert again.flow.pk == ready.pk


def test_i3_a_place_that_is_taken_meanwhile_leaves_the_flows_of_other_templates(
    runner: FlowRunner,
) -> None:
    limited = runner.register_flow_template(template_of("a", max_running=1))
    other = runner.register_flow_template(
        FlowTemplate("other", tasks=[task(name="a")(lambda c: c)])
    )
    first, second = runner.schedule_flow("order", priority=9), runner.schedule_flow("order")
    free = runner.schedule_flow("other", priority=-9)

    def take_the_place() -> None:
        lease = timezone.now() + timedelta(seconds=300)
        FlowExecution.objects.filter(pk=second.pk).update(
            status=FlowStatus.RUNNING, ready_rank=None, lease_expires_at=lease, claim=1
        )

    meanwhile = Before(take_the_place, STATE, " IN (")
    with connection.execute_wrapper(meanwhile):
        run = runner.service.claim([limited, other], "a worker")
    assert meanwhile.action is None
    assert run is not None
    assert run.flow.pk == free.pk
    assert runner.service.get_flow_execution(first).status == FlowStatus.SCHEDULED


def test_a_flow_that_is_refused_after_its_deadline_is_announced_with_the_error(
    runner: FlowRunner,
) -> None:
    template = runner.register_flow_template(template_of("a"))
    run = claimed(runner, template)
    run.flow.deadline_at = timezone.now() - timedelta(seconds=5)
    errors: list[Any] = []

    def on_task(error: Any, **_: Any) -> None:
        errors.append(error)

    task_finished.connect(on_task)
    try:
        assert runner.service.begin(run, template) is False
    finally:
        task_finished.disconnect(on_task)
    assert [type(error).__name__ for error in errors] == ["DeadlineExceeded"]
    assert runner.service.get_flow_execution(run.flow).status == FlowStatus.FAILED


def test_an_interruption_uses_up_no_attempt_of_a_retry_rule(runner: FlowRunner) -> None:
    @task(retry=Retry(attempts=2, delay=0))
    def fails(context: ExecutionContext) -> ExecutionContext:
        raise ValueError("no")

    template = runner.register_flow_template(FlowTemplate("order", tasks=[fails]))
    run = claimed(runner, template)
    past = timezone.now() - timedelta(seconds=5)
    FlowExecution.objects.filter(pk=run.flow.pk).update(lease_expires_at=past)
    assert runner.service.recover_expired() == 1
    while runner.run_next() is not None:
        pass
    errors = TaskExecution.objects.order_by("attempt").values_list("error_type", flat=True)
    assert list(errors) == ["TaskInterrupted", "ValueError", "ValueError"]


def test_i2_a_step_into_a_task_that_a_deploy_has_added_stores_the_new_plan(
    runner: FlowRunner,
) -> None:
    runner.register_flow_template(template_of("a"))
    flow = runner.schedule_flow("order")
    new = template_of("a", "b", version=2)
    run = runner.service.claim_flow(flow, new, "a worker")
    assert run is not None
    assert runner.service.begin(run, new)
    assert runner.service.get_flow_execution(flow).plan == template_of("a").plan
    assert runner.service.succeed_step(run, {}, "b")
    assert runner.service.get_flow_execution(flow).plan == new.plan


def test_i5_a_claimed_flow_without_a_task_left_ends_or_is_cancelled(runner: FlowRunner) -> None:
    template = runner.register_flow_template(template_of("a"))
    for is_cancelled in (False, True):
        run = claimed(runner, template)
        if is_cancelled:
            runner.service.cancel(run.flow, actor="ada")
        # As where a deploy has taken the last tasks away.
        TaskExecution.objects.all().delete()
        run.attempt = 0
        assert not runner.service.begin(run, template)
        made = FlowTransition.objects.filter(flow_execution=run.flow.pk).order_by("pk").last()
        assert made is not None
        expected = ("CANCELLED", "ada") if is_cancelled else ("SUCCEEDED", "a worker")
        assert (made.to_status, made.actor) == expected
        assert runner.service.get_flow_execution(run.flow).lease_expires_at is None


def test_i5_a_drifted_flow_without_an_attempt_fails_at_the_task_of_its_plan(
    runner: FlowRunner,
) -> None:
    run = claimed(runner, runner.register_flow_template(template_of("a", "b")))
    FlowExecution.objects.filter(pk=run.flow.pk).update(current_task_index=1)
    TaskExecution.objects.all().delete()
    run.task_index, run.attempt = 1, 0
    assert not runner.service.begin(run, template_of("x", "y"))
    last = TaskExecution.objects.order_by("pk").last()
    assert last is not None
    assert (last.task_name, last.attempt, last.status) == ("b", 1, "FAILED")
    assert last.error_type == "TemplateDrift"
    assert runner.service.get_flow_execution(run.flow).status == FlowStatus.FAILED


def test_i5_a_flow_that_was_handed_back_is_claimed_without_a_transition(
    runner: FlowRunner,
) -> None:
    template = runner.register_flow_template(template_of("a", "b"))
    run = claimed(runner, template)
    assert not runner.service.succeed_step(run, {}, "b", hand_back=True)
    started = runner.service.get_flow_execution(run.flow).started_at
    transitions = FlowTransition.objects.count()
    again = runner.service.claim([template], "another worker")
    assert again is not None
    assert (again.claim, again.claimed_from, again.task_name) == (2, "RUNNING", "b")
    assert FlowTransition.objects.count() == transitions
    assert runner.service.get_flow_execution(run.flow).started_at == started is not None


@pytest.mark.parametrize("best", ["x", "y", "z"])
def test_the_best_flow_of_several_templates_is_claimed_first(
    runner: FlowRunner, best: str
) -> None:
    templates = [
        runner.register_flow_template(FlowTemplate(name, tasks=[task(name="a")(lambda c: c)]))
        for name in "xyz"
    ]
    for name in "xyz":
        runner.schedule_flow(name, priority=5 if name == best else -5)
    run = runner.service.claim(templates, "a worker")
    assert run is not None
    assert run.flow.template_name == best


def test_entries_that_a_claim_does_not_bring_along_are_read(runner: FlowRunner) -> None:
    template = runner.register_flow_template(template_of("a"))
    for size in (10, 100_000):
        runner.schedule_flow("order", {"text": "x" * size, "other": 1})
        run = runner.service.claim([template], "a worker")
        assert run is not None
        assert {name: len(text) for name, text in run.stored.items()} == {
            "text": size + 2,
            "other": 1,
        }


def test_nothing_is_claimed_in_a_transaction_that_could_undo_it(runner: FlowRunner) -> None:
    template = runner.register_flow_template(template_of("a"))
    flow = runner.schedule_flow("order")
    with pytest.raises(OuterTransaction), transaction.atomic(using=connection.alias):
        runner.service.claim([template], "a worker")
    assert runner.service.get_flow_execution(flow).status == FlowStatus.SCHEDULED


@pytest.mark.skipif(connection.vendor != "postgresql", reason="only PostgreSQL skips locked rows")
def test_i3_a_flow_that_another_worker_has_locked_is_skipped(runner: FlowRunner) -> None:
    template = runner.register_flow_template(template_of("a"))
    best, other = runner.schedule_flow("order", priority=9), runner.schedule_flow("order")
    runner.service.repository.rank_due()
    rival = connection.copy()
    try:
        rival.set_autocommit(False)
        with rival.cursor() as cursor:
            cursor.execute(f"SELECT 1 FROM {FLOW} WHERE id = %s FOR UPDATE", [best.pk])
        with connection.cursor() as cursor:
            cursor.execute("SET lock_timeout = '2s'")
        run = runner.service.claim([template], "a worker")
    finally:
        rival.close()
        connection.close()
    assert run is not None
    assert run.flow.pk == other.pk


def test_i2_attempts_from_before_a_step_use_up_no_allowance_of_its_next_task(
    runner: FlowRunner,
) -> None:
    run = claimed(runner, runner.register_flow_template(template_of("a", "b")))
    # As where a deploy has put another task in front of one that was tried.
    run.earlier_attempts = {"b": 2}
    assert runner.service.succeed_step(run, {"x": "1"}, "b")
    assert (run.attempt, run.counted_attempts) == (3, 1)
    last = TaskExecution.objects.order_by("pk").last()
    assert last is not None
    assert (last.pk, last.attempt, last.status) == (run.task_execution_id, 3, "RUNNING")
    assert runner.service.get_flow_execution(run.flow).forgiven_attempts == 2


def test_what_the_database_undid_is_made_again_as_often_as_a_worker_may_be_lost(
    runner: FlowRunner,
) -> None:
    template = runner.register_flow_template(template_of("a"))
    run, most = claimed(runner, template), get_settings().MAX_INTERRUPTIONS
    error = BodyFailed(OperationalError("deadlock"), was_undone=True)
    for run.interruptions in range(most + 1):
        again = _Again.of(run, template.tasks[0], error)
        expected = (0, True) if run.interruptions < most else (None, False)
        assert (again.after, again.interrupted) == expected


def test_of_several_that_ask_for_later_the_latest_counts(runner: FlowRunner) -> None:
    template = runner.register_flow_template(template_of("a"))
    run = claimed(runner, template)
    for delays in ([9, 5], [5, 9], [0, 9]):
        group = ExceptionGroup("later", [RetryLater(delay) for delay in delays])
        again = _Again.of(run, template.tasks[0], BodyFailed(group))
        assert (again.after, again.forgive) == (9, True)
