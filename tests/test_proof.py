"""The table of promises in the documentation names tests that exist."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .proof import ROOT, main, read_outcomes, read_table, rows

INVARIANTS = [f"I{number}" for number in range(1, 7)]


@pytest.mark.parametrize("invariant", INVARIANTS)
def test_each_invariant_has_a_test(invariant: str) -> None:
    promises = [promise for promise in read_table() if promise.startswith(f"{invariant}:")]
    assert len(promises) == 1


def test_each_test_that_the_page_names_can_be_collected() -> None:
    tests = sorted({test for named in read_table().values() for test in named})
    assert len(tests) > 50
    collected = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *tests],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert collected.returncode == 0, collected.stdout + collected.stderr


def test_a_name_in_the_table_that_is_no_test_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A\n\n## Which test shows it\n\n| p | t |\n| - | - |\n| I1: x | words |\n\n## B\n"
    )
    assert read_table(page) == {}


REPORT = """<?xml version="1.0"?><testsuites><testsuite>
<testcase classname="tests.test_a" name="test_one[x]"/>
<testcase classname="tests.test_a" name="test_one[y]"><failure/></testcase>
<testcase classname="tests.test_a" name="test_two"><skipped/></testcase>
<testcase classname="tests.chaos.test_b" name="test_three[x]"><skipped/></testcase>
<testcase classname="tests.chaos.test_b" name="test_three[y]"/>
</testsuite></testsuites>"""


def test_the_outcomes_are_the_reports(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    outcomes = read_outcomes(report)
    assert outcomes == {
        "tests/test_a.py::test_one": "failed",
        "tests/test_a.py::test_two": "skipped",
        "tests/chaos/test_b.py::test_three": "passed",
    }
    table = {"I1: x": ["tests/test_a.py::test_one", "tests/test_a.py::test_gone"]}
    assert rows(table, {"SQLite 3": outcomes})[2:] == [
        "| I1: x | `tests/test_a.py::test_one` | failed |",
        "| I1: x | `tests/test_a.py::test_gone` | not run |",
    ]


def test_an_unknown_database_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EBBS_TEST_DATABASES", "oracle")
    assert main([]) == 2
    assert capsys.readouterr().out == (
        "There is no database 'oracle': the names are sqlite, postgresql, mariadb.\n"
    )
