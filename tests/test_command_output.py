"""Whatever can be written of a command's output is written, and its work is never undone by it."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from django.core.management import call_command
from django.db.models import Value
from django.db.models.functions import Concat

from ebbs_and_flows import flow_runner
from ebbs_and_flows.management.base import escaped
from ebbs_and_flows.models import FlowExecution, TaskExecution

from .operators import billing, failed, registered

ROOT = Path(__file__).parent.parent
ESCAPES = "\x1b[2J\x1b]0;owned\x07 \x9b1m \u202e"


def test_what_steers_a_terminal_is_escaped_and_lines_stay() -> None:
    assert escaped("plain ä → text") == "plain ä → text"
    assert escaped("a\n\tb") == "a\n\tb"
    assert escaped("\x1b[2J\x07\x9b\u202e\r") == r"\x1b[2J\x07\x9b\u202e\r"


class Pipe(io.TextIOWrapper):
    """A pipe that takes one encoding and nothing else."""

    def __init__(self, encoding: str) -> None:
        self.raw_bytes = io.BytesIO()
        super().__init__(self.raw_bytes, encoding=encoding, errors="strict")

    def text(self) -> str:
        self.flush()
        return self.raw_bytes.getvalue().decode(self.encoding)


COMMANDS: list[tuple[Any, ...]] = [
    ("showflows",),
    ("showflows", "--json"),
    ("showflows", "ID"),
    ("showflows", "ID", "--values"),
    ("rerunflow", "--failed", "--dry-run"),
    ("pruneflows", "--older-than", "1d", "--dry-run"),
    ("checkflows",),
    ("runflows",),
]


@pytest.fixture
def hostile() -> FlowExecution:
    """A failed flow with what steers a terminal in every text that is not checked at its entry."""
    with registered(billing()):
        flow = failed("no")
    evil = f"Zürich → {ESCAPES}"
    TaskExecution.objects.update(
        output=evil, error_message=evil, error_type=evil, traceback="", log=evil
    )
    # A flow has one first attempt a name.
    TaskExecution.objects.update(task_name=Concat(Value(evil), "task_name"))
    FlowExecution.objects.update(template_name=evil, task_names=[evil], key=evil, claimed_by=evil)
    return flow


@pytest.mark.django_db
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_writes_what_can_be_written(
    hostile: FlowExecution, command: tuple[str, ...], encoding: str
) -> None:
    name, *arguments = (str(hostile.pk) if part == "ID" else part for part in command)
    out = Pipe(encoding)
    # Those that look for what is wrong find something.
    with suppress(SystemExit):
        call_command(name, *arguments, stdout=out, stderr=out)
    said = out.text()
    assert said
    assert not [c for c in said if not c.isprintable() and c not in "\n\t"]


@pytest.mark.processes
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_name_that_a_pipe_cannot_encode_does_not_schedule_twice(
    encoding: str, tmp_path: Path
) -> None:
    """In a process of its own, as cron starts one."""
    script = """
        import sys, django
        from django.conf import settings
        settings.configure(
            SECRET_KEY="x", USE_TZ=True, INSTALLED_APPS=["ebbs_and_flows"],
            DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": sys.argv[1]}},
            EBBS_AND_FLOWS={"ENGINE": "ebbs_and_flows.engines.foreground.ForegroundEngine"},
        )
        django.setup()
        from django.core.management import call_command, execute_from_command_line
        call_command("migrate", verbosity=0)
        from ebbs_and_flows import FlowTemplate, flow_runner, task
        only = task(name="größer →")(lambda context: context)
        flow_runner.register_flow_template(FlowTemplate("Zürich → Köln", tasks=[only]))
        execute_from_command_line(["manage.py", *sys.argv[2:]])
    """
    path = tmp_path / "run.py"
    path.write_text("\n".join(line[8:] for line in script.splitlines()))
    environ = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    for command, says in (
        (["scheduleflow", "Zürich → Köln"], b"is scheduled for"),
        (["runflows"], b"1 flow ran: 1 succeeded"),
        (["showflows"], b"SUCCEEDED"),
    ):
        ended = subprocess.run(
            [sys.executable, str(path), str(tmp_path / "db.sqlite3"), *command],
            env=environ,
            check=False,
            capture_output=True,
        )
        assert ended.returncode == 0, ended.stderr
        assert says in ended.stdout
    assert rb"\u2192" in ended.stdout
    if Path("/dev/full").exists():
        # Work that cannot be reported is told from work that failed, which exits with 1.
        with Path("/dev/full").open("w") as full:
            unsaid = subprocess.run(
                [sys.executable, str(path), str(tmp_path / "db.sqlite3"), "runflows"],
                env=environ,
                check=False,
                stdout=full,
                stderr=subprocess.PIPE,
            )
        assert unsaid.returncode == 74
        assert b"The work was done, but its output could not be written: No space" in unsaid.stderr


@pytest.mark.django_db
def test_a_full_disk_stops_no_run() -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    with registered(billing()):
        flows = [flow_runner.schedule_flow("billing") for _ in range(3)]
        call_command("runflows", stdout=Full())
    ended = FlowExecution.objects.filter(pk__in=[flow.pk for flow in flows], status="SUCCEEDED")
    assert ended.count() == 3
