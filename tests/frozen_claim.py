"""A process that is frozen in the middle of a claim, as one in a paused container is."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any


def main(folder: str, template_name: str) -> None:
    """Claim a flow of the template, and stop where its write has been made and not committed."""
    import django

    django.setup()
    from django.db import connections

    from ebbs_and_flows import flow_runner
    from ebbs_and_flows.models import FlowExecution

    connection = connections[flow_runner.service.repository.using]
    table = FlowExecution._meta.db_table

    def freeze(execute: Any, sql: str, *arguments: Any) -> Any:
        answer = execute(sql, *arguments)
        if "claim = " in sql and connection.in_atomic_block and f"UPDATE {table}" in sql:
            Path(folder, "frozen").touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        return answer

    with connection.execute_wrapper(freeze):
        flow_runner.run_next(templates=[template_name])


if __name__ == "__main__":
    main(*sys.argv[1:])
