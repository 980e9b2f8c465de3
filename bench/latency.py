"""How long a flow waits from its scheduling to its first task while a worker has nothing to do."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from bench.contenders import PEERS_WITH_WORKERS, arguments, chosen
from bench.harness.results import Results
from bench.harness.sampling import Contender, Entry, SampleFailed, entered, latencies, take

OURS = [
    Contender("ebbs_and_flows, runflows --watch", "bench.ours.contender", "postgresql"),
    Contender("ebbs_and_flows, runflows --watch", "bench.ours.contender", "sqlite"),
    Contender("ebbs_and_flows, qcluster", "bench.ours.contender", "postgresql-cluster"),
    Contender("ebbs_and_flows, qcluster", "bench.ours.contender", "postgresql-cluster-redis"),
]


def measure(entries: Sequence[Entry], rounds: int, flows: int) -> None:
    """Schedule `flows` flows one by one to each contender's worker, `rounds` times, in turns."""
    for number in range(rounds):
        for entry in entries:
            if entry.reason:
                continue
            try:
                stamps = take(entry, purpose="latency", flows=flows, tasks=1)
            except SampleFailed as failed:
                entry.reason = str(failed)
                print(f"  {entry.contender.label} has failed: {failed}", flush=True)
                continue
            found = latencies(stamps)
            entry.samples.setdefault("latency", []).extend(found)
            print(
                f"  {number + 1}/{rounds} {entry.contender.label:55}"
                f" {statistics.median(found) * 1000:8.1f} ms",
                flush=True,
            )


def result(entries: Sequence[Entry]) -> Results:
    """Return the median and the 95th percentile of each."""
    results = Results("latency")
    for entry in entries:
        label = entry.contender.label
        if entry.reason:
            results.reasons[label] = f"latency: {entry.reason}"
        samples = sorted(entry.samples.get("latency", []))
        if samples:
            median, high = statistics.median(samples), samples[int(len(samples) * 0.95)]
            text = f"{median * 1000:.3g} (p95 {high * 1000:.3g})"
            results.put(label, "schedule to start, ms", text)
            print(f"{label:55} {text}")
    return results


if __name__ == "__main__":
    given = arguments(__doc__)
    given.add_argument("--flows", type=int, default=15)
    given.set_defaults(rounds=2)
    options = given.parse_args()
    with entered(chosen(options, [*OURS, *PEERS_WITH_WORKERS])) as taking_part:
        # What was taken until it is ended from outside is kept, too.
        try:
            measure(taking_part, options.rounds, options.flows)
        finally:
            result(taking_part).save()
