"""Prefect: a flow of N tasks with stored results, run in this process, over its local server."""

from __future__ import annotations

import os
from collections.abc import Iterable

from bench.harness.contender import Order, do_task, main


def setup(order: Order) -> None:
    """Do nothing: the local server makes its tables when it is first needed."""


def schedule(order: Order, flows: Iterable[int]) -> None:
    """Do nothing: `work` calls the flows."""


def work(order: Order) -> None:
    from prefect import flow as as_flow
    from prefect import task as as_task

    @as_task(persist_result=True)
    def step(flow: int, task: int) -> str:
        return do_task(flow, task)

    @as_flow(persist_result=True)
    def workflow(flow: int, tasks: int) -> str:
        for task in range(tasks):
            step(flow, task)
        return "done"

    for flow in range(order.flows):
        workflow(flow, order.tasks)


if __name__ == "__main__":
    os.environ["PREFECT_HOME"] = Order.read().directory
    os.environ["PREFECT_LOGGING_LEVEL"] = "ERROR"
    os.environ["DO_NOT_TRACK"] = "1"
    main(setup, schedule, work)
