"""What the heartbeat costs: a flow of ten small tasks with it and without it, in turns."""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

from bench.harness.contender import Order
from bench.harness.results import Results
from bench.harness.servers import place

FLOWS = 20
"""How many flows one sample takes."""


def main() -> None:
    """Run the flows in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--database", choices=["postgresql", "sqlite"], default="postgresql")
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    with place(options.database, "heartbeat") as (url, folder):
        order = Order(variant=options.database, url=url, directory=folder)
        os.environ.update(order.environment, DJANGO_SETTINGS_MODULE="bench.ours.settings")
        ratio = median_ratio(options.rounds)
    results = Results("heartbeat")
    results.hold(f"W10 with the heartbeat / without ({options.database})", ratio, 1.05)
    results.save()


def median_ratio(rounds: int) -> float:
    """Take the samples in turns and return the median of the rounds' ratios."""
    import django
    from django.core.management import call_command

    django.setup()
    from django.db import connections

    from ebbs_and_flows import flow_runner
    from ebbs_and_flows.heartbeat import Heartbeat

    call_command("migrate", verbosity=0)
    watch = Heartbeat.watch

    def sample(watching: Callable[..., object]) -> float:
        Heartbeat.watch = watching  # type: ignore[assignment, method-assign]
        flow_runner.schedule_flows("W10", [None] * FLOWS)
        began = time.perf_counter()
        for _ in range(FLOWS):
            flow_runner.run_next()
        return time.perf_counter() - began

    def unwatched(*_: object) -> object:
        return nullcontext()

    sample(watch)
    ratios = []
    for number in range(rounds):
        # The first of a pair in turns, so that none has the warmer caches.
        first, second = (watch, unwatched) if number % 2 else (unwatched, watch)
        took = {first: sample(first), second: sample(second)}
        ratios.append(took[watch] / took[unwatched])
    connections.close_all()
    return statistics.median(ratios)


if __name__ == "__main__":
    main()
