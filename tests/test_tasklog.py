"""What a task logs is kept with its attempt, and everybody else's logging stays as it was."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ebbs_and_flows import ExecutionContext, FlowRunner, FlowTemplate, task
from ebbs_and_flows.models import TaskExecution
from ebbs_and_flows.tasklog import TaskLog, keeping

pytestmark = pytest.mark.django_db

logger = logging.getLogger("shop.billing")


@pytest.fixture(autouse=True)
def default_levels() -> Iterator[None]:
    """Logging as Python has it: the root logger takes warnings."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.WARNING)
    yield
    root.setLevel(before)


def logged(runner: FlowRunner, body: Callable[..., Any], **options: Any) -> list[dict[str, Any]]:
    runner.register_flow_template(FlowTemplate("t", tasks=[task(name="talk", **options)(body)]))
    runner.run_flow_execution(runner.schedule_flow("t"))
    text = TaskExecution.objects.latest("pk").log
    return [json.loads(line) for line in text.splitlines()]


def messages(lines: list[dict[str, Any]]) -> list[str]:
    return [line["message"] for line in lines]


def talk(context: ExecutionContext) -> ExecutionContext:
    logger.warning("card %s", 4242)
    context.log.warning("charged %d", 3)
    context.log.info("told the bank")
    return context


@pytest.mark.parametrize("atomic", [False, True])
def test_what_a_task_logs_is_kept_with_its_attempt(runner: FlowRunner, atomic: bool) -> None:
    lines = logged(runner, talk, atomic=atomic)
    assert messages(lines) == ["card 4242", "charged 3", "told the bank"]
    assert [line["level"] for line in lines] == ["WARNING", "WARNING", "INFO"]
    assert [line["logger"] for line in lines] == ["shop.billing", *["ebbs_and_flows.task"] * 2]
    assert all(line["at"].endswith("+00:00") for line in lines)


def test_a_logged_error_is_kept_with_its_traceback(runner: FlowRunner) -> None:
    def recover(context: ExecutionContext) -> ExecutionContext:
        try:
            raise ValueError("the card is bad")
        except ValueError:
            context.log.exception("going on")
        return context

    (line,) = logged(runner, recover)
    assert line["message"].startswith("going on\nTraceback")
    assert line["message"].endswith("ValueError: the card is bad")


def test_a_failed_attempt_keeps_what_it_logged(runner: FlowRunner) -> None:
    def fail(context: ExecutionContext) -> ExecutionContext:
        logger.warning("about to fail")
        raise ValueError("no")

    assert messages(logged(runner, fail)) == ["about to fail"]


def test_an_async_task_keeps_what_it_logs_too(runner: FlowRunner) -> None:
    async def atalk(context: ExecutionContext) -> ExecutionContext:
        await asyncio.sleep(0)
        return talk(context)

    assert messages(logged(runner, atalk)) == ["card 4242", "charged 3", "told the bank"]


def test_the_loggers_own_records_carry_flow_task_and_attempt(
    runner: FlowRunner, caplog: pytest.LogCaptureFixture
) -> None:
    logged(runner, talk)
    record = next(item for item in caplog.records if item.getMessage() == "charged 3")
    attempt = TaskExecution.objects.get()
    told = record.flow, record.task, record.attempt  # type: ignore[attr-defined]
    assert told == (attempt.flow_execution_id, "talk", 1)
    assert record.funcName == "talk"
    # What the project's logging does not want goes to the attempt and to nobody else.
    assert "told the bank" not in caplog.text


def test_only_what_is_logged_during_the_task_is_kept(runner: FlowRunner) -> None:
    logger.warning("before")
    lines = logged(runner, talk)
    logger.warning("after")
    assert not {"before", "after"} & set(messages(lines))


def test_over_the_limit_it_says_how_many_records_are_left_out(
    runner: FlowRunner, settings: Any
) -> None:
    settings.EBBS_AND_FLOWS = {"MAX_LOG_BYTES": 2000}

    def chatter(context: ExecutionContext) -> ExecutionContext:
        for number in range(500):
            logger.warning("ä %d", number)
        return context

    lines = logged(runner, chatter)
    assert len(TaskExecution.objects.get().log.encode()) <= 2000
    assert messages(lines)[0] == "ä 0"
    assert lines[-1]["message"].startswith(f"{500 - len(lines) + 1} more records")
    assert "MAX_LOG_BYTES" in lines[-1]["message"]


@pytest.mark.parametrize("size", [1, 50, 199, 250])
def test_a_small_limit_holds_too(runner: FlowRunner, settings: Any, size: int) -> None:
    settings.EBBS_AND_FLOWS = {"MAX_LOG_BYTES": size}
    logged(runner, talk)
    assert len(TaskExecution.objects.get().log.encode()) <= size


def test_a_limit_of_nothing_keeps_nothing(runner: FlowRunner, settings: Any) -> None:
    settings.EBBS_AND_FLOWS = {"MAX_LOG_BYTES": 0}
    assert logged(runner, talk) == []


def test_whatever_is_logged_can_be_stored() -> None:
    log = TaskLog(10_000)
    # Not through logging: pytest itself cannot pass on a lone surrogate that it has captured.
    log.add(logging.makeLogRecord({"msg": "a\x00b \ud800 \u2028 </script>\nsecond line"}))
    text = str(log)
    text.encode()
    assert "\x00" not in text
    # Readers of lines may end one at some characters that are none to JSON.
    (line,) = text.splitlines()
    assert json.loads(line)["message"] == "a\\x00b \\ud800 \u2028 </script>\nsecond line"


def test_a_record_that_cannot_be_made_a_text_harms_nothing(
    runner: FlowRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def odd(context: ExecutionContext) -> ExecutionContext:
        logger.warning("%d", "no number")
        logger.warning("after the bad one")
        return context

    monkeypatch.setattr(logging, "raiseExceptions", False)
    # pytest's own handlers would raise.
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    assert messages(logged(runner, odd)) == ["after the bad one"]


def test_the_rest_of_a_projects_logging_stays_as_it_was() -> None:
    """In a process of its own: pytest's handlers would hide what is lost."""
    script = """
        import logging
        from django.conf import settings
        settings.configure(INSTALLED_APPS=["django_q", "ebbs_and_flows"], USE_TZ=True,
            SECRET_KEY="x", LOGGING_CONFIG=None,
            Q_CLUSTER={"orm": "default", "timeout": 60, "retry": 120},
            DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}})
        import django
        django.setup()
        logging.getLogger().handlers.clear()
        from ebbs_and_flows.tasklog import TaskLog, keeping
        logger = logging.getLogger("shop")
        with keeping() as keeper, keeper.kept(10_000) as log:
            logger.warning("during")
        logger.warning("afterwards")
        assert "during" in str(log)
        # As at the start of a program: nobody has configured anything yet.
        logging.basicConfig(format="configured: %(message)s")
        with keeping() as keeper, keeper.kept(10_000) as log:
            logger.warning("during again")
        logger.warning("at the end")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stderr.splitlines() == [
        "during",
        "afterwards",
        "configured: during again",
        "configured: at the end",
    ], done.stderr


def test_two_tasks_at_once_keep_their_own_records() -> None:
    async def one(name: str) -> str:
        with keeping() as keeper, keeper.kept(10_000) as log:
            for _ in range(3):
                logger.warning(name)
                await asyncio.sleep(0)
        return str(log)

    async def both() -> list[str]:
        return await asyncio.gather(one("a"), one("b"))

    for name, text in zip("ab", asyncio.run(both()), strict=True):
        assert [json.loads(line)["message"] for line in text.splitlines()] == [name] * 3


def test_a_task_that_configures_logging_anew_takes_nothing_from_the_next(
    runner: FlowRunner,
) -> None:
    def configure(context: ExecutionContext) -> ExecutionContext:
        root = logging.getLogger()
        for handler in list(root.handlers):
            root.removeHandler(handler)
        return context

    before = list(logging.getLogger().handlers)
    tasks = [task(name="configure")(configure), task(name="talk")(talk)]
    runner.register_flow_template(FlowTemplate("t", tasks=tasks))
    try:
        runner.run_flow_execution(runner.schedule_flow("t"))
    finally:
        logging.getLogger().handlers[:] = before
    text = TaskExecution.objects.latest("pk").log
    lines = [json.loads(line) for line in text.splitlines()]
    assert messages(lines) == ["card 4242", "charged 3", "told the bank"]


# No call on the context fails a task by what it logs


class Mute:
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Raises(logging.Handler):
    """A handler of the project's own that does not catch what it raises."""

    def emit(self, record: logging.LogRecord) -> None:
        raise RuntimeError("the log server is away")


@pytest.mark.parametrize("level", [logging.WARNING, logging.DEBUG])
def test_bad_arguments_are_logged_as_they_are_with_a_warning(
    runner: FlowRunner, level: int
) -> None:
    def chat(context: ExecutionContext) -> ExecutionContext:
        context.log.info("%d", None)
        context.log.info("only one %s", 1, 2)  # noqa: PLE1205 - what is tested
        context.log.info("%(name)s", 5)
        context.log.info(Mute())
        context.log.info("fine")
        return context

    logging.getLogger().setLevel(level)
    lines = logged(runner, chat)
    assert TaskExecution.objects.get().status == "SUCCEEDED"
    said = messages(lines)
    assert said[0] == "%d None"
    assert said[1].startswith("The record above could not be logged as the task asked: TypeError")
    assert said[2] == "only one %s 1 2"
    assert said[4] == "%(name)s 5"
    assert "Mute object" in said[6]
    assert said[-1] == "fine"
    assert [line["level"] for line in lines] == [*["INFO", "WARNING"] * 4, "INFO"]


def test_options_that_logging_refuses_fail_no_task(runner: FlowRunner) -> None:
    def chat(context: ExecutionContext) -> ExecutionContext:
        context.log.warning("charged", order=4)
        context.log.warning("deep", stacklevel="x")
        context.log.log("INFO", "by name")  # type: ignore[arg-type]
        return context

    lines = logged(runner, chat)
    assert TaskExecution.objects.get().status == "SUCCEEDED"
    assert [m for m in messages(lines) if "could not" not in m] == ["charged", "deep", "by name"]


def test_a_handler_that_raises_fails_no_task(runner: FlowRunner) -> None:
    def chat(context: ExecutionContext) -> ExecutionContext:
        context.log.warning("charged")
        return context

    handler = Raises()
    logging.getLogger("ebbs_and_flows.task").addHandler(handler)
    try:
        lines = logged(runner, chat)
    finally:
        logging.getLogger("ebbs_and_flows.task").removeHandler(handler)
    assert TaskExecution.objects.get().status == "SUCCEEDED"
    assert "charged" in messages(lines)
