"""The benchmarks' harness measures what was done, and refuses what was not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.harness.contender import SCHEDULED
from bench.harness.sampling import (
    Contender,
    SampleFailed,
    entered,
    latencies,
    seconds_a_step,
    take,
)

ROOT = Path(__file__).resolve().parent.parent


def test_a_step_is_the_time_between_tasks_after_the_warm_up():
    warm_up = [(0, 0, 0)]
    steady = [(5_000_000 + number * 2_000_000, 0, number) for number in range(1, 10)]
    assert seconds_a_step([*warm_up, *steady]) == pytest.approx(0.002)


def test_a_latency_is_from_scheduling_to_the_first_task_and_leaves_out_the_first_flow():
    stamps = [
        (0, 0, SCHEDULED),
        (9_000_000, 0, 0),
        (10_000_000, 1, SCHEDULED),
        (13_000_000, 1, 0),
        (14_000_000, 1, 1),
    ]
    assert latencies(stamps) == [pytest.approx(0.003)]


@pytest.mark.processes
@pytest.mark.one_database
@pytest.mark.parametrize(
    ("variant", "complaint"),
    [("once", "2 of 3 tasks ran"), ("twice", "2 of 3 tasks ran, 3 times")],
)
def test_a_sample_in_which_not_every_task_ran_once_is_refused(variant, complaint):
    lazy = Contender("lazy", "tests.lazy_contender", variant)
    with entered([lazy]) as [entry], pytest.raises(SampleFailed, match=complaint):
        take(entry, flows=1, tasks=3, seconds=20)


@pytest.mark.processes
@pytest.mark.one_database
def test_a_short_run_measures_ours_and_the_limits(tmp_path):
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "bench.steps", "--without-peers"),
            *("--rounds", "1", "--lengths", "10", "--only", "sqlite"),
        ],
        cwd=ROOT,
        env={**os.environ, "BENCH_RESULTS": str(tmp_path)},
        check=False,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert ran.returncode == 0, ran.stderr
    measured = json.loads((tmp_path / "steps.json").read_text())
    assert not measured["reasons"]
    assert set(measured["table"]) == {
        "ebbs_and_flows, sqlite",
        "L1: one UPDATE, sqlite-L1",
        "L2: a step's statements, sqlite-L2",
    }
    assert [goal["text"].split(" (")[0] for goal in measured["goals"]] == ["SQLite, W10 / L2"]
