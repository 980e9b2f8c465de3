"""Which time it is: this process's clock goes on, or a test has it stand still.

Flows go by the database's clock, `FlowRepository.now()`, which stands still with this one.
"""

from __future__ import annotations

from datetime import datetime

from django.utils import timezone

frozen_at: datetime | None = None
"""Where the app's clock stands still, in UTC; set by `ebbs_and_flows.testing.freeze_clock`."""


def now() -> datetime:
    """Return this process's time, aware."""
    return frozen_at or timezone.now()
