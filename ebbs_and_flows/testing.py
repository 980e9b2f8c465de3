"""For the tests of projects: run flows inline, have tasks fail, freeze and move the clock.

Works within the transactions of Django's `TestCase`, and needs neither queue nor worker.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from django.apps import apps
from django.db.models import DateTimeField, F

from . import clock
from .context import ExecutionContext
from .exceptions import InvalidArgument
from .models import FlowExecution, TaskExecution
from .runner import FlowRunner, flow_runner
from .service import FlowOrPk
from .status import FlowStatus, TaskStatus
from .steps import CLAIMABLE
from .validation import check_moment

MOST_RUNS = 100
"""How often one flow is taken up again before the test is told that it does not end."""


class WorkerCrash(KeyboardInterrupt):
    """What `crash_task` raises: it ends the run as the loss of its worker would."""


@dataclass(frozen=True, slots=True)
class FlowRun:
    """A flow after it was run: as it is stored, with every attempt and the context."""

    flow: FlowExecution
    # Every attempt, in order.
    tasks: list[TaskExecution]
    context: ExecutionContext
    runner: FlowRunner

    @property
    def status(self) -> FlowStatus:
        """The flow's status."""
        return FlowStatus(self.flow.status)

    def attempts(self, task_name: str) -> list[TaskExecution]:
        """Return the attempts at one task, in order; none for a task that was not reached."""
        return [attempt for attempt in self.tasks if attempt.task_name == task_name]

    def assert_succeeded(self) -> FlowRun:
        """Raise `AssertionError`, with the outputs, unless the flow succeeded; return the run."""
        __tracebackhide__ = True
        self._expect(self.status == FlowStatus.SUCCEEDED, f"not {FlowStatus.SUCCEEDED}")
        return self

    def assert_failed(
        self,
        task_name: str | None = None,
        *,
        error: str | type[BaseException] = "",
        text: str = "",
    ) -> FlowRun:
        """Raise `AssertionError`, with the outputs, unless the flow failed so; return the run.

        `task_name` is the task that it stopped at, `error` the type of what that raised or its
        name, `text` a part of the output.
        """
        __tracebackhide__ = True
        self._expect(self.status == FlowStatus.FAILED, f"not {FlowStatus.FAILED}")
        last = self.tasks[-1]
        if task_name is not None:
            self._expect(
                last.task_name == task_name, f"at {last.task_name!r}, not at {task_name!r}"
            )
        wanted = error if isinstance(error, str) else error.__name__
        if wanted:
            raised = last.error_type.rpartition(".")[2]
            self._expect(
                wanted in {raised, last.error_type}, f"by {last.error_type}, not {wanted}"
            )
        self._expect(text in last.output, f"without {text!r} in its output")
        return self

    def rerun(self) -> FlowRun:
        """Reschedule the failed flow and run it on; return it as it is then.

        Raises `IllegalTransition` unless it has failed.
        """
        return run_flow(self.runner.reschedule_flow_execution(self.flow), runner=self.runner)

    def _expect(self, holds: bool, otherwise: str) -> None:
        __tracebackhide__ = True
        if not holds:
            raise AssertionError(f"{self.flow} is {self.status}, {otherwise}.\n{self.report()}")

    def report(self) -> str:
        """Return a text of every attempt and the output of each one that failed."""
        lines = [
            f"  {attempt.task_index} {attempt.task_name}, attempt {attempt.attempt}:"
            f" {attempt.status} {attempt.error_type}".rstrip()
            for attempt in self.tasks
        ]
        outputs = [
            f"\n{attempt}, failed:\n{attempt.output.rstrip()}"
            for attempt in self.tasks
            if attempt.status == TaskStatus.FAILED
        ]
        return "\n".join([*(lines or ["  No task was started."]), *outputs])


def run_flow(
    flow: str | FlowOrPk,
    context: Mapping[str, Any] | None = None,
    *,
    runner: FlowRunner = flow_runner,
    retry: bool = True,
    **options: Any,
) -> FlowRun:
    """Run a flow here and now, and return it with its attempts and its context.

    `flow` is a template's name, of which a run is scheduled with `context` and the `options` of
    `schedule_flow`; or a flow that waits. With `retry`, what its tasks' retry rules ask for is
    done at once, without the delays; without it, the flow is left after the first failure. Raises
    what `schedule_flow` raises, and `AssertionError` for a flow that nobody may claim or that
    does not end.
    """
    if isinstance(flow, str):
        flow = runner.schedule_flow(flow, context, **options)
    elif context is not None or options:
        raise InvalidArgument("A flow that exists has its context: give run_flow the flow alone.")
    stored = runner.service.get_flow_execution(flow)
    for _ in range(MOST_RUNS):
        claim = stored.claim
        try:
            stored = runner.run_flow_execution(stored)
        except WorkerCrash:
            stored = runner.service.get_flow_execution(stored)
        if stored.status not in CLAIMABLE or (stored.claim != claim and not retry):
            return _as_run(stored, runner)
        if stored.claim == claim:
            raise AssertionError(
                f"{stored} is {stored.status} and was not claimed: its template is paused, or a"
                f" worker holds it."
            )
    raise AssertionError(
        f"{stored} was taken up {MOST_RUNS} times and is still {stored.status}.\n"
        f"{_as_run(stored, runner).report()}"
    )


def run_due_flows(*, runner: FlowRunner = flow_runner) -> list[FlowRun]:
    """Run all that is due, as a worker does, until nothing is; return each flow once, in order.

    A retry is made if its delay is over: see `move_clock`.
    """
    ran: dict[int, FlowExecution] = {}
    for _ in range(MOST_RUNS * MOST_RUNS):
        try:
            flow = runner.run_next()
        except WorkerCrash:
            continue
        if flow is None:
            stored = [runner.service.get_flow_execution(pk) for pk in ran]
            return [_as_run(item, runner) for item in stored]
        ran[flow.pk] = flow
    raise AssertionError(f"Flows stay due however often they are run: {list(ran.values())[-1]}.")


def _as_run(flow: FlowExecution, runner: FlowRunner) -> FlowRun:
    attempts = runner.service.get_flow_task_execution_history(flow)
    return FlowRun(flow, attempts, flow.execution_context, runner)


@contextmanager
def fail_task(
    template_name: str,
    task_name: str,
    error: BaseException | type[BaseException] | None = None,
    *,
    attempts: Collection[int] = (1,),
    after: bool = False,
    runner: FlowRunner = flow_runner,
) -> Iterator[None]:
    """Have a task raise `error` at some of its attempts, instead of doing its work.

    `attempts` count from 1; `after` lets it do its work first. Raises `FlowTemplateNotFound` and
    `TaskNotFound`.
    """
    template = runner.get_flow_template(template_name)
    task = template.tasks[template.task_index(task_name)]
    raised = RuntimeError(f"The test makes {task_name} fail.") if error is None else error
    original = task.run
    had = vars(task).get("run")

    def run(context: ExecutionContext) -> Any:
        if context.attempt not in attempts:
            return original(context)
        if after:
            result = original(context)
            if inspect.isawaitable(result):
                return _raise_after(result, raised)
        raise raised

    task.run = run  # type: ignore[method-assign]
    try:
        yield
    finally:
        if had is None:
            del task.run
        else:
            task.run = had  # type: ignore[method-assign]


async def _raise_after(work: Any, error: BaseException | type[BaseException]) -> None:
    await work
    raise error


def crash_task(
    template_name: str,
    task_name: str,
    *,
    attempts: Collection[int] = (1,),
    after: bool = True,
    runner: FlowRunner = flow_runner,
) -> AbstractContextManager[None]:
    """Have the worker of a task lost at some of its attempts, by default when its work is done.

    That is the worst moment: the work is done and not recorded, so another worker does it again.
    `run_flow` and `run_due_flows` go on as that other worker; else `WorkerCrash` is raised.
    """
    return fail_task(
        template_name, task_name, WorkerCrash, attempts=attempts, after=after, runner=runner
    )


@contextmanager
def freeze_clock(
    at: datetime | None = None, *, runner: FlowRunner = flow_runner
) -> Iterator[datetime]:
    """Have the app's clock stand still, by default at the present moment; yield that in UTC.

    All that goes by it stands still with it: what is due, delays of retries, deadlines, leases,
    recurring flows, deletion by age, and the times that are stored. `move_clock` sets it on. It is
    this process's alone, and tasks' time-outs and the project's own code go by the real time.
    Raises `InvalidArgument` for what is not an aware moment.
    """
    moment = check_moment("at", at) or runner.service.repository.now()
    before = clock.frozen_at
    clock.frozen_at = moment.astimezone(UTC)
    try:
        yield clock.frozen_at
    finally:
        clock.frozen_at = before


def move_clock(by: timedelta, *, runner: FlowRunner = flow_runner) -> None:
    """Let time pass for all flows: what is due within `by` is due now.

    A clock that is frozen is set on. One that goes is the database's, which nobody can move, so
    the moments that are stored are moved back instead. Raises `InvalidArgument` for what is not a
    time to come.
    """
    if not isinstance(by, timedelta) or by <= timedelta(0):
        raise InvalidArgument(f"The clock cannot be moved by {by!r}: give a timedelta above 0.")
    if clock.frozen_at is not None:
        clock.frozen_at += by
        return
    for model in apps.get_app_config("ebbs_and_flows").get_models():
        moments = {
            field.name: F(field.name) - by
            for field in model._meta.fields
            if isinstance(field, DateTimeField)
        }
        if moments:
            model._base_manager.using(runner.service.repository.using).update(**moments)


class FlowTester:
    """The functions of this module for one test: what they change ends with the test.

    It is `self.flows` in a test case with `FlowTestMixin`, and the pytest fixture `flows`.
    """

    def __init__(self, runner: FlowRunner = flow_runner) -> None:
        self.runner = runner
        self._failing = ExitStack()
        self._frozen = ExitStack()

    def run(
        self, flow: str | FlowOrPk, context: Mapping[str, Any] | None = None, **options: Any
    ) -> FlowRun:
        """Do what `run_flow` does."""
        return run_flow(flow, context, runner=self.runner, **options)

    def run_due(self) -> list[FlowRun]:
        """Do what `run_due_flows` does."""
        return run_due_flows(runner=self.runner)

    def fail_task(self, template_name: str, task_name: str, *args: Any, **options: Any) -> None:
        """Do what `fail_task` does, for the rest of the test."""
        failing = fail_task(template_name, task_name, *args, runner=self.runner, **options)
        self._failing.enter_context(failing)

    def crash_task(self, template_name: str, task_name: str, **options: Any) -> None:
        """Do what `crash_task` does, for the rest of the test."""
        crashing = crash_task(template_name, task_name, runner=self.runner, **options)
        self._failing.enter_context(crashing)

    def work_again(self) -> None:
        """Have the tasks work again that were made to fail."""
        self._failing.close()

    def freeze_clock(self, at: datetime | None = None) -> datetime:
        """Do what `freeze_clock` does, for the rest of the test; return the moment."""
        return self._frozen.enter_context(freeze_clock(at, runner=self.runner))

    def move_clock(self, by: timedelta) -> None:
        """Do what `move_clock` does."""
        move_clock(by, runner=self.runner)

    def close(self) -> None:
        """Have the tasks work and the clock go as before the test."""
        self.work_again()
        self._frozen.close()


class FlowTestMixin:
    """Gives a Django test case `self.flows`, a `FlowTester`."""

    flows: FlowTester

    if TYPE_CHECKING:
        addCleanup: Callable[..., None]  # noqa: N815 - unittest's name

    def setUp(self) -> None:
        """Make the tester; what it changed is as before when the test is over."""
        super().setUp()  # type: ignore[misc]
        self.flows = FlowTester()
        self.addCleanup(self.flows.close)
