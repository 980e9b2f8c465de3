"""What a type checker must refuse: each line that is marked is an error, or the check fails."""

from __future__ import annotations

from decimal import Decimal

from ebbs_and_flows import ExecutionContext, FlowTemplate, flow_runner, task


def total(context: ExecutionContext) -> str:
    return context.get_typed("total", Decimal)  # type: ignore[return-value]


@task  # type: ignore[arg-type]
def returns_nothing(context: ExecutionContext) -> None:
    return None


FlowTemplate("order", tasks=["book"])  # type: ignore[list-item]
flow_runner.schedule_flow("order", {"a": 1}, prio=3)  # type: ignore[call-arg]
flow_runner.run_flow("FAILED")  # type: ignore[arg-type]
