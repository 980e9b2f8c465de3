"""The flows that are run through the fire; each task notes outside what it does."""

from __future__ import annotations

import os
import random
import signal
import time

from django.db import connection

from ebbs_and_flows import ExecutionContext, FlowTemplate, Retry, flow_runner, task

from .evidence import noted

AGAIN = Retry(attempts=20, delay=0, jitter=False)


@task
@noted
def first(context: ExecutionContext) -> ExecutionContext:
    return context.with_entries(first=context.attempt)


@task(retry=AGAIN)
@noted
def flaky(context: ExecutionContext) -> ExecutionContext:
    """Fail at the first attempt."""
    if context.attempt == 1:
        raise ConnectionError("not yet")
    return context.with_entries(flaky=context.attempt)


@task(atomic=True, retry=AGAIN)
@noted
def book(context: ExecutionContext) -> ExecutionContext:
    """Write to the database, and fail at the first attempt after that."""
    from tests.shop.models import Order

    Order.objects.create(number=f"{context.flow_execution_id} {context.attempt}")
    if context.attempt == 1:
        raise ConnectionError("not yet")
    return context.with_entries(book=context.attempt)


@task
@noted
def last(context: ExecutionContext) -> ExecutionContext:
    return context.with_entries(last=context.attempt)


@task
@noted
def fail(context: ExecutionContext) -> ExecutionContext:
    raise ValueError("the card is bad")


@task
@noted
def kill_worker_once(context: ExecutionContext) -> ExecutionContext:
    if context.attempt == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return context.with_entries(kill_worker_once=context.attempt)


@task(retry=AGAIN)
@noted
def cancel(context: ExecutionContext) -> ExecutionContext:
    """Ask for the end of its own flow."""
    assert context.flow_execution_id is not None
    flow_runner.cancel_flow_execution(context.flow_execution_id)
    return context.with_entries(cancel=context.attempt)


# At random: some milliseconds each, so that a fault finds a task in progress as often as not.


@task
@noted
def quick(context: ExecutionContext) -> ExecutionContext:
    return context.with_entries(quick=context.attempt)


@task
@noted
def slow(context: ExecutionContext) -> ExecutionContext:
    time.sleep(random.uniform(0.01, 0.06))
    return context.with_entries(slow=context.attempt)


@task(retry=AGAIN)
@noted
def moody(context: ExecutionContext) -> ExecutionContext:
    """Fail now and then."""
    if random.random() < 0.05:
        raise ConnectionError("out of temper")
    return context.with_entries(moody=context.attempt)


@task(timeout=0.5, retry=AGAIN)
@noted
def stuck(context: ExecutionContext) -> ExecutionContext:
    """Take too long now and then, in the middle of a query where there is a server."""
    if random.random() < 0.02:
        if connection.vendor == "sqlite":
            time.sleep(2)
        else:
            function = "pg_sleep" if connection.vendor == "postgresql" else "SLEEP"
            with connection.cursor() as cursor:
                cursor.execute(f"SELECT {function}(2)")
    return context.with_entries(stuck=context.attempt)


@task(atomic=True, retry=AGAIN)
@noted
def order(context: ExecutionContext) -> ExecutionContext:
    from tests.shop.models import Order

    Order.objects.create(number=f"{context.flow_execution_id} {context.attempt}")
    time.sleep(random.uniform(0, 0.01))
    return context.with_entries(order=context.attempt)


@task
@noted
def doubtful(context: ExecutionContext) -> ExecutionContext:
    """Fail now and then, and wait for an operator."""
    if random.random() < 0.03:
        raise ValueError("an operator must look at this")
    return context.with_entries(doubtful=context.attempt)


@task
@noted
def appended(context: ExecutionContext) -> ExecutionContext:
    """Come with a deploy, while flows are on their way."""
    return context.with_entries(appended=context.attempt)


STORM = FlowTemplate("storm", tasks=[quick, moody, doubtful, slow, stuck, order])
if os.environ.get("EBBS_CHAOS_RELEASE") == "2":
    STORM.add_task(appended)
flow_runner.register_flow_template(STORM)
