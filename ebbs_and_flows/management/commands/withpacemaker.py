"""`manage.py withpacemaker`: runs a queue's worker and a pacemaker in one process."""

from __future__ import annotations

import argparse
from typing import Any

from django.core.management import BaseCommand, call_command

from ...pacemaker import Pacemaker


class Command(BaseCommand):
    """Run another command with a pacemaker beside it."""

    help = (
        "Runs a queue's worker, a command such as db_worker, with a pacemaker in its process,"
        " which wakes the worker for what falls due later, is to be retried or was orphaned."
        " django-q2's qcluster needs it not: there each worker starts its own."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the options."""
        parser.add_argument("worker", metavar="COMMAND", help="The worker's command.")
        parser.add_argument(
            "arguments", nargs=argparse.REMAINDER, metavar="…", help="Its own arguments."
        )

    def handle(self, *args: Any, **options: Any) -> None:
        """Run it until it ends."""
        with Pacemaker():
            call_command(options["worker"], *options["arguments"])
