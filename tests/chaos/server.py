"""Database servers of the tests' own, that may be killed: the machine's are not touched."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol


def find(program: str) -> str | None:
    """Return where a server's program is; Debian leaves some off the PATH."""
    places = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{program}"))
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin") or (
        str(places[-1]) if places else None
    )


class Server(Protocol):
    """A database server in a folder of its own."""

    def make(self) -> None:
        """Create its files."""

    def start(self) -> None:
        """Start it, and wait until it answers."""

    def crash(self) -> None:
        """End it without a word to any client, as a power cut would."""

    def settings(self) -> dict[str, str]:
        """Return the environment by which the tests' settings find it."""


def _as_user(user: str, command: list[str]) -> list[str]:
    # Neither server runs as root.
    if os.geteuid() != 0:
        return command
    return ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", *command]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


def _and_others(addresses: Sequence[str]) -> str:
    return "".join(f",{address}" for address in addresses)


class PostgreSQL:
    """A PostgreSQL cluster."""

    user, program = "postgres", "initdb"

    def __init__(self, folder: Path, others: Sequence[str] = ()) -> None:
        self.folder = folder
        self.others = others
        self.data = str(folder / "data")
        self.port = _free_port()

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            _as_user(self.user, [str(find(program)), *arguments]),
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=self.folder,
            timeout=120,
        )

    def make(self) -> None:
        self._run("initdb", "--pgdata", self.data, "--auth", "trust", "--username", "postgres")
        with Path(self.data, "postgresql.conf").open("a") as conf:
            conf.write(
                f"port = {self.port}\nlisten_addresses = '127.0.0.1{_and_others(self.others)}'\n"
                f"unix_socket_directories = ''\n"
                # As careful administrators have them.
                f"lock_timeout = 500ms\nstatement_timeout = 5s\n"
            )
        with Path(self.data, "pg_hba.conf").open("a") as rules:
            rules.writelines(f"host all all {other}/30 trust\n" for other in self.others)

    def start(self) -> None:
        log = str(self.folder / "log")
        self._run("pg_ctl", "start", "--wait", "--pgdata", self.data, "--log", log)

    def crash(self) -> None:
        self._run("pg_ctl", "stop", "--wait", "--mode", "immediate", "--pgdata", self.data)

    def settings(self) -> dict[str, str]:
        return {"PGHOST": "127.0.0.1", "PGPORT": str(self.port), "PGUSER": "postgres"}


class MariaDB:
    """A MariaDB server."""

    user, program = "mysql", "mariadb-install-db"

    def __init__(self, folder: Path, others: Sequence[str] = ()) -> None:
        self.folder = folder
        self.others = others
        self.port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def make(self) -> None:
        arguments = [
            "--no-defaults",
            f"--datadir={self.folder / 'data'}",
            "--auth-root-authentication-method=normal",
            "--skip-test-db",
        ]
        subprocess.run(
            _as_user(self.user, [str(find(self.program)), *arguments]),
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=self.folder,
            timeout=120,
        )

    def start(self) -> None:
        arguments = [
            "--no-defaults",
            f"--datadir={self.folder / 'data'}",
            f"--socket={self.folder / 'socket'}",
            f"--pid-file={self.folder / 'pid'}",
            f"--port={self.port}",
            # As careful administrators have it.
            "--innodb-lock-wait-timeout=1",
            # Only this run reaches it, and a worker has another address.
            "--skip-grant-tables",
            f"--bind-address=127.0.0.1{_and_others(self.others)}",
        ]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                _as_user(self.user, [str(find("mariadbd")), *arguments]),
                cwd=self.folder,
                stdout=log,
                stderr=log,
            )
        until = time.monotonic() + 60
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            if time.monotonic() > until or self._process.poll() is not None:
                raise RuntimeError(f"MariaDB does not start: see {self.folder / 'log'}.")
            time.sleep(0.05)

    def crash(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def settings(self) -> dict[str, str]:
        return {
            "MYSQL_HOST": "127.0.0.1",
            "MYSQL_TCP_PORT": str(self.port),
            "MYSQL_USER": "root",
            "MYSQL_PWD": "",
        }


KINDS: dict[str, type[PostgreSQL | MariaDB]] = {"postgresql": PostgreSQL, "mariadb": MariaDB}


def can_be_private(database: str) -> bool:
    """Return whether that server is installed here, and can be run."""
    return (
        database in KINDS
        and find(KINDS[database].program) is not None
        and (os.geteuid() != 0 or shutil.which("setpriv") is not None)
    )


@contextmanager
def private_server(database: str, others: Sequence[str] = ()) -> Iterator[Server | None]:
    """Make one and start it, with the tests' settings looking there; None where it cannot be.

    It listens on 127.0.0.1 and on the `others`.
    """
    if not can_be_private(database):
        yield None
        return
    kind = KINDS[database]
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        if os.geteuid() == 0:
            shutil.chown(name, kind.user, kind.user)
        server = kind(Path(name), others)
        server.make()
        server.start()
        os.environ.update(server.settings())
        try:
            yield server
        finally:
            server.crash()
