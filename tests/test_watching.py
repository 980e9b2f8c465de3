"""`showflows --watch`: what it looks at, in this process, and how it behaves on a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyte
import pytest
from django.core.management import CommandError, call_command
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from rich.console import Console

from ebbs_and_flows import FlowRunner, FlowStatus, FlowTemplate, RetryLater, flow_runner, task
from ebbs_and_flows.management.live_table import LiveTable
from ebbs_and_flows.management.stopping import StopRequest
from ebbs_and_flows.management.watching import Glance, Selection, Sight, look, watch
from ebbs_and_flows.models import FlowExecution, TaskExecution, WorkerProcess
from ebbs_and_flows.testing import fail_task, move_clock, run_flow
from tests.databases import connection, database_names

SEEN = [status for status in FlowStatus if status != FlowStatus.CREATED]


def selection(*statuses: FlowStatus, template: str | None = None, limit: int = 20) -> Selection:
    return Selection(statuses=statuses or SEEN, template=template, limit=limit)


def running(index: int = 0, *, report: str = "") -> FlowExecution:
    """Return a flow that a worker holds, with its second attempt at a task."""
    flow = flow_runner.schedule_flow("shop-paced", {})
    now = timezone.now()
    attempt = TaskExecution.objects.create(
        flow_execution=flow, task_index=index, task_name=f"pace-{index}", attempt=2, claim=1,
        status="RUNNING", started_at=now,
    )  # fmt: skip
    FlowExecution.objects.filter(pk=flow.pk).update(
        status="RUNNING", current_task_index=index, started_at=now, claim=1, ready_rank=None,
        claimed_by="mill:7", lease_expires_at=now + timedelta(hours=1),
        task_progress=report.replace("THIS", str(attempt.pk)),
    )  # fmt: skip
    return flow


def quick(folder: Path) -> FlowExecution:
    return run_flow("shop-quick", {"folder": str(folder)}).flow


def sight_of(glance: Glance) -> Sight:
    return Sight(glance=glance, at=time.monotonic())


def drawn(sight: Sight, width: int = 140, height: int = 30) -> list[str]:
    with Path(os.devnull).open("w") as nowhere:
        console = Console(file=nowhere, width=width, height=height, record=True)
        console.print(LiveTable(console, 20, 1.0).drawing(sight))
        return [line.rstrip() for line in console.export_text().splitlines()]


# What it looks at


@pytest.mark.django_db
def test_a_look_asks_no_more_of_the_database_for_more_flows(tmp_path: Path) -> None:
    numbers = []
    for _ in range(2):
        for _ in range(8):
            quick(tmp_path)
            run_flow("shop-fails", {})
            running()
            flow_runner.schedule_flow("shop-quick", {})
        with CaptureQueriesContext(
            connection,
        ) as queries:
            glance = look(selection())
        numbers.append(len(queries))
    assert len(glance.flows) == 4 * 16
    assert numbers[0] == numbers[1] <= 19


@pytest.mark.django_db
def test_what_no_worker_could_run_is_an_alarm_of_its_own(runner: FlowRunner) -> None:
    @task
    def only(context: Any) -> Any:
        return context

    runner.register_flow_template(FlowTemplate("billing", tasks=[only]))
    runner.schedule_flow("billing")
    move_clock(timedelta(minutes=5), runner=runner)
    sight = sight_of(look(selection()))
    assert sight.alarm == "1 flow waits for template 'billing', which is not registered here."
    assert f"! {sight.alarm}" in drawn(sight)
    assert "oldest due" not in [what for _number, what, _bad in sight.figures]


@pytest.mark.django_db
def test_a_task_that_asked_for_later_shows_why_and_no_error(tmp_path: Path) -> None:
    with fail_task("shop-quick", "last", RetryLater(3600, "not yet")):
        flow_runner.schedule_flow("shop-quick", {"folder": str(tmp_path)})
        flow_runner.run_flow()
    (seen,) = look(selection()).flows
    assert (seen.outcome.error, seen.words) == ("", "last waits: not yet")


@pytest.mark.django_db
def test_what_stands_on_top(tmp_path: Path) -> None:
    run_flow("shop-fails", {})
    move_clock(timedelta(hours=25))
    run_flow("shop-fails", {})
    running()
    flow_runner.schedule_flow("shop-quick", {})
    flow_runner.schedule_flow("shop-quick", {}, run_at=timezone.now() + timedelta(days=1))
    now = timezone.now()
    WorkerProcess.objects.create(name="here", started_at=now, seen_at=now)
    WorkerProcess.objects.create(name="gone", started_at=now, seen_at=now - timedelta(minutes=5))
    sight = sight_of(look(selection(template="shop-waits")))
    figures = {what: number for number, what, _bad in sight.figures}
    oldest = next(what for number, what, _bad in sight.figures if number == "oldest due")
    assert figures == {
        "waiting": "2", "running": "1", "failed in 24 h": "1", oldest: "oldest due",
        "worker alive": "1",
    }  # fmt: skip
    assert sight.glance.flows == ()
    assert "There are no such flows." in drawn(sight)
    assert sight.alarm == ""
    WorkerProcess.objects.all().delete()
    move_clock(timedelta(minutes=5))
    alarming = sight_of(look(selection()))
    assert re.fullmatch(
        r"A flow has been due for 3\d\d s, and no worker is alive:"
        r" start one with manage.py qcluster\.",
        alarming.alarm,
    )
    assert any(line.startswith("! A flow has been due") for line in drawn(alarming))


@pytest.mark.django_db
def test_each_flow_shows_its_task_and_what_this_says_or_why_it_failed(tmp_path: Path) -> None:
    report = '{"task_execution": THIS, "done": 40, "total": 100, "message": "page\\u001b[2J 4"}'
    busy = running(3, report=report)
    with fail_task("shop-quick", "last", ValueError("the bank\x1b[2J is closed\nfor today")):
        failed = quick(tmp_path)
    done = quick(tmp_path)
    lines = drawn(sight_of(look(selection())))
    text = "\n".join(lines)
    assert re.search(
        rf"^ *{busy.pk}  shop-paced  ▶ RUNNING +━━━━╌╌╌╌ 3 of 5  +2 +for \d+ s +mill:7 +"
        r"pace-3: 40 of 100, page.\[2J 4$", text, re.MULTILINE,
    )  # fmt: skip
    row = next(number for number, line in enumerate(lines) if "✗ FAILED" in line)
    assert lines[row].split()[0] == str(failed.pk)
    assert lines[row].endswith("last")
    assert lines[row + 1].strip() == "└ ValueError: the bank�[2J is closed"
    assert re.search(rf"^ *{done.pk} .*✓ SUCCEEDED .*2 of 2 .* ms, \d+ s ago$", text, re.MULTILINE)
    assert "\x1b" not in text


@pytest.mark.django_db
def test_the_filters_choose_the_rows(tmp_path: Path) -> None:
    done = quick(tmp_path)
    run_flow("shop-fails", {})
    later = flow_runner.schedule_flow("shop-quick", {})

    def seen(chosen: Selection) -> list[int]:
        return [row.outcome.id for row in look(chosen).flows]

    assert seen(selection(FlowStatus.SUCCEEDED)) == [done.pk]
    assert seen(selection(template="shop-quick")) == [later.pk, done.pk]
    assert seen(selection(limit=1, template="shop-quick")) == [later.pk, done.pk]


@pytest.mark.django_db
def test_what_runs_comes_first_and_what_waits_leaves_room_for_what_ended(tmp_path: Path) -> None:
    for _ in range(6):
        quick(tmp_path)
    for _ in range(6):
        flow_runner.schedule_flow("shop-quick", {})
    running()
    glance = look(selection())

    def statuses(number: int) -> list[str]:
        return [str(row.status) for row in glance.best(number)]

    assert statuses(5) == ["RUNNING", "SCHEDULED", "SCHEDULED", "SUCCEEDED", "SUCCEEDED"]
    assert statuses(1) == ["RUNNING"]
    assert len(statuses(99)) == 13
    assert [row.outcome.id for row in glance.best(5)[1:3]] == sorted(
        FlowExecution.objects.filter(status="SCHEDULED").values_list("pk", flat=True)
    )[:-3:-1]


@pytest.mark.django_db
@pytest.mark.parametrize(("width", "height"), [(200, 50), (100, 20), (76, 12), (40, 8), (30, 3)])
def test_a_drawing_fits_the_terminal(tmp_path: Path, width: int, height: int) -> None:
    for _ in range(15):
        quick(tmp_path)
        run_flow("shop-fails", {})
    lines = drawn(sight_of(look(selection())), width, height)
    assert all(len(line) <= width for line in lines)
    # There is at least one row; a lower terminal shows a part.
    assert len(lines) <= max(height, 14)
    assert any("SUCCEEDED" in line or "FAILED" in line for line in lines)


# A database that goes away


class Story:
    """A screen on which something happens after each sight."""

    def __init__(self, *steps: Callable[[Sight], bool]) -> None:
        self.steps = list(steps)
        self.sights: list[Sight] = []

    def show(self, sight: Sight) -> None:
        self.sights.append(sight)
        assert len(self.sights) < 400
        if self.steps and self.steps[0](sight):
            del self.steps[0]


def rename(name: str, new: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute(f"ALTER TABLE {name} RENAME TO {new}")


def take_database_away() -> None:
    """End this process's connections, as a restart does; SQLite has none, so a table goes."""
    if connection.vendor == "sqlite":
        rename(FlowExecution._meta.db_table, "elsewhere")
        return
    other = connection.copy()
    with other.cursor() as cursor:
        if connection.vendor == "postgresql":
            cursor.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        else:
            cursor.execute(f"KILL {connection.connection.thread_id()}")
    other.close()


def bring_database_back() -> None:
    if connection.vendor == "sqlite":
        rename("elsewhere", FlowExecution._meta.db_table)


@pytest.mark.django_db(transaction=True)
def test_a_database_that_goes_away_is_said_and_waited_for(tmp_path: Path) -> None:
    quick(tmp_path)

    with StopRequest() as stop:

        def away(sight: Sight) -> bool:
            take_database_away()
            return True

        def is_said(sight: Sight) -> bool:
            if sight.trouble:
                assert sight.alarm.startswith(f"The database is away ({sight.trouble}): this is")
                assert len(sight.glance.flows) == 1
                assert any(line.startswith("! The database is away") for line in drawn(sight, 200))
                bring_database_back()
            return bool(sight.trouble)

        def is_back(sight: Sight) -> bool:
            if not sight.trouble:
                stop.request()
            return not sight.trouble

        story = Story(away, is_said, is_back)
        watch(selection(), 0.1, story, stop)
    assert story.steps == []


# On a terminal


OF_ANOTHER_TERMINAL = {"NO_COLOR", "COLUMNS", "LINES"}


class Terminal:
    """A pseudo-terminal with `showflows --watch` on it."""

    def __init__(self, *arguments: str, columns: int = 120, lines: int = 30, **env: str) -> None:
        self.screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self._ours, theirs = pty.openpty()
        self.resize(columns, lines, theirs)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "django", "showflows", "--watch", *arguments],
            env={
                # The size is the terminal's, and not that of the one that the tests run in.
                **{k: v for k, v in os.environ.items() if k not in OF_ANOTHER_TERMINAL},
                "DJANGO_SETTINGS_MODULE": "tests.settings",
                **database_names(),
                "PYTHONPATH": str(Path(__file__).parent.parent),
                "TERM": "xterm-256color",
                **env,
            },
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            # So that Ctrl-C on the terminal reaches it.
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509
        )
        os.close(theirs)

    def resize(self, columns: int, lines: int, where: int | None = None) -> None:
        size = struct.pack("HHHH", lines, columns, 0, 0)
        fcntl.ioctl(self._ours if where is None else where, termios.TIOCSWINSZ, size)
        self.screen.resize(lines, columns)

    def type(self, keys: bytes) -> None:
        os.write(self._ours, keys)

    @property
    def text(self) -> str:
        return "\n".join(self.screen.display)

    def until(self, wanted: str) -> None:
        """Read until the screen shows it."""
        end = time.monotonic() + 40
        while not re.search(wanted, self.text):
            assert time.monotonic() < end, f"waited in vain for {wanted}:\n{self.text}"
            assert self._read(), f"ended without {wanted}:\n{self.raw.decode()}"

    def rest(self) -> int:
        """Read to the end, and return the exit code."""
        while self._read():
            pass
        return self.process.wait(30)

    def _read(self) -> bool:
        if not select.select([self._ours], [], [], 40)[0]:
            return False
        try:
            chunk = os.read(self._ours, 65_536)
        except OSError:
            return False
        self.raw += chunk
        self._stream.feed(chunk)
        return bool(chunk)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._ours)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*arguments: str, **options: Any) -> Terminal:
        opened.append(Terminal(*arguments, **options))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


on_terminal = pytest.mark.usefixtures("transactional_db")
COLOUR = re.compile(rb"\x1b\[(?:\d+;)*3[0-7]m")


@on_terminal
@pytest.mark.processes
@pytest.mark.parametrize("end", ["Ctrl-C", "SIGTERM"])
def test_it_follows_what_happens_and_leaves_the_terminal_as_it_was(
    terminal: Callable[..., Terminal], tmp_path: Path, end: str
) -> None:
    flow = flow_runner.schedule_flow("shop-quick", {"folder": str(tmp_path)})
    shown = terminal("--interval", "0.2")
    shown.until(rf"{flow.pk}  shop-quick +○ SCHEDULED")
    assert b"\x1b[?1049h" in shown.raw
    flow_runner.run_flow_execution(flow)
    shown.until(rf"{flow.pk}  shop-quick +✓ SUCCEEDED +━━━━━━━━ 2 of 2")
    if end == "Ctrl-C":
        shown.type(b"\x03")
    else:
        shown.process.send_signal(signal.SIGTERM)
    assert shown.rest() == 0
    after = shown.raw.rpartition(b"\x1b[?1049l")[2]
    # The cursor is there again, and nothing is left of the table.
    assert shown.raw.rfind(b"\x1b[?25h") > shown.raw.rfind(b"\x1b[?25l")
    assert re.sub(rb"\x1b\[[?\d;]*[a-zA-Z]|\s", b"", after) in {b"", b"^C"}
    assert b"Traceback" not in shown.raw
    assert COLOUR.search(shown.raw)


@on_terminal
@pytest.mark.processes
def test_a_resized_terminal_is_filled_anew(
    terminal: Callable[..., Terminal], tmp_path: Path
) -> None:
    running()
    for _ in range(12):
        quick(tmp_path)
    shown = terminal("--interval", "0.2", columns=140, lines=30)
    shown.until("mill:7(.|\n)*Ctrl-C ends it")
    assert shown.text.count("SUCCEEDED") == 12
    shown.resize(64, 12)
    shown.screen.reset()
    shown.until("more others are not shown(.|\n)*Ctrl-C")
    shown.until("Flows .*CE")
    assert "mill:7" not in shown.text
    assert "RUNNING" in shown.text
    assert 0 < shown.text.count("SUCCEEDED") < 8


@on_terminal
@pytest.mark.processes
def test_no_color_is_respected(terminal: Callable[..., Terminal]) -> None:
    run_flow("shop-fails", {})
    for arguments, env in (((), {"NO_COLOR": "1"}), (("--no-color",), {})):
        shown = terminal("--interval", "0.2", *arguments, **env)
        shown.until("✗ FAILED(.|\n)*the card is bad")
        shown.type(b"\x03")
        assert shown.rest() == 0
        assert not COLOUR.search(shown.raw)


@on_terminal
@pytest.mark.processes
def test_without_rich_a_terminal_gets_plain_text(
    terminal: Callable[..., Terminal], tmp_path: Path
) -> None:
    (tmp_path / "rich.py").write_text("raise ImportError('rich is not installed')\n")
    run_flow("shop-fails", {})
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parent.parent)])
    shown = terminal(PYTHONPATH=path)
    shown.until(r"pip install 'ebbs-and-flows\[progress\]'")
    shown.until("FAILED .*fail: ValueError: the card is bad")
    assert b"\x1b[?1049h" not in shown.raw
    shown.type(b"\x03")
    assert shown.rest() == 0


@on_terminal
@pytest.mark.processes
def test_into_a_pipe_it_writes_a_block_for_each_change(tmp_path: Path) -> None:
    flow = flow_runner.schedule_flow("shop-quick", {"folder": str(tmp_path)})
    with subprocess.Popen(
        [sys.executable, "-m", "django", "showflows", "--watch", "--interval", "0.1"],
        env={
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "tests.settings",
            **database_names(),
            "PYTHONPATH": str(Path(__file__).parent.parent),
        },
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None

        out = process.stdout
        watchdog = threading.Timer(60, process.kill)
        watchdog.start()

        def block() -> str:
            lines = [out.readline()]
            while lines[-1] != "\n":
                assert lines[-1], "it ended"
                lines.append(out.readline())
            return "".join(lines[:-1])

        try:
            first = block()
            assert ": 1 waiting, 0 running, 0 failed in 24 h, oldest due for " in first
            assert re.search(rf"\n{flow.pk} +shop-quick  SCHEDULED  0 of 2 .* first\n$", first)
            flow_runner.run_flow_execution(flow)
            while "SUCCEEDED" not in (last := block()):
                assert re.search("SCHEDULED|RUNNING", last)
            process.send_signal(signal.SIGINT)
            assert out.read() == ""
            assert process.wait(30) == 0
        finally:
            watchdog.cancel()
            process.kill()


# What it refuses


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--watch", "--json"], "leave --json out"),
        (["--watch", "1"], "leave the ids out"),
        (["--interval", "2"], "--interval goes with --watch"),
        (["--watch", "--interval", "0"], "--interval 0 "),
        (["--watch", "--interval", "nan"], "--interval nan "),
        (["--watch", "--template", "unknown"], "'unknown'"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(arguments: Sequence[str], says: str) -> None:
    with pytest.raises(CommandError, match=says) as caught:
        call_command("showflows", *arguments)
    assert "\n" not in str(caught.value)
