"""What a step costs: W1, W10 and W100 of ours, of the limits and of the peers, in turns.

`python -m bench.steps [--rounds 5] [--only NAME] [--without-peers]`
"""

from __future__ import annotations

import argparse
import statistics

from bench.harness import servers
from bench.harness.sampling import Contender, Entry, SampleFailed, entered, seconds_a_step, take

OURS = [
    Contender("ebbs_and_flows", "bench.ours.contender", "postgresql"),
    Contender("ebbs_and_flows", "bench.ours.contender", "sqlite"),
]
LIMITS = [
    Contender("L1: one UPDATE", "bench.limits", "postgresql-L1"),
    Contender("L2: a step's statements", "bench.limits", "postgresql-L2"),
    Contender("L1: one UPDATE", "bench.limits", "sqlite-L1"),
    Contender("L2: a step's statements", "bench.limits", "sqlite-L2"),
]
PEERS = [
    Contender("DBOS Transact", "bench.peers.dbos", "postgresql"),
    Contender("DBOS Transact", "bench.peers.dbos", "sqlite"),
    Contender("Absurd", "bench.peers.absurd", "postgresql"),
    Contender("Procrastinate", "bench.peers.procrastinate", "postgresql"),
    Contender("Celery chain", "bench.peers.celery", "postgresql-redis"),
    Contender("django-q2 chain", "bench.peers.django_q2", "postgresql"),
    Contender("django-q2 chain", "bench.peers.django_q2", "postgresql-redis"),
    Contender("huey pipeline", "bench.peers.huey", "sqlite"),
    Contender("huey pipeline", "bench.peers.huey", "redis"),
    Contender("django-tasks-db", "bench.peers.django_tasks_db", "postgresql"),
    Contender("Prefect", "bench.peers.prefect", "sqlite", share=0.1),
]
# Tasks a flow: flows a sample.
FLOWS = {1: 300, 10: 50, 100: 5}


def measure(
    entries: list[Entry], lengths: tuple[int, ...], rounds: int, seconds: float = 120
) -> None:
    """Take `rounds` samples of each workload of each contender, in turns."""
    for length in lengths:
        for number in range(rounds):
            for entry in entries:
                if entry.order is None or entry.reason:
                    continue
                flows = max(3, round(FLOWS[length] * entry.contender.share))
                try:
                    stamps = take(entry, flows=flows, tasks=length, seconds=seconds)
                except SampleFailed as failed:
                    entry.reason = str(failed)
                    print(f"  {entry.contender.label} has failed: {failed}", flush=True)
                    continue
                cost = seconds_a_step(stamps)
                entry.samples.setdefault(f"W{length}", []).append(cost)
                print(
                    f"  W{length} {number + 1}/{rounds} {entry.contender.label:40}"
                    f" {cost * 1000:8.3f} ms a step",
                    flush=True,
                )


def show(entries: list[Entry]) -> None:
    """Print the medians, with the least and the greatest sample."""
    for entry in entries:
        if entry.reason:
            print(f"{entry.contender.label:40} not run: {entry.reason}")
        for workload, samples in entry.samples.items():
            print(
                f"{entry.contender.label:40} {workload:5} {statistics.median(samples) * 1000:8.3f}"
                f" ms ({min(samples) * 1000:.3f} to {max(samples) * 1000:.3f})"
            )


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Return the options that choose rounds and contenders."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", action="append", help="A part of a contender's label.")
    parser.add_argument("--without-peers", action="store_true")
    return parser


def chosen(options: argparse.Namespace, contenders: list[Contender]) -> list[Contender]:
    """Return the contenders that the options leave."""
    return [
        contender
        for contender in contenders
        if not options.only
        or any(part.lower() in contender.label.lower() for part in options.only)
    ]


if __name__ == "__main__":
    given = arguments(__doc__)
    given.add_argument("--lengths", default="1,10,100")
    options = given.parse_args()
    print(*servers.describe(), sep="\n")
    everybody = [*LIMITS, *OURS, *([] if options.without_peers else PEERS)]
    with entered(chosen(options, everybody)) as taking_part:
        measure(taking_part, tuple(map(int, options.lengths.split(","))), options.rounds)
        show(taking_part)
