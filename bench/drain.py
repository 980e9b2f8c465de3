"""How fast 1,000 flows of three tasks are drained by one and by two worker processes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from bench.contenders import OURS, PEERS_WITH_WORKERS, arguments, chosen
from bench.harness.results import Results
from bench.harness.sampling import Entry, SampleFailed, entered, seconds_a_step, take

TASKS = 3


def measure(entries: Sequence[Entry], waits: Sequence[int], rounds: int, flows: int) -> None:
    """Take `rounds` samples of each contender with 1 and 2 workers, in turns."""
    for wait in waits:
        for number in range(rounds):
            for entry in entries:
                for workers in (1, 2):
                    if entry.reason:
                        continue
                    try:
                        stamps = take(
                            entry,
                            purpose="drain",
                            flows=max(20, round(flows * entry.contender.share)),
                            tasks=TASKS,
                            wait_ms=wait,
                            workers=workers,
                            seconds=180,
                        )
                    except SampleFailed as failed:
                        entry.reason = str(failed)
                        print(f"  {entry.contender.label} has failed: {failed}", flush=True)
                        continue
                    rate = 1 / seconds_a_step(stamps) / TASKS
                    entry.samples.setdefault(_column(wait, workers), []).append(rate)
                    print(
                        f"  {number + 1}/{rounds} {entry.contender.label:45} {wait} ms"
                        f" {workers} workers {rate:8.1f} flows a second",
                        flush=True,
                    )


def _column(wait: int, workers: int) -> str:
    return f"{workers} worker{'s' * (workers > 1)}, {wait} ms tasks, flows/s"


def result(entries: Sequence[Entry]) -> Results:
    """Return the medians, and the goals: of two processes, the median of the rounds' ratios."""
    results = Results("drain")
    rates: dict[str, dict[str, list[float]]] = {}
    for entry in entries:
        label = entry.contender.label
        if entry.reason:
            results.reasons[label] = f"drained: {entry.reason}"
        for column, samples in entry.samples.items():
            rate = statistics.median(samples)
            rates.setdefault(label, {})[column] = samples
            results.put(label, column, f"{rate:.3g}")
            print(f"{label:45} {column:36} {rate:8.1f} ({min(samples):.1f} to {max(samples):.1f})")
    ours = rates.pop("ebbs_and_flows, postgresql", {})
    one, two = _column(2, 1), _column(2, 2)
    if one in ours and two in ours:
        pairs = zip(ours[two], ours[one], strict=False)
        ratio = statistics.median(both / single for both, single in pairs)
        results.reach("PostgreSQL, 2 ms tasks, drained by 2 / by 1", ratio, 1.7)
        mine = statistics.median(ours[two])
        peers = {
            label: statistics.median(found[two])
            for label, found in rates.items()
            if two in found and not label.startswith("ebbs_and_flows")
        }
        if peers:
            best = max(peers, key=lambda label: peers[label])
            text = (
                f"PostgreSQL, 2 ms tasks, drained by 2 / {best} ({mine:.0f}, {peers[best]:.0f}/s)"
            )
            results.reach(text, mine / peers[best], 1.001)
    return results


if __name__ == "__main__":
    given = arguments(__doc__)
    given.add_argument("--flows", type=int, default=1000)
    given.add_argument("--waits", default="2,0", help="Milliseconds a task.")
    given.set_defaults(rounds=3)
    options = given.parse_args()
    with entered(chosen(options, [*OURS, *PEERS_WITH_WORKERS])) as taking_part:
        # What was taken until it is ended from outside is kept, too.
        try:
            delays = [int(text) for text in options.waits.split(",")]
            measure(taking_part, delays, options.rounds, options.flows)
        finally:
            result(taking_part).save()
