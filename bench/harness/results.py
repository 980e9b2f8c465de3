"""What was measured, kept as JSON so that one report is made of parts that were run alone."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from . import servers
from .quiet import watch

FOLDER = Path(os.environ.get("BENCH_RESULTS", Path(__file__).resolve().parent.parent / "results"))


@dataclass(frozen=True, slots=True)
class Goal:
    """A figure beside the goal that it is held to."""

    text: str
    measured: str
    met: bool

    @property
    def line(self) -> str:
        return f"{'met' if self.met else 'NOT MET':8} {self.text}: {self.measured}"


@dataclass(slots=True)
class Results:
    """The figures of one part."""

    part: str
    # A contender's label -> a column's name -> milliseconds, flows a second, …, as text.
    table: dict[str, dict[str, str]] = field(default_factory=dict)
    goals: list[Goal] = field(default_factory=list)
    # A contender's label -> why it was not run.
    reasons: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    settings: list[str] = field(default_factory=servers.describe)
    commit: str = field(default_factory=servers.commit)
    at: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()))

    def put(self, label: str, column: str, text: str) -> None:
        self.table.setdefault(label, {})[column] = text

    def hold(self, text: str, value: float, limit: float, *, unit: str = "") -> None:
        """Note a goal: the value may be at most the limit."""
        shown = f"{value:.3g}{unit} (at most {limit:.3g}{unit})"
        self.goals.append(Goal(text, shown, value <= limit))

    def reach(self, text: str, value: float, limit: float, *, unit: str = "") -> None:
        """Note a goal: the value must be at least the limit."""
        shown = f"{value:.3g}{unit} (at least {limit:.3g}{unit})"
        self.goals.append(Goal(text, shown, value >= limit))

    def save(self) -> None:
        """Keep the part and print its goals."""
        if watch.sentence:
            self.notes.append(f"{self.part}: {watch.sentence}")
        FOLDER.mkdir(parents=True, exist_ok=True)
        (FOLDER / f"{self.part}.json").write_text(json.dumps(asdict(self), indent=1))
        for goal in self.goals:
            print(goal.line)


def load(part: str) -> Results | None:
    """Return a part as it was measured last, or None."""
    path = FOLDER / f"{part}.json"
    if not path.exists():
        return None
    values = json.loads(path.read_text())
    return Results(**{**values, "goals": [Goal(**goal) for goal in values["goals"]]})
