"""What a claim costs, against what else is in the table.

Timed are the call of `flow_runner.run_next()` until the flow's first task starts (all that finds
and takes the flow, and stores its first attempt), and the whole of it for a flow of one task.

small     1,000 due flows, and nothing else
large     1,000,000 finished, 100,000 due, 100,000 of the highest priority scheduled for later
paused    1,000 due flows behind 100,000 due ones, of a higher priority, of a paused template
full      the same, of a template whose `max_running` is reached
unknown   the same, of a template that no process knows
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.contenders import arguments
from bench.harness.contender import Order, read_stamps
from bench.harness.quiet import watch
from bench.harness.results import Results
from bench.harness.sampling import ROOT
from bench.harness.servers import place

SCENES = ("small", "large", "paused", "full", "unknown")
# The first ones of a process pay for its imports and its connection.
WARM_UP = 3


def _run(order: Order, *arguments: str) -> str:
    ran = subprocess.run(
        [sys.executable, "-m", "bench.claim", *arguments],
        cwd=ROOT,
        env={**order.environment, "DJANGO_SETTINGS_MODULE": "bench.ours.settings"},
        check=False,
        capture_output=True,
        text=True,
        timeout=900,
    )
    if ran.returncode:
        raise SystemExit(f"{' '.join(arguments)}: {ran.stderr.strip()[-2000:]}")
    return ran.stdout


def seed(scene: str, scale: float) -> None:
    """Make the tables and fill them."""
    from django.core.management import call_command

    from bench.ours.seed import fill

    call_command("migrate", verbosity=0)
    fill(scene, scale)


def time_claims(count: int) -> list[tuple[float, float]]:
    """Run due flows; return the milliseconds to the first task, and to the end, of each."""
    from bench.ours.flows import register_obstacles
    from ebbs_and_flows import flow_runner

    register_obstacles()
    stamps = Order.read().stamps
    found = []
    for _ in range(WARM_UP + count):
        began = time.monotonic_ns()
        flow = flow_runner.run_next()
        ended = time.monotonic_ns()
        if flow is None or flow.template_name != "W1":
            raise SystemExit(f"A flow of W1 is due, but {flow} was run.")
        at = read_stamps(stamps)[-1][0]
        found.append(((at - began) / 1e6, (ended - began) / 1e6))
    return found[WARM_UP:]


@contextmanager
def seeded(variants: Sequence[str], scale: float) -> Iterator[dict[tuple[str, str], Order]]:
    """Yield an order for each scene on each database."""
    with ExitStack() as stack:
        orders = {}
        for variant in variants:
            for scene in SCENES:
                began = time.monotonic()
                url, folder = stack.enter_context(place(variant, f"claim_{scene}"))
                stamps = str(Path(folder) / "stamps")
                order = Order(variant=variant, url=url, directory=folder, stamps=stamps)
                _run(order, "seed", scene, str(scale))
                orders[variant, scene] = order
                print(f"  {variant}, {scene}: seeded in {time.monotonic() - began:.0f} s")
        yield orders


def main() -> None:
    """Take samples of all scenes in turns."""
    given = arguments(__doc__)
    given.add_argument("--scale", type=float, default=1, help="0.1: a tenth of the great tables.")
    given.add_argument("--claims", type=int, default=20, help="Claims of one sample.")
    given.add_argument("--databases", default="postgresql,sqlite")
    options = given.parse_args()
    variants = options.databases.split(",")
    results = Results("claim")
    if options.scale != 1:
        results.notes.append(f"Claims: tables of {options.scale:g} times the size.")
    with seeded(variants, options.scale) as orders:
        # The medians of each round: to the first task, and in all.
        found: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for _ in range(options.rounds):
            for key, order in orders.items():
                watch.wait()
                taken = json.loads(_run(order, "time", str(options.claims)))
                to_task, whole = (statistics.median(times) for times in zip(*taken, strict=True))
                found.setdefault(key, []).append((to_task, whole))
    for variant in variants:
        for scene in SCENES:
            to_task, whole = (
                statistics.median(times) for times in zip(*found[variant, scene], strict=True)
            )
            label = f"claim, {scene}, {variant}"
            results.put(label, "to the first task, ms", f"{to_task:.3g}")
            results.put(label, "whole flow of one task, ms", f"{whole:.3g}")
            print(f"{label:30} {to_task:8.3f} ms to the first task, {whole:8.3f} ms in all")
        small = [to_task for to_task, _ in found[variant, "small"]]
        for scene in SCENES[1:]:
            costs = [to_task for to_task, _ in found[variant, scene]]
            pairs = zip(costs, small, strict=True)
            ratio = statistics.median(cost / base for cost, base in pairs)
            text = f"{variant}, a claim: {scene} / small ({statistics.median(costs):.3g} ms)"
            results.hold(text, ratio, 1.2)
    results.save()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["seed", name, factor]:
            import django

            django.setup()
            seed(name, float(factor))
        case ["time", number]:
            import django

            django.setup()
            print(json.dumps(time_claims(int(number))))
        case _:
            main()
