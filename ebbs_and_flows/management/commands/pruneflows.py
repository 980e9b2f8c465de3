"""`manage.py pruneflows`: deletes flows that ended long ago."""

from __future__ import annotations

import argparse
from typing import Any

from ...service import flow_service
from ...status import FINISHED, FlowStatus
from ..arguments import duration, known_template, positive, refusals
from ..base import FlowCommand


class Command(FlowCommand):
    """Delete flows that ended long ago."""

    help = (
        "Deletes flows that succeeded or were cancelled longer ago than that, with all their"
        " records, in batches. Failed flows wait for somebody: they go only with --status failed."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the options."""
        parser.add_argument("--older-than", required=True, metavar="DURATION", help="90d, 12h.")
        parser.add_argument("--template", metavar="NAME", help="Only this one.")
        parser.add_argument(
            "--status",
            action="append",
            choices=[status.value.lower() for status in FINISHED],
            help="Only flows that ended so; repeatable; by default succeeded and cancelled.",
        )
        parser.add_argument(
            "--batch-size", type=int, default=500, metavar="N", help="Flows a transaction."
        )
        parser.add_argument("--dry-run", action="store_true", help="Only say how many.")

    def handle(self, *args: Any, **options: Any) -> None:
        """Delete them and say how many."""
        positive("--batch-size", options["batch_size"])
        chosen = options["status"] or ["succeeded", "cancelled"]
        with refusals():
            if options["template"] is not None:
                known_template(options["template"])
            number = flow_service.prune_finished(
                duration("--older-than", options["older_than"]),
                template_name=options["template"],
                statuses=[FlowStatus(text.upper()) for text in chosen],
                batch_size=options["batch_size"],
                dry_run=options["dry_run"],
            )
        flows = "1 flow" if number == 1 else f"{number} flows"
        would = "would be" if options["dry_run"] else ("was" if number == 1 else "were")
        self.stdout.write(f"{flows} {would} deleted.")
