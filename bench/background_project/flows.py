"""Flows of tasks that do nothing, that wait, and that tell when they start."""

from __future__ import annotations

import time

from ebbs_and_flows import ExecutionContext, FlowTemplate, Task, flow_runner, task


def step(index: int) -> Task:
    @task(name=f"step-{index}")
    def step(context: ExecutionContext) -> ExecutionContext:
        return context

    return step


def wait(index: int) -> Task:
    @task(name=f"wait-{index}")
    def wait(context: ExecutionContext) -> ExecutionContext:
        time.sleep(0.05)
        return context

    return wait


@task
def tell(context: ExecutionContext) -> ExecutionContext:
    return context.with_entries(started=time.time())


flow_runner.register_flow_template(FlowTemplate("tells", tasks=[tell]))
flow_runner.register_flow_template(FlowTemplate("ten-steps", tasks=map(step, range(10))))
flow_runner.register_flow_template(FlowTemplate("waits", tasks=map(wait, range(5))))
