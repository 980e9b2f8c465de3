"""What a user of the runner sees: schedule, run, fail, continue, rerun, fork, cancel."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from datetime import datetime, timedelta
from typing import Any

import pytest
from django.core.exceptions import ObjectDoesNotExist
from django.db import connections
from django.utils import timezone
from django_q.models import OrmQ

from ebbs_and_flows import (
    DuplicateEntry,
    EbbsAndFlowsError,
    ExecutionContext,
    FailFlow,
    FlowExecutionNotFound,
    FlowRunner,
    FlowStatus,
    FlowTemplate,
    FlowTemplateNotFound,
    IllegalTransition,
    InvalidArgument,
    OuterTransaction,
    Retry,
    RetryLater,
    Task,
    TaskNotFound,
    TaskStatus,
    UnstorableValue,
    task,
)
from ebbs_and_flows.models import (
    ExecutionContextEntry,
    FlowExecution,
    FlowTemplateState,
    FlowTransition,
)
from tests.shop.models import Order

from .databases import atomic, connection

pytestmark = pytest.mark.django_db


class Script(Task):
    """A task that does what the test tells it, and counts."""

    def __init__(self, name: str, *outcomes: Any, **options: Any) -> None:
        super().__init__(name=name)
        self.outcomes = list(outcomes)
        self.seen: list[ExecutionContext] = []
        for option, value in options.items():
            setattr(self, option, value)

    def run(self, context: ExecutionContext) -> ExecutionContext:
        self.seen.append(context)
        outcome = self.outcomes.pop(0) if self.outcomes else None
        if isinstance(outcome, BaseException):
            raise outcome
        if callable(outcome):
            return outcome(context)  # type: ignore[no-any-return]
        return context.copy() if outcome is None else context.with_entries(**outcome)


def flow_of(runner: FlowRunner, *tasks: Task, name: str = "billing") -> FlowTemplate:
    return runner.register_flow_template(FlowTemplate(name, tasks=tasks))


def history(runner: FlowRunner, flow: FlowExecution) -> list[tuple[str, int, str]]:
    attempts = runner.service.get_flow_task_execution_history(flow)
    return [(row.task_name, row.attempt, str(row.status)) for row in attempts]


def path(flow: FlowExecution) -> list[str]:
    rows = FlowTransition.objects.filter(flow_execution=flow).order_by("pk")
    return ["", *[str(row.to_status) for row in rows]]


def make_due(flow: FlowExecution) -> None:
    FlowExecution.objects.filter(pk=flow.pk).update(run_at=timezone.now() - timedelta(seconds=1))


# Running to the end


def test_a_flow_runs_its_tasks_in_order_and_keeps_what_they_wrote(runner: FlowRunner) -> None:
    first, second = Script("first", {"a": 1}), Script("second", lambda c: c.with_entries(b=c["a"]))
    flow_of(runner, first, second)
    scheduled = runner.schedule_flow("billing", {"order": 7})
    assert scheduled.status == FlowStatus.SCHEDULED
    assert scheduled.task_names == ["first", "second"]

    flow = runner.run_flow()

    assert flow is not None
    assert flow.pk == scheduled.pk
    assert flow.status == FlowStatus.SUCCEEDED
    assert flow.is_finished
    assert dict(flow.execution_context) == {"order": 7, "a": 1, "b": 1}
    assert history(runner, flow) == [("first", 1, "SUCCEEDED"), ("second", 1, "SUCCEEDED")]
    assert path(flow) == ["", "CREATED", "SCHEDULED", "RUNNING", "SUCCEEDED"]
    assert flow.started_at is not None
    assert flow.finished_at is not None
    assert flow.created_at <= flow.started_at <= flow.finished_at
    assert flow.duration is not None
    assert flow.duration >= timedelta(0)
    assert flow.lease_expires_at is None
    assert runner.run_flow() is None


def test_run_flow_is_none_when_nothing_is_due(runner: FlowRunner) -> None:
    flow_of(runner, Script("only"))
    assert runner.run_flow() is None
    assert runner.re_run_flow() is None
    runner.schedule_flow("billing", run_at=timezone.now() + timedelta(hours=1))
    assert runner.run_flow() is None


def test_the_best_due_flow_goes_first(runner: FlowRunner) -> None:
    flow_of(runner, Script("only"))
    now = timezone.now()
    later = runner.schedule_flow("billing", run_at=now - timedelta(minutes=1))
    earlier = runner.schedule_flow("billing", run_at=now - timedelta(minutes=2))
    same = runner.schedule_flow("billing", run_at=now - timedelta(minutes=2))
    urgent = runner.schedule_flow("billing", priority=5)
    runner.schedule_flow("billing", priority=100, run_at=now + timedelta(hours=1))
    ran = [flow.pk for flow in iter(runner.run_flow, None)]
    assert ran == [urgent.pk, earlier.pk, same.pk, later.pk]


@pytest.mark.parametrize("strategy", [FlowStatus.RUNNING, FlowStatus.FAILED, "soon", None, 3])
def test_only_what_waits_can_be_a_strategy(runner: FlowRunner, strategy: Any) -> None:
    flow_of(runner, Script("only"))
    runner.schedule_flow("billing")
    with pytest.raises(ValueError, match="FlowStatus.SCHEDULED or FlowStatus.RESCHEDULED"):
        runner.run_flow(strategy)
    assert FlowExecution.objects.get().status == FlowStatus.SCHEDULED


def test_a_strategy_may_be_the_text_of_the_status(runner: FlowRunner) -> None:
    flow_of(runner, Script("only"))
    runner.schedule_flow("billing")
    assert runner.run_flow("SCHEDULED") is not None  # type: ignore[arg-type]


def test_flows_of_unknown_templates_stay_where_they_are(runner: FlowRunner) -> None:
    flow_of(runner, Script("only"))
    flow = runner.schedule_flow("billing")
    stranger = FlowRunner()
    assert stranger.run_flow() is None
    with pytest.raises(FlowTemplateNotFound, match="registered ones are none"):
        stranger.run_flow_execution(flow)
    flow.refresh_from_db()
    assert flow.status == FlowStatus.SCHEDULED


def test_an_async_task_is_awaited(runner: FlowRunner) -> None:
    async def fetch(context: ExecutionContext) -> ExecutionContext:
        return context.with_entries(fetched=True)

    flow_of(runner, task(fetch))
    runner.schedule_flow("billing")
    flow = runner.run_flow()
    assert flow is not None
    assert dict(flow.execution_context) == {"fetched": True}


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("fails", [True, False])
def test_an_async_atomic_task_commits_with_its_record_or_not_at_all(
    runner: FlowRunner, fails: bool
) -> None:
    async def pay(context: ExecutionContext) -> ExecutionContext:
        await Order.objects.acreate(number="42")
        if fails:
            raise ValueError("no")
        return context

    flow_of(runner, task(name="pay", atomic=True)(pay))
    runner.run_flow_execution(runner.schedule_flow("billing"))
    assert Order.objects.count() == (0 if fails else 1)


def test_a_task_learns_its_flow_attempt_and_idempotency_key(runner: FlowRunner) -> None:
    first = Script("first")
    charge = Script("charge", ConnectionError(), None)
    flow_of(runner, first, charge)
    flow = runner.schedule_flow("billing")
    runner.run_flow()
    runner.reschedule_flow_execution(flow)
    runner.re_run_flow()
    one, two = charge.seen
    assert (one.flow_execution_id, one.task_name, one.attempt) == (flow.pk, "charge", 1)
    assert (two.flow_execution_id, two.task_name, two.attempt) == (flow.pk, "charge", 2)
    assert one.idempotency_key == two.idempotency_key
    assert one.idempotency_key != first.seen[0].idempotency_key


def test_what_a_task_mutates_in_place_never_reaches_the_next_one(runner: FlowRunner) -> None:
    def mutate(context: ExecutionContext) -> ExecutionContext:
        context["rows"].append(4)
        return context

    watcher = Script("watcher")
    flow_of(runner, Script("first", mutate), watcher)
    runner.schedule_flow("billing", {"rows": [1, 2, 3]})
    flow = runner.run_flow()
    assert flow is not None
    assert flow.status == FlowStatus.SUCCEEDED
    assert watcher.seen[0]["rows"] == [1, 2, 3]
    assert flow.execution_context["rows"] == [1, 2, 3]


def test_entries_left_out_of_a_result_stay_stored(runner: FlowRunner) -> None:
    flow_of(runner, Script("first", lambda context: ExecutionContext({"b": 2})), Script("second"))
    runner.schedule_flow("billing", {"a": 1})
    flow = runner.run_flow()
    assert flow is not None
    assert dict(flow.execution_context) == {"a": 1, "b": 2}


def test_an_atomic_task_is_undone_with_its_failure(runner: FlowRunner) -> None:
    def pay_and_fail(context: ExecutionContext) -> ExecutionContext:
        Order.objects.create(number="42")
        raise ValueError("no")

    def pay(context: ExecutionContext) -> ExecutionContext:
        Order.objects.create(number="42")
        return context

    flow_of(runner, Script("pay", pay_and_fail, pay, atomic=True))
    flow = runner.schedule_flow("billing")
    runner.run_flow()
    assert Order.objects.count() == 0
    runner.reschedule_flow_execution(flow)
    runner.re_run_flow()
    assert Order.objects.count() == 1


# Failing


@pytest.mark.parametrize(
    ("outcome", "error_type", "says"),
    [
        (lambda context: None, "InvalidTaskResult", "context.with_entries"),
        (lambda context: {"a": 2}, "InvalidTaskResult", "returned dict"),
        (lambda context: context.add("b", 1), "FrozenContext", "read-only"),
        (lambda context: ExecutionContext({"a": 2}), "ChangedEntry", "'a'"),
        ({"bad": object()}, "UnstorableValue", "'bad'"),
        ({"bad": float("nan")}, "UnstorableValue", "'bad'"),
        ({"big": "x" * (1024 * 1024)}, "EntryTooLarge", "'big'"),
        (lambda context: context.with_entries(a=1), "DuplicateEntry", "'a'"),
        (SystemExit(3), "SystemExit", "3"),
        (ValueError("boom"), "ValueError", "boom"),
    ],
)
def test_a_bad_result_fails_the_task_that_returned_it(
    runner: FlowRunner, outcome: Any, error_type: str, says: str
) -> None:
    never = Script("never")
    flow_of(runner, Script("bad", outcome), never)
    runner.schedule_flow("billing", {"a": 1})
    flow = runner.run_flow()
    assert flow is not None
    assert flow.status == FlowStatus.FAILED
    assert flow.current_task_index == 0
    attempt = runner.service.get_flow_task_execution_history(flow)[0]
    assert attempt.status == TaskStatus.FAILED
    assert attempt.error_type == error_type
    assert attempt.output.startswith(error_type) or f".{error_type}" in attempt.output
    assert says in attempt.output
    assert dict(flow.execution_context) == {"a": 1}
    assert never.seen == []


def test_the_output_has_the_causes_the_notes_and_no_frame_of_this_app(runner: FlowRunner) -> None:
    def fail(context: ExecutionContext) -> ExecutionContext:
        try:
            raise KeyError("missing")
        except KeyError as cause:
            error = RuntimeError("could not charge\x00 \ud83d")
            error.add_note("card ends in 4242")
            raise error from cause

    flow_of(runner, Script("charge", fail))
    runner.schedule_flow("billing")
    flow = runner.run_flow()
    assert flow is not None
    output = runner.service.get_flow_task_execution_history(flow)[0].output
    assert output.startswith("RuntimeError: could not charge\\x00 \\ud83d")
    assert "card ends in 4242" in output
    assert "KeyError: 'missing'" in output
    assert "direct cause" in output
    assert "worker.py" not in output


def test_a_long_output_is_cut_in_the_middle_and_says_so(runner: FlowRunner, settings: Any) -> None:
    settings.EBBS_AND_FLOWS = {"MAX_OUTPUT_BYTES": 2000}
    flow_of(runner, Script("long", ValueError("ä" * 5000 + "the end")))
    runner.schedule_flow("billing")
    flow = runner.run_flow()
    assert flow is not None
    output = runner.service.get_flow_task_execution_history(flow)[0].output
    assert len(output.encode()) <= 2000
    assert output.startswith("ValueError: ää")
    assert output.rstrip().endswith("the end")
    assert "bytes or more cut here" in output


def test_a_failed_flow_continues_at_the_failed_task(runner: FlowRunner) -> None:
    first, second, third = (
        Script("first", {"a": 1}),
        Script("second", OSError("down"), {"b": 2}),
        Script("third"),
    )
    flow_of(runner, first, second, third)
    flow = runner.schedule_flow("billing")
    assert runner.run_flow().status == FlowStatus.FAILED  # type: ignore[union-attr]
    assert runner.run_flow() is None
    assert runner.re_run_flow() is None

    rescheduled = runner.reschedule_flow_execution(flow, actor="ada", reason="the bank is back")
    assert rescheduled.status == FlowStatus.RESCHEDULED
    assert runner.run_flow() is None
    ended = runner.re_run_flow()

    assert ended is not None
    assert ended.status == FlowStatus.SUCCEEDED
    assert [len(item.seen) for item in (first, second, third)] == [1, 2, 1]
    assert history(runner, ended) == [
        ("first", 1, "SUCCEEDED"),
        ("second", 1, "FAILED"),
        ("second", 2, "SUCCEEDED"),
        ("third", 1, "SUCCEEDED"),
    ]
    row = FlowTransition.objects.get(flow_execution=flow, to_status="RESCHEDULED")
    assert (row.from_status, row.actor, row.reason) == ("FAILED", "ada", "the bank is back")


def test_a_retry_is_a_later_reschedule_until_the_attempts_are_used_up(runner: FlowRunner) -> None:
    retry = Retry(attempts=3, delay=60, backoff=2, jitter=False, on=(OSError,))
    flow_of(runner, Script("charge", *[OSError("down")] * 9, retry=retry))
    flow = runner.schedule_flow("billing")
    for wait in (60, 120):
        ran = runner.run_next()
        assert ran is not None
        assert ran.status == FlowStatus.RESCHEDULED
        assert abs((ran.run_at - timezone.now()).total_seconds() - wait) < 30
        assert runner.run_next() is None
        make_due(flow)
    ended = runner.run_next()
    assert ended is not None
    assert ended.status == FlowStatus.FAILED
    assert [row[1] for row in history(runner, flow)] == [1, 2, 3]

    # By hand it gets the whole allowance anew, and attempts go on counting.
    runner.reschedule_flow_execution(flow)
    for expected in (FlowStatus.RESCHEDULED, FlowStatus.RESCHEDULED, FlowStatus.FAILED):
        ran = runner.run_next()
        assert ran is not None
        assert ran.status == expected
        make_due(flow)
    assert [row[1] for row in history(runner, flow)] == [1, 2, 3, 4, 5, 6]


def test_an_error_that_is_not_retried_fails_at_once(runner: FlowRunner) -> None:
    retry = Retry(attempts=3, on=(OSError,))
    flow_of(runner, Script("charge", ValueError("bad card"), retry=retry))
    runner.schedule_flow("billing")
    assert runner.run_flow().status == FlowStatus.FAILED  # type: ignore[union-attr]


def test_fail_flow_and_retry_later_override_the_rule(runner: FlowRunner) -> None:
    charge = Script(
        "charge",
        RetryLater(60, "the bank opens at 8"),
        RetryLater(60),
        OSError("down"),
        FailFlow("the card was stolen"),
        retry=Retry(attempts=2, delay=60, on=(OSError,)),
    )
    flow_of(runner, charge)
    flow = runner.schedule_flow("billing")
    for _ in range(3):
        ran = runner.run_next()
        assert ran is not None
        assert ran.status == FlowStatus.RESCHEDULED
        make_due(flow)
    ended = runner.run_next()
    assert ended is not None
    assert ended.status == FlowStatus.FAILED
    last = runner.service.get_flow_task_execution_history(flow)[-1]
    assert (last.attempt, last.error_type) == (4, "FailFlow")
    assert "the card was stolen" in last.output
    reasons = FlowTransition.objects.filter(flow_execution=flow).values_list("reason", flat=True)
    assert "the bank opens at 8" in list(reasons)


def test_a_task_that_asks_for_later_is_told_of_as_no_failure(
    runner: FlowRunner, caplog: pytest.LogCaptureFixture
) -> None:
    flow_of(
        runner, Script("poll", RetryLater(3600, "The parcel is on its way."), ValueError("no"))
    )
    flow = runner.schedule_flow("billing")
    with caplog.at_level("INFO", "ebbs_and_flows"):
        runner.run_next()
        make_due(flow)
        runner.run_next()
    asked, failed = [record for record in caplog.records if "Task poll" in record.getMessage()]
    assert (asked.levelname, asked.getMessage()) == (
        "INFO",
        f"Task poll of flow {flow.pk} asked to be called again in 3600 s.",
    )
    assert failed.levelname == "WARNING"
    first, second = runner.service.get_flow_task_execution_history(flow)
    assert (first.status, first.error_type) == ("FAILED", "RetryLater")
    assert first.output == "The parcel is on its way."
    assert (first.asked_for_later, second.asked_for_later) == (True, False)
    assert "Traceback" in second.output
    failures = FlowTransition.objects.filter(flow_execution=flow, to_status=FlowStatus.FAILED)
    assert [failure.reason for failure in failures.order_by("pk")] == [
        "poll asked to be called again",
        "poll failed: ValueError",
    ]


def test_a_task_that_asks_for_later_than_the_deadline_has_failed(
    runner: FlowRunner, caplog: pytest.LogCaptureFixture
) -> None:
    runner.register_flow_template(
        FlowTemplate("billing", tasks=[Script("poll", RetryLater(3600))], deadline=60)
    )
    flow = runner.schedule_flow("billing")
    with caplog.at_level("INFO", "ebbs_and_flows"):
        ran = runner.run_next()
    assert ran is not None
    assert ran.status == FlowStatus.FAILED
    assert f"Task poll of flow {flow.pk} failed: RetryLater" in caplog.messages
    (attempt,) = runner.service.get_flow_task_execution_history(flow)
    assert attempt.output.startswith("RetryLater: The task asked to be tried again in 3600 s.")


# Scheduling


def test_a_key_makes_scheduling_idempotent(runner: FlowRunner) -> None:
    flow_of(runner, Script("only"))
    flow_of(runner, Script("only"), name="other")
    first = runner.schedule_flow("billing", {"a": 1}, key="order-42")
    runner.run_flow()
    again = runner.schedule_flow("billing", {"a": 2}, key="order-42")
    assert again.pk == first.pk
    assert again.status == FlowStatus.SUCCEEDED
    assert dict(again.execution_context) == {"a": 1}
    assert runner.schedule_flow("other", key="order-42").pk != first.pk
    assert runner.schedule_flow("billing", key="Order-42").pk != first.pk
    assert runner.schedule_flow("billing").pk != runner.schedule_flow("billing").pk


def test_scheduling_vanishes_with_the_callers_transaction(runner: FlowRunner) -> None:
    flow_of(runner, Script("only"))
    with pytest.raises(ZeroDivisionError), atomic():
        runner.schedule_flow("billing", {"a": 1}, key="k")
        raise ZeroDivisionError
    assert not FlowExecution.objects.exists()
    assert not ExecutionContextEntry.objects.exists()
    assert not OrmQ.objects.exists()


def test_a_due_flow_is_dispatched_once_and_a_later_one_not_yet(runner: FlowRunner) -> None:
    flow_of(runner, Script("only"))
    runner.schedule_flow("billing", key="k")
    assert OrmQ.objects.count() == 1
    runner.schedule_flow("billing", key="k")
    runner.schedule_flow("billing", run_at=timezone.now() + timedelta(hours=1))
    assert OrmQ.objects.count() == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"priority": 101}, "-100 to 100"),
        ({"priority": 1.5}, "1.5"),
        ({"priority": True}, "True"),
        ({"run_at": datetime(2026, 1, 1)}, "without a time zone"),
        ({"run_at": "tomorrow"}, "'tomorrow'"),
        ({"run_at": datetime(1, 1, 2, tzinfo=timezone.get_fixed_timezone(60))}, "year"),
        ({"key": ""}, "key"),
        ({"key": " k"}, "' k'"),
        ({"key": "k" * 201}, "201"),
        ({"key": "a\x00"}, "printable"),
        ({"key": 42}, "42"),
        ({"actor": "x\ny"}, "actor"),
        ({"context": {"": 1}}, "empty"),
        ({"context": {"a": object()}}, "'a'"),
        ({"context": [("a", 1)]}, "mapping"),
        ({"context": 7}, "mapping"),
        ({"context": {"a": "x" * 2**20}}, "MAX_ENTRY_BYTES"),
    ],
)
def test_bad_arguments_are_one_sentence_and_change_nothing(
    runner: FlowRunner, arguments: dict[str, Any], says: str
) -> None:
    flow_of(runner, Script("only"))
    with pytest.raises(EbbsAndFlowsError, match=says) as caught:
        runner.schedule_flow("billing", **arguments)
    assert "\n" not in str(caught.value)
    assert not FlowExecution.objects.exists()
    assert not OrmQ.objects.exists()


def test_an_unknown_template_names_the_known_ones(runner: FlowRunner) -> None:
    flow_of(runner, Script("only"))
    with pytest.raises(LookupError, match=r"'bilingual'.*are billing\."):
        runner.schedule_flow("bilingual")


@pytest.mark.parametrize("unknown", [0, -1, 10**30, "x", "12x", None, 4.5, True, 999_999])
def test_an_unknown_flow_is_one_sentence_from_every_method(
    runner: FlowRunner, unknown: Any
) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: runner.run_flow_execution(unknown),
        lambda: runner.reschedule_flow_execution(unknown),
        lambda: runner.fork_flow_execution(unknown),
        lambda: runner.complete_failed_task(unknown, reason="done"),
        lambda: runner.cancel_flow_execution(unknown),
        lambda: runner.service.get_flow_execution(unknown),
        lambda: runner.service.get_flow_task_execution_history(unknown),
        lambda: runner.service.update_flow_status(unknown, FlowStatus.CANCELLED),
    ]
    for call in calls:
        with pytest.raises(FlowExecutionNotFound, match="There is no flow execution"):
            call()


def test_a_deleted_flow_is_not_found(runner: FlowRunner) -> None:
    flow_of(runner, Script("only"))
    flow = runner.schedule_flow("billing")
    FlowExecution.objects.all().delete()
    with pytest.raises(FlowExecutionNotFound):
        runner.run_flow_execution(flow)
    with pytest.raises(FlowExecutionNotFound):
        runner.cancel_flow_execution(flow)


def test_a_context_of_another_flow_can_be_handed_on(runner: FlowRunner) -> None:
    flow_of(runner, Script("only", {"total": 3}))
    runner.schedule_flow("billing", {"a": (1, 2)})
    first = runner.run_flow()
    assert first is not None
    second = runner.schedule_flow("billing", first.execution_context)
    assert dict(second.execution_context) == {"a": (1, 2), "total": 3}


# One flow, now


def test_run_flow_execution_does_not_wait_for_its_time(runner: FlowRunner) -> None:
    flow_of(runner, Script("only"))
    flow = runner.schedule_flow("billing", run_at=timezone.now() + timedelta(days=1))
    assert runner.run_flow_execution(flow.pk).status == FlowStatus.SUCCEEDED


def test_run_flow_execution_leaves_what_it_cannot_claim_untouched(runner: FlowRunner) -> None:
    only = Script("only", ValueError("no"))
    flow_of(runner, only)
    failed = runner.run_flow_execution(runner.schedule_flow("billing"))
    cancelled = runner.cancel_flow_execution(runner.schedule_flow("billing"))
    for flow in (failed, cancelled):
        before = FlowExecution.objects.filter(pk=flow.pk).values().get()
        assert runner.run_flow_execution(flow).status == flow.status
        assert FlowExecution.objects.filter(pk=flow.pk).values().get() == before
    assert len(only.seen) == 1


def test_what_runs_elsewhere_is_left_alone(runner: FlowRunner) -> None:
    seen: list[FlowExecution] = []

    def meanwhile(context: ExecutionContext) -> ExecutionContext:
        seen.append(runner.run_flow_execution(flow))
        return context

    only = Script("only", meanwhile)
    flow_of(runner, only)
    flow = runner.schedule_flow("billing")
    assert runner.run_flow_execution(flow).status == FlowStatus.SUCCEEDED
    assert [row.status for row in seen] == [FlowStatus.RUNNING]
    assert len(only.seen) == 1


@pytest.mark.django_db(transaction=True)
def test_running_inside_somebodys_transaction_is_refused(runner: FlowRunner) -> None:
    flow_of(runner, Script("only"))
    flow = runner.schedule_flow("billing")
    for call in (runner.run_flow, runner.re_run_flow, lambda: runner.run_flow_execution(flow)):
        with pytest.raises(OuterTransaction, match="outside of atomic"), atomic():
            call()
    flow.refresh_from_db()
    assert (flow.status, flow.claim) == (FlowStatus.SCHEDULED, 0)


# Forking, done by hand, cancelling


def test_a_fork_starts_with_the_context_as_the_task_first_saw_it(runner: FlowRunner) -> None:
    first, second = Script("first", {"a": 1}), Script("second", {"b": 2}, {"b": 3})
    flow_of(runner, first, second)
    runner.schedule_flow("billing", {"order": 7}, priority=9)
    source = runner.run_flow()
    assert source is not None

    fork = runner.fork_flow_execution(
        source, from_task="second", changes={"order": 8, "new": True}
    )

    assert fork.pk != source.pk
    assert fork.rerun_of_id == source.pk
    assert (fork.status, fork.priority, fork.first_task_index) == (FlowStatus.SCHEDULED, 9, 1)
    assert dict(fork.execution_context) == {"a": 1, "order": 8, "new": True}
    ended = runner.run_flow()
    assert ended is not None
    assert dict(ended.execution_context) == {"a": 1, "order": 8, "new": True, "b": 3}
    assert [len(item.seen) for item in (first, second)] == [1, 2]
    source.refresh_from_db()
    assert dict(source.execution_context) == {"order": 7, "a": 1, "b": 2}
    assert [row.pk for row in source.reruns.all()] == [fork.pk]


def test_a_fork_from_the_start_has_what_was_scheduled(runner: FlowRunner) -> None:
    flow_of(runner, Script("first", {"a": 1}, {"a": 2}), Script("second"))
    runner.schedule_flow("billing", {"order": 7}, key="k")
    source = runner.run_flow()
    assert source is not None
    fork = runner.fork_flow_execution(source.pk)
    assert fork.key is None
    assert dict(fork.execution_context) == {"order": 7}
    assert runner.run_flow().execution_context["a"] == 2  # type: ignore[union-attr]


def test_a_fork_only_goes_back_to_a_task_that_was_reached(runner: FlowRunner) -> None:
    flow_of(runner, Script("first", {"a": 1}), Script("second", ValueError("no")), Script("third"))
    flow = runner.schedule_flow("billing")
    runner.run_flow()
    with pytest.raises(TaskNotFound, match="has not reached task 'third'"):
        runner.fork_flow_execution(flow, from_task="third")
    with pytest.raises(TaskNotFound, match="0 first, 1 second, 2 third"):
        runner.fork_flow_execution(flow, from_task="fourth")
    fork = runner.fork_flow_execution(flow, from_task=1)
    with pytest.raises(TaskNotFound, match="fork the flow it is a rerun of"):
        runner.fork_flow_execution(fork, from_task=0)
    with pytest.raises(UnstorableValue):
        runner.fork_flow_execution(flow, changes={"a": object()})
    assert FlowExecution.objects.count() == 2


def test_a_fork_of_an_unfinished_flow_leaves_it_running(runner: FlowRunner) -> None:
    flow_of(runner, Script("first"))
    flow = runner.schedule_flow("billing", {"a": 1})
    fork = runner.fork_flow_execution(flow)
    assert dict(fork.execution_context) == {"a": 1}
    assert runner.service.get_flow_execution(flow).status == FlowStatus.SCHEDULED


def test_a_task_done_by_hand_is_recorded_and_the_flow_goes_on_after_it(runner: FlowRunner) -> None:
    last = Script("last")
    flow_of(runner, Script("first"), Script("charge", ValueError("no")), last)
    flow = runner.schedule_flow("billing")
    runner.run_flow()

    done = runner.complete_failed_task(
        flow, {"receipt": "R1"}, reason="charged by phone", actor="ada"
    )

    assert (done.status, done.current_task_index) == (FlowStatus.RESCHEDULED, 2)
    attempt = runner.service.get_flow_task_execution_history(flow)[-1]
    assert (attempt.task_name, attempt.attempt, attempt.status) == ("charge", 2, "SUCCEEDED")
    assert "ada" in attempt.output
    assert "charged by phone" in attempt.output
    assert ExecutionContextEntry.objects.get(name="receipt").task_execution_id == attempt.pk
    ended = runner.re_run_flow()
    assert ended is not None
    assert ended.status == FlowStatus.SUCCEEDED
    assert last.seen[0]["receipt"] == "R1"


def test_the_last_task_done_by_hand_ends_the_flow(runner: FlowRunner) -> None:
    flow_of(runner, Script("charge", ValueError("no")))
    flow = runner.schedule_flow("billing")
    runner.run_flow()
    runner.complete_failed_task(flow, reason="done")
    ended = runner.re_run_flow()
    assert ended is not None
    assert ended.status == FlowStatus.SUCCEEDED
    assert history(runner, flow) == [("charge", 1, "FAILED"), ("charge", 2, "SUCCEEDED")]


def test_done_by_hand_refuses_what_cannot_be(runner: FlowRunner) -> None:
    flow_of(runner, Script("charge", ValueError("no")))
    flow = runner.schedule_flow("billing", {"a": 1})
    with pytest.raises(IllegalTransition, match="SCHEDULED"):
        runner.complete_failed_task(flow, reason="done")
    runner.run_flow()
    with pytest.raises(DuplicateEntry, match="'a'"):
        runner.complete_failed_task(flow, {"a": 2}, reason="done")
    with pytest.raises(InvalidArgument, match="reason"):
        runner.complete_failed_task(flow, reason=" ")
    with pytest.raises(UnstorableValue):
        runner.complete_failed_task(flow, {"b": object()}, reason="done")
    flow.refresh_from_db()
    assert (flow.status, flow.current_task_index) == (FlowStatus.FAILED, 0)
    assert len(history(runner, flow)) == 1


def test_cancelling_what_waits_is_immediate(runner: FlowRunner) -> None:
    flow_of(runner, Script("only", ValueError("no")))
    waiting = runner.schedule_flow("billing")
    cancelled = runner.cancel_flow_execution(waiting, actor="ada", reason="a mistake")
    assert cancelled.status == FlowStatus.CANCELLED
    assert cancelled.finished_at is not None
    row = FlowTransition.objects.get(flow_execution=waiting, to_status="CANCELLED")
    assert (row.actor, row.reason) == ("ada", "a mistake")
    failed = runner.run_flow_execution(runner.schedule_flow("billing"))
    assert failed.status == FlowStatus.FAILED
    assert runner.cancel_flow_execution(failed).status == FlowStatus.CANCELLED
    with pytest.raises(IllegalTransition, match=r"from CANCELLED to CANCELLED: .*fork it"):
        runner.cancel_flow_execution(waiting)


def test_cancelling_what_runs_waits_for_the_task_in_progress(runner: FlowRunner) -> None:
    def cancel(context: ExecutionContext) -> ExecutionContext:
        asked = runner.cancel_flow_execution(flow, actor="ada", reason="sold out")
        assert (asked.status, asked.cancel_requested) == (FlowStatus.RUNNING, True)
        runner.cancel_flow_execution(flow, actor="bob")
        return context.with_entries(done=True)

    never = Script("never")
    flow_of(runner, Script("first", cancel), never)
    flow = runner.schedule_flow("billing")
    ended = runner.run_flow()
    assert ended is not None
    assert ended.status == FlowStatus.CANCELLED
    assert history(runner, flow) == [("first", 1, "SUCCEEDED")]
    assert dict(ended.execution_context) == {"done": True}
    assert never.seen == []
    cancelled = FlowTransition.objects.get(to_status="CANCELLED")
    assert (cancelled.actor, cancelled.reason) == ("ada", "sold out")


@pytest.mark.parametrize("is_atomic", [False, True])
def test_a_cancellation_during_the_last_task_which_succeeds_is_too_late(
    runner: FlowRunner, is_atomic: bool
) -> None:
    def cancel(context: ExecutionContext) -> ExecutionContext:
        runner.cancel_flow_execution(flow, actor="ada", reason="sold out")
        return context.with_entries(done=True)

    flow_of(runner, Script("first"), task(name="last", atomic=is_atomic)(cancel))
    flow = runner.schedule_flow("billing")
    ended = runner.run_flow()
    assert ended is not None
    assert (ended.status, ended.cancel_requested) == (FlowStatus.SUCCEEDED, False)
    assert (ended.current_task_index, dict(ended.execution_context)) == (2, {"done": True})
    assert history(runner, flow) == [("first", 1, "SUCCEEDED"), ("last", 1, "SUCCEEDED")]
    last = FlowTransition.objects.latest("pk")
    assert (last.from_status, last.to_status) == ("RUNNING", "SUCCEEDED")
    assert last.reason == (
        "The cancellation by ada came too late: during the last task, which succeeded."
    )


def test_a_last_task_that_saw_the_cancellation_may_be_half_done(runner: FlowRunner) -> None:
    def stop_early(context: ExecutionContext) -> ExecutionContext:
        runner.cancel_flow_execution(flow, actor="ada", reason="sold out")
        return context.with_entries(saw=context.cancel_requested)

    flow_of(runner, Script("first"), task(name="last")(stop_early))
    flow = runner.schedule_flow("billing")
    ended = runner.run_flow()
    assert ended is not None
    assert ended.status == FlowStatus.CANCELLED
    assert dict(ended.execution_context) == {"saw": True}
    assert FlowTransition.objects.latest("pk").reason == "sold out"


def test_a_flow_that_was_deleted_meanwhile_cannot_be_forked(runner: FlowRunner) -> None:
    template = flow_of(runner, Script("first"), Script("last"))
    flow = runner.schedule_flow("billing")
    runner.run_flow()
    source = runner.service.get_flow_execution(flow)
    # Pruned between the look at it and the fork.
    FlowExecution.objects.all().delete()
    with pytest.raises(FlowExecutionNotFound, match=f"no flow execution {source.pk}"):
        runner.service.fork(template, source, from_task="last")
    assert not FlowExecution.objects.exists()


def test_a_task_that_fails_while_being_cancelled_is_not_retried(runner: FlowRunner) -> None:
    def cancel(context: ExecutionContext) -> ExecutionContext:
        runner.cancel_flow_execution(flow)
        raise OSError("down")

    flow_of(runner, Script("first", cancel, retry=Retry(attempts=5)))
    flow = runner.schedule_flow("billing")
    ended = runner.run_flow()
    assert ended is not None
    assert ended.status == FlowStatus.CANCELLED
    assert history(runner, flow) == [("first", 1, "FAILED")]


def test_only_a_failed_flow_can_be_rescheduled(runner: FlowRunner) -> None:
    flow_of(runner, Script("only"))
    flow = runner.schedule_flow("billing")
    with pytest.raises(IllegalTransition, match=f"Flow {flow.pk} .*SCHEDULED to RESCHEDULED"):
        runner.reschedule_flow_execution(flow)
    runner.run_flow()
    with pytest.raises(IllegalTransition, match="to run it again, fork it"):
        runner.reschedule_flow_execution(flow)


def test_a_reschedule_takes_a_time_and_a_priority(runner: FlowRunner) -> None:
    flow_of(runner, Script("only", ValueError("no")))
    flow = runner.schedule_flow("billing")
    runner.run_flow()
    with pytest.raises(InvalidArgument):
        runner.reschedule_flow_execution(flow, run_at=datetime(2026, 1, 1))
    with pytest.raises(InvalidArgument):
        runner.reschedule_flow_execution(flow, priority=1000)
    tomorrow = timezone.now() + timedelta(days=1)
    rescheduled = runner.reschedule_flow_execution(flow, run_at=tomorrow, priority=100)
    assert rescheduled.priority == 100
    assert abs(rescheduled.run_at - tomorrow) < timedelta(milliseconds=1)
    assert rescheduled.finished_at is None
    assert runner.re_run_flow() is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda runner, flow: runner.reschedule_flow_execution(flow, reason=None),
            "reason is None",
        ),
        (lambda runner, flow: runner.reschedule_flow_execution(flow, reason=5), "reason is 5"),
        (lambda runner, flow: runner.reschedule_flow_execution(flow, actor=None), "actor is None"),
        (lambda runner, flow: runner.cancel_flow_execution(flow, reason=5), "reason is 5"),
        (lambda runner, flow: runner.cancel_flow_execution(flow, actor="a\x00"), "printable"),
        (lambda runner, flow: runner.complete_failed_task(flow, [1], reason="x"), "mapping"),
        (lambda runner, flow: runner.complete_failed_task(flow, reason=5), "reason is 5"),
        (lambda runner, flow: runner.fork_flow_execution(flow, from_task=1.5), "1.5"),
        (lambda runner, flow: runner.fork_flow_execution(flow, from_task=-1), "-1"),
        (lambda runner, flow: runner.fork_flow_execution(flow, changes=[1]), "mapping"),
        (lambda runner, flow: runner.fork_flow_execution(flow, changes={1: 1}), "not a int: 1"),
        (lambda runner, flow: runner.fork_flow_execution(flow, priority=101), "101"),
        (lambda runner, flow: runner.service.update_flow_status(flow, "LOST"), "'LOST'"),
        (
            lambda runner, flow: runner.service.update_flow_status(flow, "CANCELLED", actor=None),
            "actor is None",
        ),
        (lambda runner, flow: runner.pause_flow_template("billing", actor=5), "actor is 5"),
        (lambda runner, flow: runner.pause_flow_template("bilingual"), "'bilingual'"),
        (lambda runner, flow: runner.resume_flow_template(None), "None"),
    ],
)
def test_a_bad_change_is_one_sentence_and_changes_nothing(
    runner: FlowRunner, change: Callable[..., Any], says: str
) -> None:
    flow_of(runner, Script("only", ValueError("no")))
    flow = runner.run_flow_execution(runner.schedule_flow("billing"))
    models = (FlowExecution, FlowTransition, ExecutionContextEntry, FlowTemplateState, OrmQ)
    before = [list(model.objects.order_by("pk").values()) for model in models]
    with pytest.raises(EbbsAndFlowsError, match=says) as caught:
        change(runner, flow)
    assert "\n" not in str(caught.value)
    assert [list(model.objects.order_by("pk").values()) for model in models] == before


def test_a_reason_may_hold_what_no_database_does(runner: FlowRunner) -> None:
    flow_of(runner, Script("only", ValueError("no"), ValueError("no")))
    flow = runner.run_flow_execution(runner.schedule_flow("billing"))
    reason = "a\x00b \ud800 " + "long " * 100
    runner.reschedule_flow_execution(flow, reason=reason)
    runner.re_run_flow()
    runner.cancel_flow_execution(flow, reason=reason)
    rows = FlowTransition.objects.filter(flow_execution=flow, reason__contains="long long")
    assert [str(row.to_status) for row in rows.order_by("pk")] == ["RESCHEDULED", "CANCELLED"]
    assert rows[0].reason.startswith("a\\x00b \\ud800 long")


# Templates that change


def renamed(runner: FlowRunner, *tasks: Task, version: int = 2) -> FlowRunner:
    """A later release of the project: the same flows, another template."""
    later = FlowRunner(runner.service)
    template = FlowTemplate("billing", tasks=tasks, version=version)
    later.register_flow_template(template)
    return later


def test_a_resumed_flow_takes_the_rest_from_the_template_as_it_is_now(runner: FlowRunner) -> None:
    flow_of(runner, Script("first"), Script("second", ValueError("no")), Script("third"))
    flow = runner.schedule_flow("billing")
    runner.run_flow()
    first, added, second = Script("first"), Script("added"), Script("second")
    later = renamed(runner, first, added, second)
    later.reschedule_flow_execution(flow)
    ended = later.re_run_flow()
    assert ended is not None
    assert ended.status == FlowStatus.SUCCEEDED
    assert ended.task_names == ["first", "added", "second"]
    assert [len(item.seen) for item in (first, added, second)] == [0, 1, 1]


def test_a_drifted_flow_fails_naming_the_first_difference(runner: FlowRunner) -> None:
    flow_of(runner, Script("first"), Script("second"), Script("third", ValueError("no")))
    flow = runner.schedule_flow("billing")
    runner.run_flow()
    tasks = [Script("first"), Script("zwei"), Script("third")]
    later = renamed(runner, *tasks)
    later.reschedule_flow_execution(flow)
    ended = later.re_run_flow()
    assert ended is not None
    assert ended.status == FlowStatus.FAILED
    last = later.service.get_flow_task_execution_history(flow)[-1]
    assert last.error_type == "TemplateDrift"
    assert "'second' as task 1" in last.output
    assert "'zwei'" in last.output
    assert [len(item.seen) for item in tasks] == [0, 0, 0]


def test_a_template_that_lost_its_last_tasks_is_done_or_drifted(runner: FlowRunner) -> None:
    flow_of(runner, Script("first"), Script("second", ValueError("no")))
    flow = runner.schedule_flow("billing")
    runner.run_flow()
    later = renamed(runner, Script("first"))
    later.reschedule_flow_execution(flow)
    ended = later.re_run_flow()
    assert ended is not None
    assert ended.status == FlowStatus.SUCCEEDED
    shorter = renamed(runner, Script("other"), version=3)
    fork = later.fork_flow_execution(flow)
    assert shorter.run_flow_execution(fork).status == FlowStatus.SUCCEEDED


# Handing back


def test_a_worker_that_is_to_stop_hands_the_flow_back_at_a_task_boundary(
    runner: FlowRunner,
) -> None:
    first, second = Script("first", {"a": 1}), Script("second")
    flow_of(runner, first, second)
    flow = runner.schedule_flow("billing")
    handed = runner.run_next(stop=lambda: True)
    assert handed is not None
    assert handed.status == FlowStatus.RUNNING
    assert (handed.lease_expires_at, handed.claimed_by) == (None, "")
    assert history(runner, flow) == [("first", 1, "SUCCEEDED")]
    assert runner.run_flow() is None
    ended = runner.run_next()
    assert ended is not None
    assert ended.status == FlowStatus.SUCCEEDED
    assert [len(item.seen) for item in (first, second)] == [1, 1]
    assert path(ended) == ["", "CREATED", "SCHEDULED", "RUNNING", "SUCCEEDED"]


def test_a_flow_that_was_handed_back_can_be_cancelled_at_once(runner: FlowRunner) -> None:
    flow_of(runner, Script("first"), Script("second"))
    flow = runner.schedule_flow("billing")
    runner.run_next(stop=lambda: True)
    assert runner.cancel_flow_execution(flow).status == FlowStatus.CANCELLED
    assert runner.run_next() is None


def test_run_next_narrows_the_choice_to_templates(runner: FlowRunner) -> None:
    flow_of(runner, Script("only"))
    flow_of(runner, Script("only"), name="other")
    runner.schedule_flow("billing")
    wanted = runner.schedule_flow("other")
    assert runner.run_next(templates=["unknown"]) is None
    assert runner.run_next(templates=["other"]).pk == wanted.pk  # type: ignore[union-attr]
    assert runner.count_due() == 1


# Model references


def test_a_model_instance_travels_as_a_reference(runner: FlowRunner) -> None:
    def pay(context: ExecutionContext) -> ExecutionContext:
        order = context["order"]
        order.paid = True
        order.save()
        return context

    after = Script("after", lambda context: context.with_entries(paid=context["order"].paid))
    flow_of(runner, Script("pay", pay), after)
    order = Order.objects.create(number="42")
    runner.schedule_flow("billing", {"order": order})
    flow = runner.run_flow()
    assert flow is not None
    assert flow.execution_context["order"] == order
    assert flow.execution_context["paid"] is True
    order.delete()
    with pytest.raises(LookupError, match="'order'"):
        flow.execution_context["order"]
    assert not issubclass(ObjectDoesNotExist, EbbsAndFlowsError)


# Many at once


@pytest.mark.django_db(transaction=True)
def test_one_key_at_the_same_instant_makes_one_flow(runner: FlowRunner) -> None:
    flow_of(runner, Script("only"))
    barrier, made, errors = threading.Barrier(4), [], []

    def schedule(key: str, outer: bool) -> None:
        try:
            barrier.wait(10)
            with atomic() if outer else nullcontext():
                made.append(runner.schedule_flow("billing", {"a": 1}, key=key).pk)
        except Exception as error:  # noqa: BLE001 - shown by the assertion
            errors.append(error)
        finally:
            connections.close_all()

    for round_ in range(5):
        made.clear()
        threads = [
            threading.Thread(target=schedule, args=(f"k{round_}", n % 2 == 0)) for n in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert len(set(made)) == 1, round_
        for model in (FlowExecution, ExecutionContextEntry, OrmQ):
            assert model.objects.count() == round_ + 1
    assert connection.is_usable()


@pytest.mark.django_db(transaction=True)
def test_i2_i3_many_workers_run_each_flow_once(runner: FlowRunner) -> None:
    ran: list[int] = []
    lock = threading.Lock()

    def note(context: ExecutionContext) -> ExecutionContext:
        with lock:
            ran.append(context["number"])
        return context

    flow_of(runner, task(name="note")(note))
    for number in range(40):
        runner.schedule_flow("billing", {"number": number})
    errors: list[BaseException] = []

    def work() -> None:
        try:
            while runner.run_next() is not None:
                pass
        except BaseException as error:  # noqa: BLE001 - shown by the assertion
            errors.append(error)
        finally:
            connections.close_all()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sorted(ran) == list(range(40))
    assert not FlowExecution.objects.exclude(status=FlowStatus.SUCCEEDED).exists()
    assert not FlowExecution.objects.exclude(claim=1).exists()
