"""`manage.py pruneflows`: deletes flows that ended long ago, or their values alone."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from django.core.management import CommandError

from ...service import flow_service
from ...status import FINISHED, FlowStatus
from ..arguments import duration, known_template, positive, refusals
from ..base import FlowCommand


class Command(FlowCommand):
    """Delete flows that ended long ago, or their values alone."""

    help = (
        "Deletes flows that succeeded or were cancelled longer ago than that, with all their"
        " records, in batches. Failed flows wait for a person: they go only with --status failed."
        " With --values-older-than, the flows and their history stay, and their entries, outputs"
        " and logs are deleted."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the options."""
        parser.add_argument("--older-than", metavar="DURATION", help="90d, 12h.")
        parser.add_argument(
            "--values-older-than", metavar="DURATION", help="Only the values; 30d, 12h."
        )
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
        values = options["values_older_than"] is not None
        if values == (options["older_than"] is not None):
            raise CommandError("Give either --older-than or --values-older-than.")
        option, given = "--older-than", options["older_than"]
        delete: Callable[..., int] = flow_service.prune_finished
        if values:
            option, given = "--values-older-than", options["values_older_than"]
            delete = flow_service.delete_values
        chosen = options["status"] or ["succeeded", "cancelled"]
        with refusals():
            if options["template"] is not None:
                known_template(options["template"])
            number = delete(
                duration(option, given),
                template_name=options["template"],
                statuses=[FlowStatus(text.upper()) for text in chosen],
                batch_size=options["batch_size"],
                dry_run=options["dry_run"],
            )
        flows = "1 flow" if number == 1 else f"{number} flows"
        deleted = "were" if values or number != 1 else "was"
        would = "would be" if options["dry_run"] else deleted
        self.stdout.write(f"{'The values of ' if values else ''}{flows} {would} deleted.")
