"""Secrets come from a file or a pipe: a command line is visible to every user of the machine."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest
from django.core.management import CommandError, call_command

from ebbs_and_flows import flow_runner
from ebbs_and_flows.models import FlowExecution

from .operators import billing, failed, registered
from .test_commands import run

pytestmark = pytest.mark.django_db

SECRET = "hunter2-and-more"


@pytest.fixture(autouse=True)
def template() -> Iterator[None]:
    with registered(billing()):
        yield


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> io.BytesIO:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(raw))
    return raw


def give(stdin: io.BytesIO, content: bytes) -> None:
    stdin.seek(0)
    stdin.truncate()
    stdin.write(content)
    stdin.seek(0)


def test_scheduleflow_reads_entries_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "entries.json"
    path.write_text(f'{{"token": "{SECRET}", "n": 1}}', encoding="utf-8-sig")
    said = run("scheduleflow", "billing", "--entries-file", str(path), "--entry", "m=2")
    assert dict(FlowExecution.objects.get().execution_context) == {"token": SECRET, "n": 1, "m": 2}
    assert SECRET not in said


def test_scheduleflow_reads_entries_from_its_input(stdin: io.BytesIO) -> None:
    give(stdin, f'{{"token": "{SECRET}ü"}}\n'.encode())
    run("scheduleflow", "billing", "--entries-file", "-")
    assert dict(FlowExecution.objects.get().execution_context) == {"token": f"{SECRET}ü"}


def test_rerunflow_reads_corrected_entries(stdin: io.BytesIO) -> None:
    flow = failed()
    give(stdin, f'{{"bad": "", "token": "{SECRET}"}}'.encode())
    said = run("rerunflow", str(flow.pk), "--entries-file", "-")
    fork = FlowExecution.objects.get(rerun_of=flow)
    assert dict(fork.execution_context) == {"bad": "", "token": SECRET}
    assert SECRET not in said


def test_a_correction_keeps_the_type_that_the_entry_had(stdin: io.BytesIO) -> None:
    flow = flow_runner.run_flow_execution(
        flow_runner.schedule_flow("billing", {"price": Decimal("1.50")})
    )
    give(stdin, b'{"price": "2.75"}')
    run("rerunflow", str(flow.pk), "--entries-file", "-")
    fork = FlowExecution.objects.get(rerun_of=flow)
    assert dict(fork.execution_context) == {"price": Decimal("2.75")}
    give(stdin, f'{{"price": "{SECRET}"}}'.encode())
    with pytest.raises(CommandError, match="The entry 'price' in --entries-file") as refusal:
        call_command("rerunflow", str(flow.pk), "--entries-file", "-")
    assert SECRET not in str(refusal.value)


BAD = {
    f'{{"token": "{SECRET}"': "is not JSON (line 1, column 29)",
    f'{{"token": {SECRET}}}': "is not JSON (line 1, column 11)",
    f'["{SECRET}"]': "is not a JSON object",
    f'"{SECRET}"': "is not a JSON object",
    f'{{"{SECRET}": 1, "{SECRET}": 2}}': "gives a name twice",
    f'{{"token": NaN, "a": "{SECRET}"}}': "holds a number that JSON does not have",
    f'{{"token": 1e999, "a": "{SECRET}"}}': "holds a number that JSON does not have",
    f'{{"a": "{SECRET}", "n": {"9" * 5000}}}': "is not JSON that can be read",
    f'{{"{SECRET}": {"[" * 100_000}': "is nested too deeply",
    "": "is not JSON (line 1, column 1)",
    f'{{"a": {{"$type": "uuid", "value": "{SECRET}"}}}}': "uses the name",
}


@pytest.mark.parametrize("content", BAD, ids=range(len(BAD)))
def test_what_cannot_be_read_is_refused_without_quoting_it(
    content: str, stdin: io.BytesIO
) -> None:
    give(stdin, content.encode())
    with pytest.raises(CommandError) as refusal:
        call_command("scheduleflow", "billing", "--entries-file", "-")
    sentence = str(refusal.value)
    assert "--entries-file -" in sentence
    assert BAD[content] in sentence
    assert 'such as {"order_id": 42}' in sentence
    assert SECRET not in sentence
    assert "999" not in sentence
    # Nor may it come with a traceback, by --traceback or an error report.
    assert refusal.value.__cause__ is None
    assert refusal.value.__suppress_context__
    assert not FlowExecution.objects.exists()


def test_a_file_that_is_not_there_or_not_text_is_refused(tmp_path: Path) -> None:
    missing, folder, binary = tmp_path / "none.json", tmp_path, tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe" + SECRET.encode())
    for path, sentence in (
        (missing, "cannot be read (No such file"),
        (folder, "cannot be read (Is a directory"),
        (binary, "is not text in UTF-8"),
    ):
        with pytest.raises(CommandError) as refusal:
            call_command("scheduleflow", "billing", "--entries-file", str(path))
        assert sentence in str(refusal.value)
        assert SECRET not in str(refusal.value)


def test_a_name_that_is_given_twice_is_refused(stdin: io.BytesIO) -> None:
    give(stdin, f'{{"token": "{SECRET}"}}'.encode())
    with pytest.raises(CommandError, match="'token' is given twice") as refusal:
        call_command("scheduleflow", "billing", "--entries-file", "-", "--entry", "token=x")
    assert SECRET not in str(refusal.value)
    with pytest.raises(CommandError, match="with ids, not with --failed"):
        call_command("rerunflow", "--failed", "--entries-file", "-")
