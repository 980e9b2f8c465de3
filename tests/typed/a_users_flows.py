"""What a project writes, checked by `mypy --strict` and by pyright, as its authors would."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any, assert_type

from django.test import TestCase

from ebbs_and_flows import (
    ExecutionContext,
    FailFlow,
    FlowStatus,
    FlowTemplate,
    Retry,
    RetryLater,
    Task,
    flow_runner,
    task,
)
from ebbs_and_flows.models import FlowExecution
from ebbs_and_flows.testing import FlowRun, FlowTestMixin, fail_task, run_flow


class Charge(Task):
    """Charge the order's card."""

    name = "charge"
    retry = Retry(attempts=5, delay=2, on=(ConnectionError,), never_on=(TimeoutError,))
    timeout = 30
    atomic = False

    def __init__(self, currency: str) -> None:
        super().__init__(name=f"charge-{currency}")
        self.currency = currency

    def run(self, context: ExecutionContext) -> ExecutionContext:
        total = context.get_typed("total", Decimal)
        assert_type(total, Decimal)
        if total < 0:
            raise FailFlow("A total cannot be negative.")
        context.log.info("%s %s", total, self.currency)
        context.progress(1, 2, "charged")
        return context.with_entries(receipt=f"R{context.flow_execution_id}")


class Fetch(Task):
    async def run(self, context: ExecutionContext) -> ExecutionContext:
        if context.attempt == 1:
            raise RetryLater(60, "not yet")
        return context


@task
def book(context: ExecutionContext) -> ExecutionContext:
    lines: list[int] = context.get_typed("lines", list)
    copy = context.copy()
    copy.add("booked", len(lines))
    return copy


@task(name="ship", atomic=True, retry=Retry(), timeout=1.5)
async def ship(context: ExecutionContext) -> ExecutionContext:
    return context


template = FlowTemplate("order", "From paid to shipped", tasks=[Charge("EUR"), Fetch(), book])
template.add_task(ship)
assert_type(flow_runner.register_flow_template(template), FlowTemplate)


def schedule(order_id: int, entries: Mapping[str, Any]) -> int:
    flow = flow_runner.schedule_flow("order", {"order_id": order_id}, key=f"order-{order_id}")
    assert_type(flow, FlowExecution)
    again = flow_runner.run_flow(FlowStatus.SCHEDULED)
    if again is not None and again.status == FlowStatus.FAILED:
        flow_runner.reschedule_flow_execution(again, reason="mended")
        flow_runner.fork_flow_execution(again, from_task="book", changes=entries)
    stored = again.execution_context if again is not None else ExecutionContext(entries)
    return stored.get_typed("booked", int)


class OrderTest(FlowTestMixin, TestCase):
    def test_an_order(self) -> None:
        run = self.flows.run("order", {"order_id": 1}).assert_succeeded()
        assert_type(run, FlowRun)
        assert run.context.get_typed("booked", int) == 1
        with fail_task("order", "book", ValueError):
            run_flow("order").assert_failed("book", error=ValueError).rerun()
