"""DBOS Transact: a workflow of N steps; called directly, or enqueued for workers."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from dbos import DBOS, DBOSClient

from bench.harness.contender import Order, do_task, main

QUEUE = "flows"


@DBOS.step()
def step(flow: int, task: int) -> str:
    return do_task(flow, task)


@DBOS.workflow()
def workflow(flow: int, tasks: int) -> str:
    for task in range(tasks):
        step(flow, task)
    return "done"


def url(order: Order) -> str:
    if order.variant == "sqlite":
        return f"sqlite:///{order.url}"
    return order.url.replace("postgresql://", "postgresql+psycopg://")


def launch(order: Order) -> None:
    DBOS(
        config={
            "name": "bench",
            "system_database_url": url(order),
            "log_level": "ERROR",
            "run_admin_server": False,
            # All processes are of one version, and each an executor of its own.
            "application_version": "1",
        }
    )
    DBOS.launch()
    # Without a limit the first worker would take the whole backlog; the more it may take at each
    # polling the faster it is, so this is half of the greatest one.
    DBOS.register_queue(QUEUE, worker_concurrency=500)


def setup(order: Order) -> None:
    launch(order)
    DBOS.destroy()


def schedule(order: Order, flows: Iterable[int]) -> None:
    if order.purpose == "steps":
        return
    client = DBOSClient(system_database_url=url(order))
    for flow in flows:
        client.enqueue(
            {"queue_name": QUEUE, "workflow_name": "workflow", "app_version": "1"},
            flow,
            order.tasks,
        )
    client.destroy()


def work(order: Order) -> None:
    launch(order)
    if order.purpose == "steps":
        for flow in range(order.flows):
            workflow(flow, order.tasks)
        DBOS.destroy()
    else:
        threading.Event().wait()


if __name__ == "__main__":
    main(setup, schedule, work)
