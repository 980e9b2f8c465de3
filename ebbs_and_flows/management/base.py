"""What the commands have in common."""

from __future__ import annotations

import os
import sys

from django.core.management import BaseCommand

_ENDED_BY_SIGPIPE = 141


class FlowCommand(BaseCommand):
    """A command that ends quietly when nobody reads its output any more, as under `head`."""

    def run_from_argv(self, argv: list[str]) -> None:
        """Run the command as the shell asks for it."""
        try:
            try:
                super().run_from_argv(argv)
            finally:
                # Here and not at the interpreter's end, where nobody can catch what it raises.
                sys.stdout.flush()
        except BrokenPipeError:
            # What is left would be flushed at that end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(_ENDED_BY_SIGPIPE)
