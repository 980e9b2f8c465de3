"""Whether others use the machine: what is measured beside them is not what it costs."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

STAT = Path("/proc/stat")
LOOK_SECONDS = 0.3
# Of all cores together.
QUIET_SHARE = 0.25


def _ticks() -> tuple[int, int]:
    """Return the ticks that were spent, and those that were not (idle, or waiting for disks)."""
    numbers = [int(text) for text in STAT.read_text().split("\n", 1)[0].split()[1:9]]
    idle = numbers[3] + numbers[4]
    return sum(numbers) - idle, idle


def busy_share() -> float:
    """Return how much of the machine is used now, from 0 to 1; 0 where nobody can tell."""
    if not STAT.exists():
        return 0.0
    busy, idle = _ticks()
    time.sleep(LOOK_SECONDS)
    busy_after, idle_after = _ticks()
    passed = busy_after - busy + idle_after - idle
    return (busy_after - busy) / passed if passed else 0.0


@dataclass(slots=True)
class Watch:
    """Waits for quiet moments, and counts in vain."""

    # At most, before one sample.
    seconds: float = float(os.environ.get("BENCH_QUIET_SECONDS", "10"))
    samples: int = 0
    disturbed: int = 0

    def wait(self) -> None:
        """Return when the machine is quiet, or when that has taken too long."""
        ends_at = time.monotonic() + self.seconds
        self.samples += 1
        while busy_share() > QUIET_SHARE:
            if time.monotonic() > ends_at:
                self.disturbed += 1
                return

    @property
    def sentence(self) -> str:
        """What a report says of it; empty when all was quiet."""
        if not self.disturbed:
            return ""
        return (
            f"{self.disturbed} of {self.samples} samples were taken while others used more than"
            f" {QUIET_SHARE:.0%} of the machine: the medians are too high."
        )


watch = Watch()
"""The one of this process."""
