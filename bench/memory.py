"""Whether a worker's memory is flat over many flows: its RSS after 1,000 and after the last one.

By default a short form of 10,000 flows of one task on SQLite; `--flows 100000` is the long one.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from bench.harness.contender import Order
from bench.harness.results import Results
from bench.harness.servers import place


def resident() -> float:
    """Return this process's resident memory in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    """Run the flows in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--database", choices=["postgresql", "sqlite"], default="sqlite")
    parser.add_argument("--flows", type=int, default=10_000)
    options = parser.parse_args()
    with place(options.database, "memory") as (url, folder):
        order = Order(variant=options.database, url=url, directory=folder)
        os.environ.update(order.environment, DJANGO_SETTINGS_MODULE="bench.ours.settings")
        import django
        from django.core.management import call_command
        from django.db import connections

        django.setup()
        from bench.ours.seed import fill_with_due
        from ebbs_and_flows import flow_runner

        call_command("migrate", verbosity=0)
        fill_with_due(options.flows)
        seen = {}
        began = time.monotonic()
        for number in range(1, options.flows + 1):
            if flow_runner.run_next() is None:
                raise SystemExit(f"Only {number - 1} of {options.flows} flows ran.")
            if number in {1000, 10_000, 30_000, 100_000, options.flows}:
                seen[number] = resident()
                passed = time.monotonic() - began
                print(f"{number:>7} flows: {seen[number]:.1f} MiB after {passed:.0f} s")
        connections.close_all()
    first, last = min(seen), max(seen)
    results = Results("memory")
    text = f"RSS after {last:,} flows / after {first:,} ({seen[last]:.1f} MiB, {options.database})"
    # What allocators and SQLite's page cache add is no leak.
    results.hold(text, seen[last] / seen[first], 1.05)
    results.save()


if __name__ == "__main__":
    main()
