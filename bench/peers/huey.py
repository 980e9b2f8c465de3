"""huey: a pipeline of N tasks, over SQLite or Redis, in a consumer of one worker."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

from huey import RedisHuey, SqliteHuey

from bench.harness.contender import Order, do_task, main

order = Order.read()
if order.variant == "redis":
    huey = RedisHuey("peer", url=order.url)
else:
    huey = SqliteHuey("peer", filename=order.url)


@huey.task()
def step(flow: int, task: int, before: str = "") -> str:
    return do_task(flow, task)


def setup(order: Order) -> None:
    """Do nothing: the storage makes its tables itself."""


def schedule(order: Order, flows: Iterable[int]) -> None:
    # The consumer knows the task by the name of its module.
    from bench.peers.huey import huey, step

    for flow in flows:
        pipeline = step.s(flow, 0)
        for task in range(1, order.tasks):
            pipeline = pipeline.then(step, flow, task)
        huey.enqueue(pipeline)


def work(order: Order) -> None:
    consumer = ["-m", "huey.bin.huey_consumer", "bench.peers.huey.huey", "--workers", "1"]
    os.execv(sys.executable, [sys.executable, *consumer])


if __name__ == "__main__":
    main(setup, schedule, work)
