"""Where a step's time goes: the database's, and Python's own.

The database's is the time within the driver's calls: where psycopg waits for the server, where
`repository/libpq.py` has it send a statement and read the rows, where sqlite3 runs the engine.
Python's own is the processor's time outside of them: our code, Django's, and the task's. Both are
measured without a profiler, which would change them; the list of functions that follows is a
profiler's: only its proportions count.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.harness.contender import Order
from bench.harness.results import Results
from bench.harness.servers import place


@dataclass
class Clock:
    """The time spent in the driver, and how often it was called."""

    seconds: float = 0
    # Of the processor, which others cannot take from it as they can take time.
    processor: float = 0
    calls: int = 0
    # A call within another one counts once.
    depth: int = 0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, with the time of its calls added up here."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.depth:
                return function(*args, **kwargs)
            self.depth = 1
            began, spent = time.perf_counter(), time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began
                self.processor += time.thread_time() - spent
                self.calls += 1
                self.depth = 0

        return call


clock = Clock()


class TimedCursor(sqlite3.Cursor):
    """Times what runs in SQLite's engine."""

    execute = clock.timed(sqlite3.Cursor.execute)
    executemany = clock.timed(sqlite3.Cursor.executemany)
    fetchone = clock.timed(sqlite3.Cursor.fetchone)
    fetchmany = clock.timed(sqlite3.Cursor.fetchmany)
    fetchall = clock.timed(sqlite3.Cursor.fetchall)


class TimedConnection(sqlite3.Connection):
    """Hands out cursors that are timed, beneath the class that is asked for."""

    commit = clock.timed(sqlite3.Connection.commit)

    def cursor(self, factory: Any = sqlite3.Cursor) -> Any:
        if factory is sqlite3.Cursor:
            return super().cursor(TimedCursor)
        return super().cursor(type("Cursor", (factory, TimedCursor), {}))


def _watch_driver(vendor: str) -> None:
    if vendor == "postgresql":
        import psycopg

        from ebbs_and_flows.repository import libpq

        psycopg.Connection.wait = clock.timed(psycopg.Connection.wait)  # type: ignore[method-assign]
        libpq.execute = clock.timed(libpq.execute)
    else:
        from django.db import connection

        connection.settings_dict["OPTIONS"]["factory"] = TimedConnection


def profile(order: Order, tasks: int, flows: int, lines: int) -> None:
    """Run flows; print the microseconds a step in all, in the database, and in Python."""
    from django.core.management import call_command
    from django.db import connection

    from ebbs_and_flows import flow_runner

    _watch_driver(connection.vendor)
    call_command("migrate", verbosity=0)
    for number in range(2 * flows + 3):
        flow_runner.schedule_flow(f"W{tasks}", {"flow": number})
    for _ in range(3):
        flow_runner.run_flow()
    samples = []
    for _ in range(flows):
        clock.seconds, clock.processor, clock.calls = 0, 0, 0
        began, spent = time.perf_counter(), time.thread_time()
        flow_runner.run_flow()
        took = time.perf_counter() - began
        own = time.thread_time() - spent - clock.processor
        samples.append([part / tasks for part in (took, clock.seconds, clock.calls, own)])
    whole, database, calls, own = (
        statistics.median(parts) for parts in zip(*samples, strict=True)
    )
    print(
        f"{connection.vendor}, W{tasks}: {whole * 1e6:.0f} µs a step:"
        f" {database * 1e6:.0f} µs the database's in {calls:.1f} calls,"
        f" {own * 1e6:.0f} µs Python's own"
    )
    if lines:
        profiler = cProfile.Profile()
        profiler.enable()
        for _ in range(flows):
            flow_runner.run_flow()
        profiler.disable()
        pstats.Stats(profiler).sort_stats("tottime").print_stats(lines)


def main() -> None:
    """Profile W10 and W100 on one database or on both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--database", choices=["postgresql", "sqlite"], help="By default both.")
    parser.add_argument("--tasks", type=int, choices=[1, 10, 100], default=100)
    parser.add_argument("--flows", type=int, default=20)
    parser.add_argument("--lines", type=int, default=25, help="Functions to list; 0 for none.")
    options = parser.parse_args()
    if options.database is None:
        # One process knows one database.
        results = Results("profile")
        for vendor in ("postgresql", "sqlite"):
            ran = subprocess.run(
                [
                    *(sys.executable, "-m", "bench.profile_step", "--database", vendor),
                    *("--tasks", str(options.tasks), "--flows", str(options.flows)),
                    *("--lines", str(options.lines)),
                ],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            print(ran.stdout)
            own = float(ran.stdout.split("µs Python's own")[0].split()[-1])
            results.hold(f"{vendor}, Python's own part of a step", own, 120, unit=" µs")
        results.save()
        return
    with place(options.database, "profile") as (url, folder):
        order = Order(variant=options.database, url=url, directory=folder)
        os.environ.update(order.environment, DJANGO_SETTINGS_MODULE="bench.ours.settings")
        import django

        django.setup()
        try:
            profile(order, options.tasks, options.flows, options.lines)
        finally:
            from django.db import connections

            connections.close_all()


if __name__ == "__main__":
    main()
