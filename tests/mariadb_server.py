"""A MariaDB of a test's own, which may be made read-only, filled or stopped."""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pymysql

from .chaos.server import MariaDB


class SharedMariaDB(MariaDB):
    """One with a database `shop`, and a user who is no administrator and so obeys `read_only`."""

    def make(self) -> None:
        super().make()
        self.start()
        self.execute(
            "CREATE DATABASE shop CHARACTER SET utf8mb4",
            "CREATE USER shop@'%'",
            "GRANT ALL ON shop.* TO shop@'%'",
        )

    def start(self) -> None:
        super().start()
        # From here on it asks who somebody is.
        self.execute("FLUSH PRIVILEGES")

    def stop(self) -> None:
        """End it as an administrator does."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(60)

    def connect(self) -> Any:
        """Return an administrator's connection to it."""
        return pymysql.connect(host="127.0.0.1", port=self.port, user="root", autocommit=True)

    def execute(self, *statements: str) -> None:
        """Make statements as the administrator."""
        with self.connect() as connection, connection.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)

    def end_connections(self) -> None:
        """End all connections of the user."""
        with self.connect() as connection, connection.cursor() as cursor:
            cursor.execute("SELECT id FROM information_schema.processlist WHERE user = 'shop'")
            for (number,) in cursor.fetchall():
                cursor.execute(f"KILL {number}")

    def settings(self) -> dict[str, str]:
        return {
            **super().settings(),
            "MYSQL_USER": "shop",
            "EBBS_TEST_DATABASE": "mariadb",
            "EBBS_TEST_DATABASE_NAME": "shop",
        }


@contextmanager
def shared_mariadb() -> Iterator[SharedMariaDB]:
    """Make one and start it; it is ended and removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="mariadb-") as name:
        if Path(name).owner() == "root":
            shutil.chown(name, MariaDB.user, MariaDB.user)
        server = SharedMariaDB(Path(name))
        try:
            server.make()
            yield server
        finally:
            server.crash()
