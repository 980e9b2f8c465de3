"""What the commands have in common."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from django.core.management import BaseCommand
from django.core.management.base import OutputWrapper

_ENDED_BY_SIGPIPE = 141
_EX_IOERR = 74
"""What a command exits with that did its work and could not say so (sysexits.h)."""


def escaped(text: str) -> str:
    """Return a text with what would steer a terminal escaped, its lines and tabs kept."""
    if text.isprintable():
        return text
    return "".join(
        character
        if character.isprintable() or character in "\n\t"
        else character.encode("unicode_escape").decode()
        for character in text
    )


class SafeOutput(OutputWrapper):
    """A command's output: escapes what would steer a terminal, and what its encoding lacks.

    What cannot be written because the disk is full is left out: the command's work goes on.
    """

    def __init__(self, out: Any) -> None:
        self.failure: OSError | None = None
        # Not one wrapper in another: Django's adds a line break to each text.
        self._stream: Any = getattr(out, "_out", out)
        super().__init__(self._stream)

    def write(  # type: ignore[override]  # as Django's own has it
        self,
        msg: str = "",
        style_func: Callable[[str], str] | None = None,
        ending: str | None = None,
    ) -> None:
        """Write a text, by default with a line break at its end."""
        self._attempt(
            lambda: OutputWrapper.write(self, self._fit(escaped(msg)), style_func, ending)
        )

    def write_verbatim(self, text: str) -> None:
        """Write what is meant to steer the terminal."""
        self._attempt(lambda: self._stream.write(self._fit(text)))

    def _fit(self, text: str) -> str:
        encoding = getattr(self._stream, "encoding", None)
        if not isinstance(encoding, str):
            return text
        return text.encode(encoding, "backslashreplace").decode(encoding)

    def flush(self) -> None:
        """Write out what is buffered."""
        if hasattr(self._stream, "flush"):
            self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except BrokenPipeError:
            raise
        except OSError as error:
            self.failure = error


class FlowCommand(BaseCommand):
    """A command whose output never undoes nor hides its work.

    It ends quietly when no one reads its output any more, as under `head`.
    """

    @property  # type: ignore[override]
    def stdout(self) -> SafeOutput:
        """The output, whatever stream a caller has set."""
        return self._safe_stdout

    @stdout.setter
    def stdout(self, out: Any) -> None:
        self._safe_stdout = SafeOutput(out)

    @property  # type: ignore[override]
    def stderr(self) -> SafeOutput:
        """The output for errors."""
        return self._safe_stderr

    @stderr.setter
    def stderr(self, out: Any) -> None:
        self._safe_stderr = SafeOutput(out)

    def run_from_argv(self, argv: list[str]) -> None:
        """Run the command as the shell asks for it."""
        try:
            try:
                super().run_from_argv(argv)
            finally:
                # Here and not at the interpreter's end, where no one can catch what it raises.
                self.stdout.flush()
        except BrokenPipeError:
            self._drop_output()
            sys.exit(_ENDED_BY_SIGPIPE)
        if self.stdout.failure is not None:
            self._drop_output()
            problem = self.stdout.failure.strerror or str(self.stdout.failure)
            self.stderr.write(
                f"The work was done, but its output could not be written: {problem}."
            )
            sys.exit(_EX_IOERR)

    @staticmethod
    def _drop_output() -> None:
        # What is left would be flushed at the interpreter's end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
