"""A PostgreSQL of its own, that may be killed: the machine's is left alone."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def find(program: str) -> str | None:
    """Return where a program of PostgreSQL's is; Debian leaves the server's off the PATH."""
    places = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{program}"))
    return shutil.which(program) or (str(places[-1]) if places else None)


class Server:
    """A cluster in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = str(folder / "data")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]

    def run(self, program: str, *arguments: str) -> None:
        command = [str(find(program)), *arguments]
        if os.geteuid() == 0:
            # PostgreSQL refuses to be run by root.
            command = [
                "setpriv",
                "--reuid=postgres",
                "--regid=postgres",
                "--clear-groups",
                *command,
            ]
        subprocess.run(
            command, check=True, stdout=subprocess.DEVNULL, cwd=self.folder, timeout=120
        )

    def make(self) -> None:
        self.run("initdb", "--pgdata", self.data, "--auth", "trust", "--username", "postgres")
        with Path(self.data, "postgresql.conf").open("a") as conf:
            conf.write(
                f"port = {self.port}\nlisten_addresses = '127.0.0.1'\n"
                f"unix_socket_directories = ''\n"
            )

    def start(self) -> None:
        log = str(self.folder / "log")
        self.run("pg_ctl", "start", "--wait", "--pgdata", self.data, "--log", log)

    def crash(self) -> None:
        """End it without a word to anybody, as a power cut would."""
        self.run(
            "pg_ctl",
            "stop",
            "--wait",
            "--mode",
            "immediate",
            "--pgdata",
            str(self.folder / "data"),
        )


def can_be_private() -> bool:
    """Return whether PostgreSQL is installed, and somebody there to run it as."""
    return find("initdb") is not None and (
        os.geteuid() != 0 or shutil.which("setpriv") is not None
    )


@contextmanager
def private_server() -> Iterator[Server | None]:
    """Make one and start it, with the tests' settings looking there; None where it cannot be."""
    if not can_be_private():
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        if os.geteuid() == 0:
            shutil.chown(name, "postgres", "postgres")
        server = Server(Path(name))
        server.make()
        server.start()
        os.environ.update(PGHOST="127.0.0.1", PGPORT=str(server.port), PGUSER="postgres")
        try:
            yield server
        finally:
            server.crash()
