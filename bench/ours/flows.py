"""Flows of 1, 3, 10 and 100 small tasks."""

from __future__ import annotations

from bench.harness.contender import do_task
from ebbs_and_flows import ExecutionContext, FlowTemplate, Task, flow_runner


class Step(Task):
    """Add one small entry."""

    def __init__(self, index: int) -> None:
        super().__init__(name=f"step_{index}")
        self.index = index

    def run(self, context: ExecutionContext) -> ExecutionContext:
        return context.with_entries(
            **{f"value_{self.index}": do_task(context.get("flow", 0), self.index)}
        )


for length in (1, 3, 10, 100):
    flow_runner.register_flow_template(
        FlowTemplate(f"W{length}", tasks=[Step(index) for index in range(length)])
    )


def register_obstacles() -> None:
    """Register the templates whose flows stand in the way of a claim."""
    flow_runner.register_flow_template(FlowTemplate("paused", tasks=[Step(0)]))
    flow_runner.register_flow_template(FlowTemplate("full", tasks=[Step(0)], max_running=1))
