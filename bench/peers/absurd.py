"""Absurd: a task of N steps, spawned on a queue and run by its worker."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from absurd_sdk import Absurd

from bench.harness.contender import Order, do_task, main


def connect(order: Order) -> Absurd:
    app = Absurd(order.url, queue_name="flows")

    @app.register_task(name="flow")
    def flow(params: Any, context: Any) -> dict[str, Any]:
        for task in range(params["tasks"]):
            context.step(f"step_{task}", lambda task=task: do_task(params["flow"], task))
        return {"done": True}

    return app


def setup(order: Order) -> None:
    absurdctl = Path(sys.executable).parent / "absurdctl"
    subprocess.run([absurdctl, "init", "--database", order.url], check=True)
    app = connect(order)
    app.create_queue("flows")
    app.close()


def schedule(order: Order, flows: Iterable[int]) -> None:
    app = connect(order)
    for flow in flows:
        app.spawn("flow", {"flow": flow, "tasks": order.tasks})
    app.close()


def work(order: Order) -> None:
    connect(order).start_worker()


if __name__ == "__main__":
    main(setup, schedule, work)
