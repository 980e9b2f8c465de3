"""Procrastinate: a chain by hand, in which each job defers the next one."""

from __future__ import annotations

from collections.abc import Iterable

from procrastinate import App, PsycopgConnector

from bench.harness.contender import Order, do_task, main

app = App(connector=PsycopgConnector(conninfo=Order.read().url))


@app.task(name="step")
async def step(flow: int, task: int, tasks: int, value: str) -> None:
    value = do_task(flow, task)
    if task + 1 < tasks:
        await step.defer_async(flow=flow, task=task + 1, tasks=tasks, value=value)


def setup(order: Order) -> None:
    with app.open():
        app.schema_manager.apply_schema()


def schedule(order: Order, flows: Iterable[int]) -> None:
    with app.open():
        for flow in flows:
            step.defer(flow=flow, task=0, tasks=order.tasks, value="")


def work(order: Order) -> None:
    app.run_worker()


if __name__ == "__main__":
    main(setup, schedule, work)
