"""What the database says of how it makes a claim: `python -m bench.explain_claim`.

`capture` and `explain` are for tests, too: they take any call, and explain what it asks for.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

from bench.claim import SCENES
from bench.harness.contender import Order
from bench.harness.servers import place

Statement = tuple[str, Any]


def capture(call: Callable[[], object], using: str = "default") -> list[Statement]:
    """Make the call in a transaction that is undone; return its statements with parameters."""
    from django.db import connections, transaction

    made: list[Statement] = []

    def note(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        made.append((sql, params))
        return execute(sql, params, many, context)

    with transaction.atomic(using=using, durable=True):
        with connections[using].execute_wrapper(note):
            call()
        transaction.set_rollback(True, using=using)
    return made


def explain(statement: Statement, using: str = "default") -> str:
    """Return the plan of a statement, a line a node; nothing is executed."""
    from django.db import connections

    connection = connections[using]
    prefix = "EXPLAIN QUERY PLAN " if connection.vendor == "sqlite" else "EXPLAIN "
    sql, params = statement
    with connection.cursor() as cursor:
        cursor.execute(prefix + sql, params)
        rows = cursor.fetchall()
    if connection.vendor != "sqlite":
        return "\n".join(str(row[-1]) for row in rows)
    # A node's id, its parent's, and its text.
    depth = {0: -1}
    for node, parent, *_ in rows:
        depth[node] = depth[parent] + 1
    return "\n".join("  " * depth[node] + text for node, *_, text in rows)


def explain_claim(using: str = "default") -> str:
    """Return the plans of all that finding and claiming a flow of the templates asks for."""
    from ebbs_and_flows import flow_runner

    def claim() -> None:
        flow_runner.has_work()
        flow_runner.service.claim(flow_runner.templates.values(), "explained")

    return "\n\n".join(
        f"{sql.strip()}\n  ->\n{explain((sql, params), using)}"
        for sql, params in capture(claim, using)
        if sql.lstrip().upper().startswith(("SELECT", "UPDATE", "INSERT", "WITH"))
    )


def main() -> None:
    """Print the plans over the large tables, or smaller ones."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--database", choices=["postgresql", "sqlite"], default="postgresql")
    parser.add_argument("--scene", choices=SCENES, default="large", help="As in bench.claim.")
    parser.add_argument("--scale", type=float, default=0.1, help="1: a million finished flows.")
    options = parser.parse_args()
    with place(options.database, "explain") as (url, folder):
        order = Order(variant=options.database, url=url, directory=folder)
        os.environ.update(order.environment, DJANGO_SETTINGS_MODULE="bench.ours.settings")
        import django
        from django.core.management import call_command
        from django.db import connections

        django.setup()
        from bench.ours.seed import fill

        call_command("migrate", verbosity=0)
        fill(options.scene, options.scale)
        print(explain_claim())
        connections.close_all()


if __name__ == "__main__":
    main()
