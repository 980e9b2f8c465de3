"""What the demo schedules, and the one repair that its data needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from typing import Any

from ebbs_and_flows import flow_runner
from ebbs_and_flows.models import FlowExecution


@dataclass(frozen=True, slots=True)
class Plan:
    """One flow to schedule; its key makes sure that there is only one of it."""

    template: str
    subject: str
    entries: Mapping[str, Any]

    @property
    def key(self) -> str:
        """The idempotency key, unique within the template."""
        return f"demo-{self.subject}"


PLANS = (
    *(Plan("weather-report", str(year), {"year": year}) for year in range(2012, 2016)),
    Plan("weather-bulletin", "2015-11", {"month": date(2015, 11, 1)}),
    Plan("weather-bulletin", "2015-12", {"month": date(2015, 12, 1)}),
    *(Plan("airport-directory", code, {"territory": code}) for code in ("HI", "PR", "GU")),
)

MEND_AIRPORT, MEND_FIELD, MEND_VALUE = "GUM", "longitude", Decimal("144.7959825")
MEND_REASON = "Guam lies east of Greenwich; the file has lost the sign"


def schedule(plan: Plan) -> tuple[FlowExecution, bool]:
    """Return the plan's flow, and whether this call has made it."""
    known = FlowExecution.objects.filter(template_name=plan.template, key=plan.key)
    was_there = known.exists()
    flow = flow_runner.schedule_flow(plan.template, plan.entries, key=plan.key, actor="demo")
    return flow, not was_there
