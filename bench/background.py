"""Flows in the background, on PostgreSQL: how soon they start, and how fast a backlog is done.

latency    an idle cluster: from the call of `schedule_flow` until the first task's code runs
precision  the same cluster: from a `run_at` in the future until the first task's code runs
backlog    flows of ten tasks: a cluster of two workers against `runflows --workers 2`
clusters   flows whose tasks wait: two clusters against one
stop       a cluster in the middle of such a backlog: from SIGTERM until its last process is gone

Run it alone: python -m bench.background. Figures are of this machine and this run; the ratios
compare what ran in turns on the same database.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg

ROOT = Path(__file__).parent.parent
PATIENCE = 600


def main() -> None:
    given = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    given.add_argument("--flows", type=int, default=1000, help="of the backlog")
    given.add_argument("--samples", type=int, default=40, help="of latency and precision")
    given.add_argument("--rounds", type=int, default=3, help="in which contenders take turns")
    given.add_argument("--scene", help=argparse.SUPPRESS)
    options = given.parse_args()
    if options.scene:
        print(json.dumps(_SCENES[options.scene](options)))
        return
    rows = []
    for broker, age in (("orm", 60), ("orm", 0), ("redis", 60)):
        label = f"{broker} broker, CONN_MAX_AGE {age}"
        for scene, of in (("latency", "schedule_flow"), ("precision", "run_at")):
            found = _run(scene, options, broker, age)
            first, middle, last = min(found), statistics.median(found), max(found)
            text = f"{middle * 1000:.0f} ms (least {first * 1000:.0f}, most {last * 1000:.0f})"
            rows.append((f"{of} to start, {label}", text))
    for broker in ("orm", "redis"):
        found = _run("backlog", options, broker, 60)
        ratio = found["qcluster"] / found["runflows"]
        text = (
            f"qcluster {found['qcluster']:.0f}, runflows {found['runflows']:.0f} flows a second:"
            f" ratio {ratio:.2f}"
        )
        rows.append((f"{options.flows} flows of 10 tasks, 2 workers, {broker} broker", text))
        found = _run("clusters", options, broker, 60)
        text = (
            f"one {found['one']:.1f}, two {found['two']:.1f} flows a second:"
            f" ratio {found['two'] / found['one']:.2f}"
        )
        rows.append((f"clusters of 2 workers, tasks of 50 ms, {broker} broker", text))
        found = _run("stop", options, broker, 60)
        text = f"{statistics.median(found):.1f} s (most {max(found):.1f})"
        rows.append((f"SIGTERM in the middle of flows to the end, {broker} broker", text))
    width = max(len(label) for label, _ in rows)
    for label, text in rows:
        print(f"{label:{width}}  {text}")


def _run(scene: str, options: argparse.Namespace, broker: str, age: int) -> Any:
    """Measure a scene in a process and a database of its own."""
    name = f"ebbs_bench_{os.getpid()}_{scene}"
    environment = {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "bench.background_project.settings",
        "BENCH_DATABASE": name,
        "BENCH_BROKER": broker,
        "BENCH_CONN_MAX_AGE": str(age),
    }
    print(f"{scene}, {broker} broker, CONN_MAX_AGE {age} …", file=sys.stderr)
    with _database(name):
        ran = subprocess.run(
            [
                *(sys.executable, "-m", "bench.background", "--scene", scene),
                *("--flows", str(options.flows), "--samples", str(options.samples)),
                *("--rounds", str(options.rounds)),
            ],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return json.loads(ran.stdout)


@contextmanager
def _database(name: str) -> Iterator[None]:
    server = {
        "host": os.environ.get("PGHOST", "127.0.0.1"),
        "port": os.environ.get("PGPORT", "5432"),
        "user": os.environ.get("PGUSER", "postgres"),
        "password": os.environ.get("PGPASSWORD", ""),
    }
    with psycopg.connect(**server, dbname="postgres", autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
        try:
            yield
        finally:
            connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


# The scenes, each in a process of its own


@contextmanager
def _workers(*arguments: str, number: int = 1) -> Iterator[None]:
    """Have `manage.py …` run, that many times; wait for each at the end."""
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "django", *arguments],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        for _ in range(number)
    ]
    try:
        yield
        for process in started:
            process.terminate()
        for process in started:
            process.wait(PATIENCE)
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def _set_up() -> None:
    import django
    from django.core.management import call_command

    django.setup()
    call_command("migrate", verbosity=0)


def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise SystemExit("waited in vain")
        time.sleep(0.05)


def _settle() -> None:
    """Wait until the workers have started and come to rest."""
    from ebbs_and_flows.models import WorkerProcess

    _until(lambda: WorkerProcess.objects.count() == 2)
    _one("tells")
    time.sleep(2)


def _one(template: str, **more: Any) -> float:
    """Schedule a flow that tells when it starts, and return that, in seconds."""
    from ebbs_and_flows import flow_runner

    flow = flow_runner.schedule_flow(template, **more)
    _until(flow_runner.service.repository.flows.filter(pk=flow.pk, status="SUCCEEDED").exists)
    return float(flow.execution_context["started"])


def _latency(options: argparse.Namespace) -> list[float]:
    _set_up()
    found = []
    with _workers("qcluster"):
        _settle()
        for _ in range(options.samples):
            # At no fixed moment of the broker's poll or the pacemaker's second.
            time.sleep(random.uniform(0.1, 0.6))
            called = time.time()
            found.append(_one("tells") - called)
    return found


def _precision(options: argparse.Namespace) -> list[float]:
    _set_up()
    from ebbs_and_flows import flow_runner

    with _workers("qcluster"):
        _settle()
        start = datetime.now(UTC) + timedelta(seconds=2)
        flows = [
            flow_runner.schedule_flow(
                "tells", run_at=start + timedelta(seconds=number / 2 + random.uniform(0, 0.5))
            )
            for number in range(options.samples)
        ]
        pending = flow_runner.service.repository.flows.exclude(status="SUCCEEDED")
        _until(lambda: not pending.exists())
    return [flow.execution_context["started"] - flow.run_at.timestamp() for flow in flows]


def _drained(template: str, flows: int, number: int, *arguments: str) -> float:
    """Schedule flows, have them run, and return how many a second were."""
    from django.db.models import Max, Min

    from ebbs_and_flows import flow_runner

    ids = [flow_runner.schedule_flow(template).pk for _ in range(flows)]
    mine = flow_runner.service.repository.flows.filter(pk__gte=ids[0])
    with _workers(*arguments, number=number):
        _until(lambda: not mine.exclude(status="SUCCEEDED").exists())
    span = mine.aggregate(first=Min("started_at"), last=Max("finished_at"))
    return flows / (span["last"] - span["first"]).total_seconds()


def _backlog(options: argparse.Namespace) -> dict[str, float]:
    _set_up()
    found: dict[str, list[float]] = {"runflows": [], "qcluster": []}
    for _ in range(options.rounds):
        for name, arguments in (("runflows", ["runflows", "--workers", "2"]), ("qcluster", [])):
            rate = _drained("ten-steps", options.flows, 1, *(arguments or [name]))
            found[name].append(rate)
    return {name: statistics.median(rates) for name, rates in found.items()}


def _clusters(options: argparse.Namespace) -> dict[str, float]:
    _set_up()
    found: dict[str, list[float]] = {"one": [], "two": []}
    for _ in range(options.rounds):
        for number, name in enumerate(found, start=1):
            found[name].append(_drained("waits", options.flows // 10, number, "qcluster"))
    return {name: statistics.median(rates) for name, rates in found.items()}


def _stop(options: argparse.Namespace) -> list[float]:
    _set_up()
    from ebbs_and_flows import flow_runner

    flows = flow_runner.service.repository.flows
    for _ in range(200):
        flow_runner.schedule_flow("waits")
    found = []
    for _ in range(options.rounds):
        with _workers("qcluster"):
            held = flows.filter(status="RUNNING", lease_expires_at__isnull=False)
            _until(lambda held=held: held.count() == 2)  # type: ignore[misc]
            signalled = time.monotonic()
        found.append(time.monotonic() - signalled)
        if held.exists() or not flows.exclude(status="SUCCEEDED").exists():
            raise SystemExit("The cluster has not stopped in the middle of its flows.")
    return found


_SCENES: dict[str, Callable[[argparse.Namespace], Any]] = {
    "latency": _latency,
    "precision": _precision,
    "backlog": _backlog,
    "clusters": _clusters,
    "stop": _stop,
}


if __name__ == "__main__":
    main()
