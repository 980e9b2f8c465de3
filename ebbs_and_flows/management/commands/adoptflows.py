"""`manage.py adoptflows`: gives unfinished flows the plan of the running code."""

from __future__ import annotations

import argparse
from typing import Any

from ...runner import flow_runner
from ..arguments import actor, refusals
from ..base import FlowCommand


class Command(FlowCommand):
    """Give unfinished flows the plan of the running code."""

    help = (
        "Gives the unfinished flows of a template the tasks and the version of the running code,"
        " also a lower version after a rollback. A flow that a worker holds keeps its plan. When"
        " the completed tasks of a flow do not fit, nothing is changed."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the options."""
        parser.add_argument("--template", required=True, metavar="NAME", help="Of which template.")
        parser.add_argument("--reason", required=True, help="Why; kept in each flow's history.")
        parser.add_argument("--dry-run", action="store_true", help="Only say how many.")

    def handle(self, *args: Any, **options: Any) -> None:
        """Store the plan in them and say how many they were."""
        with refusals():
            template = flow_runner.get_flow_template(options["template"])
            number = flow_runner.service.adopt_plan(
                template,
                actor=actor("adoptflows"),
                reason=options["reason"],
                dry_run=options["dry_run"],
            )
        flows = "1 flow" if number == 1 else f"{number} flows"
        has = "has" if number == 1 else "have"
        verb = "would get" if options["dry_run"] else f"{has} now"
        self.stdout.write(
            f"{flows} of template {template.name!r} {verb} the plan of version"
            f" {template.version}: {', '.join(template.task_names)}."
        )
