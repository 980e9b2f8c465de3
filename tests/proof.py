"""Runs the tests that docs/explanation/guarantees.md names, and prints its table with outcomes.

On SQLite and on each database server that answers; EBBS_TEST_DATABASES=sqlite,postgresql limits
the choice. Takes pytest's arguments, such as -n 2. Exits with 1 if a test failed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

from tests.on_every_database import PROBES

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "explanation" / "guarantees.md"
TITLE = "## Which test shows it"
_TEST = re.compile(r"`(tests/[\w/]+\.py::\w+)`")

Table = dict[str, list[str]]
"""The tests' ids by the promise that they show."""
Outcomes = dict[str, str]
"""By a test's id: passed, failed or skipped."""


def read_table(page: Path = PAGE) -> Table:
    """Return the table of the page."""
    _, _, rest = page.read_text().partition(f"\n{TITLE}\n")
    section = rest.partition("\n## ")[0]
    table = {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == 2 and (tests := _TEST.findall(cells[1])):
            table[cells[0]] = tests
    return table


def read_outcomes(report: Path) -> Outcomes:
    """Return the outcomes of a JUnit report; of a test with parameters, the worst."""
    worst = ["skipped", "passed", "failed"]
    outcomes: Outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        outcome = "passed"
        if case.find("skipped") is not None:
            outcome = "skipped"
        if case.find("failure") is not None or case.find("error") is not None:
            outcome = "failed"
        file = case.get("classname", "").replace(".", "/")
        test = f"{file}.py::{case.get('name', '').partition('[')[0]}"
        outcomes[test] = max(outcome, outcomes.get(test, "skipped"), key=worst.index)
    return outcomes


def run(database: str, tests: Iterable[str], arguments: Iterable[str]) -> Outcomes:
    """Run the tests on one database."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        subprocess.run(
            [sys.executable, "-m", "pytest", *arguments, f"--junitxml={report}", *tests],
            check=False,
            cwd=ROOT,
            env={**os.environ, "EBBS_TEST_DATABASE": database},
        )
        return read_outcomes(report) if report.exists() else {}


def version(database: str) -> str:
    """Return the name and version of the database; nothing where none answers."""
    probe = subprocess.run(
        [sys.executable, "-c", PROBES[database]], check=False, capture_output=True, text=True
    )
    return "" if probe.returncode else probe.stdout.strip()


def rows(table: Table, found: dict[str, Outcomes]) -> list[str]:
    """Return the lines of the table, with a column for each database."""
    lines = [
        f"| promise | test | {' | '.join(found)} |",
        f"| --- | --- |{' --- |' * len(found)}",
    ]
    for promise, tests in table.items():
        for test in tests:
            outcomes = " | ".join(outcome.get(test, "not run") for outcome in found.values())
            lines.append(f"| {promise} | `{test}` | {outcomes} |")
    return lines


def main(arguments: list[str]) -> int:
    """Run and print; return the exit code."""
    table = read_table()
    tests = sorted({test for named in table.values() for test in named})
    found: dict[str, Outcomes] = {}
    for database in os.environ.get("EBBS_TEST_DATABASES", ",".join(PROBES)).split(","):
        if database not in PROBES:
            print(f"There is no database {database!r}: the names are {', '.join(PROBES)}.")
            return 2
        name = version(database)
        if name:
            found[name] = run(database, tests, arguments)
        else:
            print(f"{database}: skipped, as no server answers.")
    print("", *rows(table, found), sep="\n")
    names = ", ".join(found) or "no database"
    print(f"\n{len(table)} promises, {len(tests)} tests, on {names}.")
    is_proved = bool(found)
    for test in tests:
        outcomes = {outcome.get(test, "not run") for outcome in found.values()}
        if outcomes - {"passed", "skipped"}:
            print(f"Not passed: {test}")
            is_proved = False
        elif outcomes == {"skipped"}:
            # It is for another database.
            print(f"Skipped on each of them: {test}")
    return int(not is_proved)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
