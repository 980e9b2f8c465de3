"""Writes docs/benchmarks.md and its plot from what was measured last.

`python -m bench.report`; nothing is measured here.
"""

from __future__ import annotations

import math
from html import escape
from pathlib import Path

from bench.harness.results import Results, load
from bench.harness.sampling import ROOT

PARTS = ("steps", "drain", "latency", "claim", "memory", "heartbeat", "profile")
PAGE = ROOT / "docs" / "benchmarks.md"
PLOT = ROOT / "docs" / "images" / "benchmarks.svg"
PLOTTED = "W10, ms a step"

INTRODUCTION = """\
# Benchmarks

What a step costs, how fast a backlog is drained, how long a flow waits, and whether a claim stays
flat: ours, the limits of the databases, and the best peers, in one harness.

A step is one task with its share of everything around it: its flow's claim and end. Every task
returns one small value. Each contender is installed as its own documentation shows, with its own
durable default, in an environment of its own; nobody's durability is lowered. Samples are taken
in turns (A B C A B C …); shown are the medians, and the least in brackets. Absolute times are this
machine's: compare within a column.

Make them yourself with `make bench`; `bench/README.md` tells how, and what a
profile says.
"""
LIMITS = """\
**L1** is one autocommit `UPDATE` of one row through the driver's own cursor: what a database takes
to make one thing durable. **L2** is the statements of a step of ours through that cursor, in one
transaction. Redis does not wait for the disk: what runs on it alone is quick, and what it held
last is lost with the server.
"""
SCENES = """\
small: 1,000 due flows. large: 1,000,000 finished, 100,000 due, and 100,000 of the highest priority
that are scheduled for later. paused, full, unknown: 1,000 due flows behind 100,000 due ones, of a
higher priority, of a paused template, of one whose `max_running` is reached, and of one that no
process knows.
"""


def _table(parts: list[Results]) -> list[str]:
    rows: dict[str, dict[str, str]] = {}
    for part in parts:
        for label, columns in part.table.items():
            rows.setdefault(label, {}).update(columns)
    columns = list(dict.fromkeys(name for found in rows.values() for name in found))
    lines = [
        f"| | {' | '.join(columns)} |",
        f"| --- |{' ---: |' * len(columns)}",
    ]
    for label, found in rows.items():
        lines.append(f"| {label} | {' | '.join(found.get(name, '') for name in columns)} |")
    return lines


def _plot(rows: dict[str, float]) -> str:
    """Return a bar a contender, on a logarithmic scale."""
    ordered = sorted(rows.items(), key=lambda item: item[1])
    least = 10 ** math.floor(math.log10(min(rows.values())))
    most = 10 ** math.ceil(math.log10(max(rows.values())))
    left, width, height = 270, 420, 22

    def place(value: float) -> float:
        return left + width * math.log10(value / least) / math.log10(most / least)

    tall = height * len(ordered) + 50
    size = f'viewBox="0 0 760 {tall}" width="760" height="{tall}"'
    font = 'font-family="sans-serif" font-size="12"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font} role="img">',
        "<title>Milliseconds a step, flows of ten tasks, logarithmic; shorter is better</title>",
        '<rect width="100%" height="100%" fill="#ffffff"/>',
    ]
    tick = least
    while tick <= most * 1.001:
        x = place(tick)
        lines.append(f'<path d="M{x:.0f} 8V{tall - 38}" stroke="#dddddd"/>')
        lines.append(
            f'<text x="{x:.0f}" y="{tall - 24}" text-anchor="middle" fill="#555555">'
            f"{tick:g} ms</text>"
        )
        tick *= 10
    for number, (label, value) in enumerate(ordered):
        y = 10 + number * height
        colour = "#999999"
        if label.startswith("ebbs_and_flows"):
            colour = "#0b6e8a"
        elif label.startswith("L"):
            colour = "#cfcfcf"
        lines.append(f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{escape(label)}</text>')
        lines.append(
            f'<rect x="{left}" y="{y + 2}" width="{max(1, place(value) - left):.0f}"'
            f' height="{height - 8}" fill="{colour}"/>'
        )
        lines.append(
            f'<text x="{place(value) + 5:.0f}" y="{y + 13}" fill="#222222">{value:.3g}</text>'
        )
    middle = left + width / 2
    lines.append(
        f'<text x="{middle:.0f}" y="{tall - 6}" text-anchor="middle" fill="#555555">'
        f"a step of a flow of ten tasks; shorter is better</text>"
    )
    return "\n".join([*lines, "</svg>", ""])


def write() -> Path:
    """Write the page and the plot; return where the page is."""
    parts = [part for part in map(load, PARTS) if part is not None]
    if not parts:
        raise SystemExit("Nothing was measured yet: run `make bench`, or one of its parts.")
    lines = [INTRODUCTION]
    steps = next((part for part in parts if part.part == "steps"), None)
    plotted = {
        label: float(columns[PLOTTED].split()[0])
        for label, columns in (steps.table if steps else {}).items()
        if PLOTTED in columns
    }
    if plotted:
        PLOT.parent.mkdir(parents=True, exist_ok=True)
        PLOT.write_text(_plot(plotted))
        lines += ["![Milliseconds a step](images/benchmarks.svg)", ""]
    lines += ["## Measured", "", LIMITS]
    lines += [*_table([part for part in parts if part.part != "claim"]), ""]
    lines += _reasons(parts)
    claims = [part for part in parts if part.part == "claim"]
    if claims:
        lines += [
            "## A claim, against what else is in the table",
            "",
            SCENES,
            "",
            *_table(claims),
            "",
        ]
    lines += ["## Goals", "", "| goal | measured | |", "| --- | --- | --- |"]
    lines += [
        f"| {goal.text} | {goal.measured} | {'met' if goal.met else '**not met**'} |"
        for part in parts
        for goal in part.goals
    ]
    lines += ["", "## Versions and settings", ""]
    lines += [f"- {line}" for line in parts[0].settings]
    lines += [f"- {found}" for part in parts for found in part.versions.values()]
    lines += [f"- {part.part}: measured {part.at} at {part.commit}" for part in parts]
    lines += [f"- {note}" for part in parts for note in part.notes]
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text("\n".join(lines) + "\n")
    return PAGE


def _reasons(parts: list[Results]) -> list[str]:
    reasons = [f"- {label}: {reason}" for part in parts for label, reason in part.reasons.items()]
    return ["What could not be run:", "", *reasons, ""] if reasons else []


if __name__ == "__main__":
    print(f"Written: {write().relative_to(ROOT)}")
