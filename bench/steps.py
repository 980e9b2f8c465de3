"""What a step costs: W1, W10 and W100 of ours, of the limits and of the peers, in turns.

A step is a task with its share of everything around it: the flow's time, its claim and its end
included, divided by its tasks. The flows are scheduled before; one worker runs them.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from bench.contenders import LIMITS, OURS, PEERS, arguments, chosen, versions
from bench.harness import sampling
from bench.harness.results import Results
from bench.harness.sampling import Entry, SampleFailed, entered, seconds_a_step, take

# Tasks a flow: flows a sample.
FLOWS = {1: 300, 10: 50, 100: 5}
# Of those that know no flow, or are a hundred times slower, one length tells enough.
ONLY_W10 = [peer for peer in PEERS if peer.name not in {"DBOS Transact", "Absurd"}]
# Step 1 is the second one: before the first one comes the claim.
FIRST, LAST = range(1, 6), range(95, 100)


def measure(entries: Sequence[Entry], lengths: Sequence[int], rounds: int) -> None:
    """Take `rounds` samples of each workload of each contender, in turns."""
    for length in lengths:
        for number in range(rounds):
            for entry in entries:
                if entry.reason or (length != 10 and entry.contender in ONLY_W10):
                    continue
                flows = max(3, round(FLOWS[length] * entry.contender.share))
                try:
                    stamps = take(entry, flows=flows, tasks=length)
                except SampleFailed as failed:
                    entry.reason = str(failed)
                    print(f"  {entry.contender.label} has failed: {failed}", flush=True)
                    continue
                cost = seconds_a_step(stamps)
                entry.samples.setdefault(f"W{length}", []).append(cost)
                if length == 100:
                    for name, steps in (("first", FIRST), ("last", LAST)):
                        entry.samples.setdefault(name, []).append(_interval(stamps, steps))
                print(
                    f"  W{length} {number + 1}/{rounds} {entry.contender.label:45}"
                    f" {cost * 1000:8.3f} ms a step",
                    flush=True,
                )


def _interval(stamps: Sequence[sampling.Stamp], steps: range) -> float:
    """Return the median time from one task to the next, at those places of a flow."""
    moments = {(flow, task): moment for moment, flow, task in stamps}
    found = [
        moments[flow, task + 1] - moments[flow, task]
        for flow, task in moments
        if task in steps and (flow, task + 1) in moments
    ]
    return statistics.median(found) / 1e9


def result(entries: Sequence[Entry]) -> Results:
    """Return the medians, and the goals.

    A ratio is the median of the rounds' own ratios: what disturbs a round disturbs both sides.
    """
    results = Results("steps", versions=versions([entry.contender for entry in entries]))
    cost: dict[str, list[float]] = {}
    for entry in entries:
        label = entry.contender.label
        if entry.reason:
            results.reasons[label] = entry.reason
        for workload, samples in entry.samples.items():
            median = statistics.median(samples) * 1000
            cost[f"{label} {workload}"] = samples
            if workload.startswith("W"):
                text = f"{median:.3g} ({min(samples) * 1000:.3g})"
                results.put(label, f"{workload}, ms a step", text)
                print(
                    f"{label:45} {workload:5} {median:8.3f} ms"
                    f" ({min(samples) * 1000:.3f} to {max(samples) * 1000:.3f})"
                )

    def hold(text: str, ours: str, other: str, limit: float) -> None:
        if ours in cost and other in cost:
            mine, its = (statistics.median(cost[one]) * 1000 for one in (ours, other))
            pairs = zip(cost[ours], cost[other], strict=False)
            ratio = statistics.median(one / another for one, another in pairs)
            results.hold(f"{text} ({mine:.3g} against {its:.3g} ms)", ratio, limit)

    postgresql, sqlite = "ebbs_and_flows, postgresql", "ebbs_and_flows, sqlite"
    hold("PostgreSQL, W10 / L1", f"{postgresql} W10", "L1: one UPDATE, postgresql-L1 W10", 1.6)
    hold("PostgreSQL, W10 / Absurd", f"{postgresql} W10", "Absurd, postgresql W10", 0.999)
    hold("PostgreSQL, W10 / DBOS", f"{postgresql} W10", "DBOS Transact, postgresql W10", 0.3)
    hold("SQLite, W10 / L2", f"{sqlite} W10", "L2: a step's statements, sqlite-L2 W10", 1.5)
    hold("SQLite, W10 / DBOS", f"{sqlite} W10", "DBOS Transact, sqlite W10", 0.12)
    for name, label in (("PostgreSQL", postgresql), ("SQLite", sqlite)):
        hold(f"{name}, step 100 / step 1", f"{label} last", f"{label} first", 1.2)
    return results


if __name__ == "__main__":
    given = arguments(__doc__)
    given.add_argument("--lengths", default="10,100,1", help="Tasks a flow.")
    options = given.parse_args()
    with entered(chosen(options, [*LIMITS, *OURS, *PEERS])) as taking_part:
        # What was taken until it is ended from outside is kept, too.
        try:
            wanted = [int(text) for text in options.lengths.split(",")]
            measure(taking_part, wanted, options.rounds)
        finally:
            result(taking_part).save()
