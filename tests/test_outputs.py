"""What is stored of a failure: columns that nobody has to parse, whatever was raised."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from ebbs_and_flows import (
    ExecutionContext,
    FailFlow,
    FlowRunner,
    FlowTemplate,
    Retry,
    RetryLater,
    task,
)
from ebbs_and_flows.models import TaskExecution
from ebbs_and_flows.outputs import describe
from ebbs_and_flows.status import FlowStatus, TaskStatus
from ebbs_and_flows.testing import run_flow

LIMIT = 64 * 1024


class GatewayDown(Exception):
    """An error of the project's own."""


@pytest.fixture
def runner() -> FlowRunner:
    return FlowRunner()


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:  # noqa: BLE001 - returned
        return caught


def last_attempt(
    runner: FlowRunner, error: BaseException, *, once: bool = False, **options: Any
) -> TaskExecution:
    @task(**options)
    def charge(context: ExecutionContext) -> ExecutionContext:
        raise error

    runner.register_flow_template(FlowTemplate("billing", tasks=[charge]))
    run_flow("billing", runner=runner, retry=not once)
    return TaskExecution.objects.latest("pk")


@pytest.mark.django_db
def test_a_failure_is_stored_in_columns(runner: FlowRunner) -> None:
    cause = OSError("connection refused")
    error = GatewayDown("No answer from the bank\nafter 3 tries")
    error.__cause__ = cause
    error.add_note("card ends in 4242")
    attempt = last_attempt(runner, error)
    assert attempt.error_type == f"{__name__}.GatewayDown"
    assert attempt.error_message == "No answer from the bank"
    assert attempt.headline == "GatewayDown: No answer from the bank"
    assert attempt.traceback.startswith("OSError: connection refused\n\nThe above exception was")
    assert "in charge\n    raise error\n" in attempt.traceback
    assert attempt.explanation.splitlines() == [
        f"{__name__}.GatewayDown: No answer from the bank",
        "after 3 tries",
        "card ends in 4242",
        "",
        "Caused by: OSError: connection refused",
    ]
    assert attempt.output == f"{attempt.explanation}\n\n{attempt.traceback}"


@pytest.mark.django_db
def test_a_success_and_an_interruption_fill_no_traceback(runner: FlowRunner) -> None:
    @task
    def fine(context: ExecutionContext) -> ExecutionContext:
        return context

    runner.register_flow_template(FlowTemplate("billing", tasks=[fine]))
    flow = runner.schedule_flow("billing")
    run = runner.service.claim([runner.get_flow_template("billing")], "worker-1")
    assert run is not None
    runner.service.update_flow_status(flow, FlowStatus.FAILED)
    lost = TaskExecution.objects.get()
    assert (lost.error_type, lost.traceback) == ("TaskInterrupted", "")
    assert lost.output == "interrupted: the flow was made FAILED by hand."
    assert lost.error_message == "the flow was made FAILED by hand."
    runner.reschedule_flow_execution(flow)
    runner.re_run_flow()
    done = TaskExecution.objects.latest("pk")
    assert done.status == TaskStatus.SUCCEEDED
    assert (done.error_type, done.error_message, done.traceback, done.output) == ("",) * 4


def test_the_output_and_the_traceback_are_bounded_together() -> None:
    for text in ("x" * 10_000_000, "ä\n" * 1_000_000, "\x00" * 100_000):
        failure = describe(raised(GatewayDown(text)), LIMIT)
        assert len(failure.output.encode()) <= LIMIT
        assert len(failure.traceback.encode()) <= LIMIT // 2
        assert failure.output.endswith(failure.traceback)
        assert len(failure.error_message) <= 500
        assert "\n" not in failure.error_message
        assert "bytes or more cut here" in failure.output
        assert "raise error\n" in failure.traceback


# Errors that cannot be read


class Silent(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class EndsProcess(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)


class NoModule(Exception):
    __module__ = 7  # type: ignore[assignment]


class Meta(type):
    def __getattribute__(cls, name: str) -> Any:
        if name in {"__module__", "__qualname__", "__name__"}:
            raise RuntimeError(name)
        return super().__getattribute__(name)


class OddMeta(Exception, metaclass=Meta):
    pass


class Liar(Exception):
    @property
    def __class__(self) -> Any:
        raise RuntimeError("no class")

    @__class__.setter
    def __class__(self, value: Any) -> None: ...


class Endless(Exception):
    """Each look at its cause finds another one."""

    @property
    def __cause__(self) -> Any:
        return Endless()

    @property
    def __context__(self) -> Any:
        return Endless()


class OddNotes(Exception):
    @property
    def __notes__(self) -> Any:
        raise RuntimeError("no notes")


class Shout(str):
    __slots__ = ()

    def replace(self, *arguments: Any) -> Any:
        raise RuntimeError("not mine")

    encode = partition = splitlines = replace  # type: ignore[assignment]


class OddText(Exception):
    def __str__(self) -> str:
        return Shout("odd")


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    code: int


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted(Exception):
    code: int


def odd_syntax_error(**values: Any) -> SyntaxError:
    error = SyntaxError("bad", ("file", 1, 1, "text"))
    for name, value in values.items():
        setattr(error, name, value)
    return error


def with_notes(notes: Any) -> Exception:
    error = ValueError("noted")
    error.__notes__ = notes
    return error


def chain(length: int) -> Exception:
    error = ValueError("first")
    for number in range(length):
        following = ValueError(str(number))
        following.__context__ = error
        error = following
    return error


def nested(depth: int) -> Exception:
    error: Exception = ValueError("inner")
    for _ in range(depth):
        error = ExceptionGroup("group", [error])
    return error


def looped() -> Exception:
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__cause__ = other, one
    return one


ODD: dict[str, Any] = {
    "silent": Silent,
    "ends the process": EndsProcess,
    "no module": lambda: NoModule("x"),
    "odd metaclass": lambda: OddMeta("x"),
    "no class": lambda: Liar("x"),
    "endless": lambda: Endless("x"),
    "odd notes": lambda: OddNotes("x"),
    "odd text": OddText,
    "frozen": lambda: Frozen(3),
    "slotted": lambda: Slotted(3),
    "lines of text": lambda: odd_syntax_error(lineno="one", offset="two", text=3),
    "far column": lambda: odd_syntax_error(offset=10**12, end_offset=10**13, end_lineno=1),
    "nested text": lambda: odd_syntax_error(text=Shout("x"), msg=Silent()),
    "notes of numbers": lambda: with_notes([1, Silent()]),
    "no list of notes": lambda: with_notes(iter(int, 1)),
    "long chain": lambda: chain(2_000),
    "deep group": lambda: nested(400),
    "loop": looped,
    "odd name": lambda: type("A\nB\u202e", (Exception,), {})("x"),
    "no arguments": type("Bare", (Exception,), {"__init__": lambda self: None}),
}


@pytest.mark.django_db
@pytest.mark.parametrize("is_atomic", [False, True], ids=["plain", "atomic"])
@pytest.mark.parametrize("kind", ODD)
def test_describing_an_error_never_raises(kind: str, is_atomic: bool, runner: FlowRunner) -> None:
    rule = Retry(attempts=2, delay=0)
    attempt = last_attempt(runner, ODD[kind](), retry=rule, atomic=is_atomic)
    assert attempt.status == TaskStatus.FAILED
    # The retry rule covers it, whatever its attributes say.
    assert attempt.attempt == 2
    assert attempt.flow_execution.status == FlowStatus.FAILED
    assert attempt.error_type.isprintable()
    assert attempt.error_type
    assert "in charge" in attempt.traceback
    assert attempt.output.startswith(attempt.explanation)


def test_a_type_that_lies_keeps_its_name() -> None:
    assert describe(raised(OddMeta("x")), LIMIT).error_type == f"{__name__}.OddMeta"
    assert describe(raised(NoModule("x")), LIMIT).error_type == "NoModule"
    assert describe(raised(Liar("a b")), LIMIT).output.startswith(f"{__name__}.Liar: a b\n\nTrace")


# Groups


@pytest.mark.django_db
def test_a_failflow_in_a_group_fails_the_flow_at_once(runner: FlowRunner) -> None:
    group = ExceptionGroup("two calls", [ConnectionError("lost"), FailFlow("the card is stolen")])
    attempt = last_attempt(runner, group, retry=Retry(attempts=3, delay=0))
    assert (attempt.attempt, attempt.error_type) == (1, "ExceptionGroup")
    assert "the card is stolen" in attempt.output


@pytest.mark.django_db
def test_a_group_that_only_asks_for_later_asks_for_the_latest(runner: FlowRunner) -> None:
    group = ExceptionGroup("polls", [RetryLater(60), ExceptionGroup("g", [RetryLater(900, "b")])])
    attempt = last_attempt(runner, group, once=True)
    assert attempt.asked_for_later
    assert attempt.output == "b"
    flow = attempt.flow_execution
    assert flow.status == FlowStatus.RESCHEDULED
    assert flow.forgiven_attempts == 1
    assert 890 < (flow.run_at - attempt.started_at).total_seconds() < 1000


@pytest.mark.django_db
def test_a_group_of_errors_and_a_later_waits_for_the_later_if_the_errors_are_retried(
    runner: FlowRunner,
) -> None:
    group = ExceptionGroup("calls", [RetryLater(900), ConnectionError("lost")])
    rule = Retry(attempts=2, delay=1, on=(ConnectionError,))
    flow = last_attempt(runner, group, once=True, retry=rule).flow_execution
    assert (flow.status, flow.forgiven_attempts) == (FlowStatus.RESCHEDULED, 0)
    assert (flow.run_at - flow.created_at).total_seconds() > 890


@pytest.mark.django_db
def test_a_group_with_an_error_that_is_not_retried_fails(runner: FlowRunner) -> None:
    group = ExceptionGroup("calls", [RetryLater(900), ValueError("bad")])
    rule = Retry(attempts=2, delay=1, on=(ConnectionError,))
    attempt = last_attempt(runner, group, once=True, retry=rule)
    assert attempt.flow_execution.status == FlowStatus.FAILED
    assert not attempt.asked_for_later
