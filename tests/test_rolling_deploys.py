"""Workers of two releases side by side: no task is skipped, and no flow fails by a deploy."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import timedelta

import pytest
from django.core.management import call_command
from django.test.utils import CaptureQueriesContext

from ebbs_and_flows import (
    ExecutionContext,
    FlowRunner,
    FlowStatus,
    FlowTemplate,
    InvalidArgument,
    Retry,
    Task,
    TemplateDrift,
    steps,
    task,
)
from ebbs_and_flows.integrity import IntegrityCheck
from ebbs_and_flows.models import FlowExecution, FlowTransition, TaskExecution, WorkerProcess
from ebbs_and_flows.monitoring import Trouble, flows_that_fit_no_worker, plans_in_use, standing
from ebbs_and_flows.service import FlowService
from ebbs_and_flows.testing import move_clock

from .databases import connection

pytestmark = pytest.mark.django_db


def passes(name: str) -> Task:
    @task(name=name)
    def run(context: ExecutionContext) -> ExecutionContext:
        return context.with_entries(**{name: name})

    return run


def fails_once(name: str) -> Task:
    @task(name=name)
    def run(context: ExecutionContext) -> ExecutionContext:
        if context.attempt == 1:
            raise ValueError("no")
        return context.with_entries(**{name: name})

    return run


def release(
    names: str | Sequence[Task], version: int = 1, max_running: int | None = None
) -> FlowRunner:
    """A process of its own: a runner that knows one template, and remembers nothing else."""
    runner = FlowRunner(FlowService())
    tasks = [passes(name) for name in names] if isinstance(names, str) else names
    runner.register_flow_template(
        FlowTemplate("t", tasks=tasks, version=version, max_running=max_running)
    )
    return runner


def history(flow: FlowExecution) -> list[tuple[str, int, str]]:
    attempts = TaskExecution.objects.filter(flow_execution=flow).order_by("pk")
    return list(attempts.values_list("task_name", "attempt", "status"))


def hand_back(runner: FlowRunner) -> None:
    assert runner.run_next(stop=lambda: True) is not None


def findings() -> list[str]:
    return [str(item) for item in IntegrityCheck().findings()]


def test_an_older_worker_leaves_a_flow_with_a_task_at_the_end_that_it_has_not() -> None:
    new, old = release("abcn"), release("abc")
    flow = new.schedule_flow("t")
    assert old.run_next() is None
    assert not old.has_work()
    assert history(flow) == []
    ended = new.run_next()
    assert ended is not None
    assert ended.status == FlowStatus.SUCCEEDED
    assert [name for name, _, _ in history(flow)] == ["a", "b", "c", "n"]
    assert findings() == []


def test_an_older_worker_never_fails_a_flow_for_good() -> None:
    new, old = release("anb"), release("ab")
    flow = new.schedule_flow("t")
    hand_back(new)
    hand_back(new)
    assert old.run_next() is None
    assert old.run_flow_execution(flow).status == FlowStatus.RUNNING
    ended = new.run_next()
    assert ended is not None
    assert ended.status == FlowStatus.SUCCEEDED


@pytest.mark.parametrize(
    ("stored", "done", "code", "version", "ran"),
    [
        ("abc", 1, "abcn", 1, "bcn"),
        ("abc", 1, "anbc", 1, "nbc"),
        ("abc", 3, "abcn", 1, None),
        ("abc", 1, "ac", 2, "c"),
        ("abc", 1, "acb", 2, "cb"),
        ("abc", 1, "axc", 2, "xc"),
        ("abc", 2, "ab", 2, ""),
    ],
)
def test_newer_code_goes_on_with_an_older_flow(
    stored: str, done: int, code: str, version: int, ran: str | None
) -> None:
    old, new = release(stored), release(code, version)
    flow = old.schedule_flow("t")
    for _ in range(done):
        hand_back(old)
    if ran is None:
        assert old.service.get_flow_execution(flow).status == FlowStatus.SUCCEEDED
        return
    ended = new.run_next()
    assert ended is not None
    assert ended.status == FlowStatus.SUCCEEDED
    assert [name for name, _, _ in history(flow)][done:] == list(ran)
    assert (ended.task_names, ended.template_version) == (list(code), version)
    assert findings() == []


def test_a_canary_that_only_looked_or_touched_nothing_new_moves_no_flow() -> None:
    old, canary = release("abc"), release("abnc")
    flow = old.schedule_flow("t")
    hand_back(canary)
    stored = old.service.get_flow_execution(flow)
    assert (stored.task_names, stored.current_task_index) == (["a", "b", "c"], 1)
    ended = old.run_next()
    assert ended is not None
    assert (ended.status, ended.task_names) == (FlowStatus.SUCCEEDED, ["a", "b", "c"])


def test_the_new_plan_is_stored_by_the_step_that_starts_its_first_new_task() -> None:
    old, new = release("ab"), release("anb")
    flow = old.schedule_flow("t")
    steps = iter([False, True, True])
    new.run_next(stop=lambda: next(steps))
    stored = old.service.get_flow_execution(flow)
    assert (stored.task_names, stored.current_task_index) == (["a", "n", "b"], 2)
    assert old.run_next() is None
    ended = new.run_next()
    assert ended is not None
    assert ended.status == FlowStatus.SUCCEEDED


def test_attempts_are_counted_by_the_name_of_their_task() -> None:
    old = release([passes("a"), fails_once("b")])
    new = release([passes("a"), passes("n"), fails_once("b")])
    flow = old.schedule_flow("t")
    old.run_next()
    new.reschedule_flow_execution(flow)
    ended = new.run_next()
    assert ended is not None
    assert ended.status == FlowStatus.SUCCEEDED
    assert history(flow) == [
        ("a", 1, "SUCCEEDED"),
        ("b", 1, "FAILED"),
        ("n", 1, "SUCCEEDED"),
        ("b", 2, "SUCCEEDED"),
    ]
    assert findings() == []
    # And a fork sees what the task first saw.
    fork = new.fork_flow_execution(flow, from_task="n")
    assert dict(fork.execution_context) == {"a": "a"}


def test_a_task_that_comes_later_now_gets_its_whole_retry_allowance() -> None:
    seen: list[int] = []

    @task(name="b", retry=Retry(attempts=2, delay=0))
    def b(context: ExecutionContext) -> ExecutionContext:
        seen.append(context.attempt)
        raise ValueError("no")

    old, new = release([passes("a"), b]), release([passes("a"), passes("n"), b])
    flow = old.schedule_flow("t")
    while old.run_next() is not None:
        pass
    new.reschedule_flow_execution(flow)
    while new.run_next() is not None:
        pass
    assert seen == [1, 2, 3, 4]
    assert history(flow)[3] == ("n", 1, "SUCCEEDED")
    assert findings() == []


def test_code_of_a_higher_version_fails_a_flow_that_completed_other_tasks() -> None:
    old, new = release("abc"), release("acb", 2)
    flow = old.schedule_flow("t")
    hand_back(old)
    hand_back(old)
    ended = new.run_next()
    assert ended is not None
    assert (ended.status, ended.task_names) == (FlowStatus.FAILED, ["a", "b", "c"])
    last = TaskExecution.objects.filter(flow_execution=flow).latest("pk")
    assert (last.task_name, last.attempt, last.error_type) == ("c", 1, "TemplateDrift")
    assert "it completed 'b' as task 1, where template 't', version 2, has 'c'" in last.output
    assert findings() == []
    # Rolled back, it goes on.
    old.reschedule_flow_execution(flow)
    ended = old.run_next()
    assert ended is not None
    assert ended.status == FlowStatus.SUCCEEDED
    assert findings() == []


def test_flows_that_do_not_fit_hide_no_others_and_take_no_place() -> None:
    new, old = release("abn"), release("ab", max_running=1)
    for _ in range(20):
        new.schedule_flow("t", priority=50)
    own = old.schedule_flow("t")
    ran = old.run_next()
    assert ran is not None
    assert ran.pk == own.pk
    assert old.run_next() is None


def test_a_plan_is_looked_at_once_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    new, old = release("abn"), release("ab")
    for _ in range(3):
        new.schedule_flow("t")
    with caplog.at_level(logging.WARNING, logger="ebbs_and_flows"):
        assert old.run_next() is None
        with CaptureQueriesContext(connection) as idle:
            assert old.run_next() is None
        for _ in range(5):
            assert old.run_next() is None
    looks = [query["sql"] for query in idle if "SAVEPOINT" not in query["sql"]]
    assert len(looks) == 1
    left = [record for record in caplog.records if "left to workers" in record.getMessage()]
    assert len(left) == 1
    assert "'n' as task 2" in left[0].getMessage()


def test_after_a_rollback_flows_are_adopted_with_a_reason() -> None:
    new, old = release("axc", 2), release("abc")
    flow = new.schedule_flow("t")
    hand_back(new)
    assert old.run_next() is None
    template = old.get_flow_template("t")
    with pytest.raises(InvalidArgument, match="reason is empty"):
        old.service.adopt_plan(template, reason=" ")
    assert old.service.adopt_plan(template, reason="rolled back", dry_run=True) == 1
    assert old.service.adopt_plan(template, actor="alice", reason="rolled back") == 1
    assert old.service.adopt_plan(template, reason="rolled back") == 0
    ended = old.run_next()
    assert ended is not None
    assert (ended.status, ended.template_version) == (FlowStatus.SUCCEEDED, 1)
    act = FlowTransition.objects.get(flow_execution=flow, actor="alice")
    assert (act.from_status, act.to_status) == ("RUNNING", "RUNNING")
    assert act.reason == "Adopted the plan of version 1: rolled back"
    assert findings() == []


def test_flows_whose_completed_tasks_do_not_fit_are_not_adopted() -> None:
    new, old = release("xbc", 2), release("abc")
    untouched = new.schedule_flow("t", priority=-1)
    new.schedule_flow("t")
    hand_back(new)
    with pytest.raises(TemplateDrift, match="completed 'x' as task 0"):
        old.service.adopt_plan(old.get_flow_template("t"), reason="rolled back")
    untouched.refresh_from_db()
    assert untouched.template_version == 2


def test_unfinished_flows_are_counted_by_plan() -> None:
    new, old = release("abn", 2), release("ab")
    for runner in (new, new, old):
        runner.schedule_flow("t")
    done = old.schedule_flow("t", priority=1)
    old.run_flow_execution(done)

    def counted(runner: FlowRunner) -> list[tuple[int, int, str]]:
        found = plans_in_use(runner=runner)
        return [(item.plan.version, item.flows, item.fits.name) for item in found]

    assert counted(new) == [(1, 1, "YES"), (2, 2, "YES")]
    assert counted(old) == [(1, 1, "YES"), (2, 2, "NO")]
    assert counted(FlowRunner(FlowService())) == [(1, 1, "NO"), (2, 2, "NO")]


def test_flows_that_fit_no_live_worker_are_named_with_the_way_out() -> None:
    new, old = release("abn"), release("ab")
    flow = new.schedule_flow("t")
    assert flows_that_fit_no_worker(new) == []
    now = new.service.repository.now()
    worker = WorkerProcess.objects.create(
        name="one", started_at=now, seen_at=now, templates=[["other", 1, ["a"]]]
    )
    assert flows_that_fit_no_worker(new) == [
        f"Flow {flow.pk} fits no live worker: no live worker knows 't': restart the workers."
    ]
    code = old.get_flow_template("t")
    worker.templates = [[code.name, code.version, code.task_names]]
    worker.save()
    assert "has 'n' as task 2" in flows_that_fit_no_worker(new)[0]
    WorkerProcess.objects.create(
        name="two", started_at=now, seen_at=now, templates=[["t", 1, ["a", "b", "n"]]]
    )
    assert flows_that_fit_no_worker(new) == []


def test_only_due_flows_that_fit_are_counted_as_due() -> None:
    short, long = release("ab"), release("anb")
    for done in range(3):
        flow = short.schedule_flow("t", priority=done)
        for _ in range(done):
            hand_back(short)
    long.schedule_flow("t", run_at=long.service.repository.now() + timedelta(days=1))
    long.schedule_flow("t")
    # One of the three has succeeded.
    assert short.service.get_flow_execution(flow).status == FlowStatus.SUCCEEDED
    assert (short.count_due(), short.count_due_for_others()) == (2, {"t": 1})
    assert (long.count_due(), long.count_due_for_others()) == (3, {})
    assert (long.count_due([FlowStatus.SCHEDULED]), long.count_due(templates=[])) == (2, 0)


def test_a_flow_that_has_come_too_far_is_not_counted_as_due() -> None:
    old, new = release("abc"), release("nabc")
    old.schedule_flow("t", priority=1)
    hand_back(old)
    old.schedule_flow("t")
    assert (new.count_due(), new.count_due_for_others()) == (1, {"t": 1})
    assert new.has_work()
    assert new.run_next() is not None
    assert (new.count_due(), new.has_work(), new.run_next()) == (0, False, None)


def test_showflows_says_that_no_live_worker_has_the_code(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def said(*arguments: str) -> str:
        call_command("showflows", *arguments)
        return capsys.readouterr().out

    new = release("abn")
    flow = new.schedule_flow("t")
    assert "no live worker" not in said() + said(str(flow.pk))
    now = new.service.repository.now()
    WorkerProcess.objects.create(
        name="one", started_at=now, seen_at=now, templates=[["t", 1, ["a", "b"]]]
    )
    why = f"Flow {flow.pk} fits no live worker: its plan, version 1, has 'n' as task 2"
    assert said().count(why) == 1
    assert said(str(flow.pk)).count(why) == 1
    assert why not in said("--status", "succeeded")
    new.run_next()
    assert "no live worker" not in said() + said(str(flow.pk))


def test_any_number_of_plans_that_do_not_fit_is_looked_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(steps, "_MOST_PLANS", 2)
    for name in "vwxyz":
        release(f"ab{name}").schedule_flow("t")
    old = release("ab")
    assert old.run_next() is None
    with CaptureQueriesContext(connection) as idle:
        assert old.run_next() is None
    assert len([query for query in idle if "SAVEPOINT" not in query["sql"]]) == 1


def test_health_says_that_no_live_worker_has_the_code() -> None:
    new = release("abn")
    new.schedule_flow("t")
    move_clock(timedelta(hours=1), runner=new)
    now = new.service.repository.now()
    worker = WorkerProcess.objects.create(
        name="one", started_at=now, seen_at=now, templates=[["t", 1, ["a", "b"]]]
    )
    stands = standing(new)
    assert stands.trouble is Trouble.NO_CODE
    assert "no live worker has the code for it. Flow" in stands.reason
    assert "'n' as task 2" in stands.reason
    worker.templates = [["t", 1, ["a", "b", "n"]]]
    worker.save()
    assert standing(new).is_well
