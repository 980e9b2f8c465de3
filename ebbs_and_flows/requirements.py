"""What the database of the flows must be like, for the system checks and for starting workers."""

from __future__ import annotations

import threading
from typing import Any

from django.core.checks import ERROR, CheckMessage, Error, Warning  # noqa: A004
from django.db import DatabaseError, InterfaceError, connections

from .exceptions import UnsupportedDatabase
from .repository import FlowRepository

VENDORS = {"sqlite", "postgresql", "mysql"}
"""Django's names of the databases that flows can be stored in."""
CONNECTIONS = 3
"""What a worker process needs: its own, its pacemaker's, and one for the heartbeat."""

_NEEDED = "Flows need the isolation level READ COMMITTED"
_accepted: set[tuple[str, str]] = set()
"""The databases of which this process has asked the server, by alias and name."""


def check_configuration(using: str) -> list[CheckMessage]:
    """Return what the settings of a database say that flows cannot be run with; asks no server."""
    connection: Any = connections[using]
    if connection.vendor not in VENDORS:
        return [
            Error(
                f"The database {using!r} is of the kind {connection.vendor!r}, which flows cannot"
                " be stored in.",
                hint="Store them in PostgreSQL, MariaDB, MySQL or SQLite; a router can choose it.",
                id="ebbs_and_flows.E011",
            )
        ]
    return [*_check_driver(connection), *_check_zone(connection), *_check_options(connection)]


def _check_driver(connection: Any) -> list[CheckMessage]:
    if connection.vendor != "postgresql":
        return []
    from django.db.backends.postgresql import psycopg_any

    if psycopg_any.is_psycopg3:
        return []
    return [
        Error(
            f"The database {connection.alias!r} is used through psycopg2, which is not supported.",
            hint="Install psycopg, version 3: pip install 'ebbs-and-flows[postgresql]'.",
            id="ebbs_and_flows.E012",
        )
    ]


def _check_zone(connection: Any) -> list[CheckMessage]:
    zone = connection.settings_dict["TIME_ZONE"]
    if connection.features.supports_timezones or zone in (None, "UTC"):
        return []
    return [
        Error(
            f"The database {connection.alias!r} has the TIME_ZONE {zone!r}, so its times are"
            " stored without saying of which hour they are when clocks are put back, and flows"
            " would be run at wrong times.",
            hint="Leave TIME_ZONE out of its settings: then Django stores UTC.",
            id="ebbs_and_flows.E013",
        )
    ]


def _check_options(connection: Any) -> list[CheckMessage]:
    options = connection.settings_dict.get("OPTIONS", {})
    found: list[CheckMessage] = []
    level = options.get("isolation_level")
    if level is not None and not _is_read_committed(connection, level):
        found.append(
            Error(
                f"The database {connection.alias!r} has the isolation level {level!r} in its"
                f" OPTIONS. {_NEEDED}.",
                hint="Leave 'isolation_level' out of its OPTIONS.",
                id="ebbs_and_flows.E014",
            )
        )
    pool = options.get("pool")
    if isinstance(pool, dict):
        # As psycopg_pool has it: a pool has a fixed size unless it is told a maximum.
        size = pool.get("max_size") or pool.get("min_size", 4)
        said = f"The connection pool of the database {connection.alias!r} has {size}"
        hint = f"Set 'max_size' of the pool to {CONNECTIONS} at least, for each worker process."
        if size < 2:
            found.append(
                Error(
                    f"{said} connection, so a worker cannot renew the lease of its flow while a"
                    " task runs, and the task would be run again beside it.",
                    hint=hint,
                    id="ebbs_and_flows.E015",
                )
            )
        elif size < CONNECTIONS:
            found.append(
                Warning(
                    f"{said} connections, and none to spare: a worker process needs"
                    f" {CONNECTIONS} when a task takes long.",
                    hint=hint,
                    id="ebbs_and_flows.W012",
                )
            )
    return found


def _is_read_committed(connection: Any, level: object) -> bool:
    if connection.vendor == "postgresql":
        # An IsolationLevel or its number. PostgreSQL's READ UNCOMMITTED is its READ COMMITTED.
        return level in (1, 2)
    return str(level).lower() == "read committed"


def check_server(repository: FlowRepository) -> list[CheckMessage]:
    """Return what the server itself says that flows cannot be run with."""
    level = repository.isolation_level()
    is_postgresql = repository.connection.vendor == "postgresql"
    # PostgreSQL's READ UNCOMMITTED is its READ COMMITTED.
    if level in (None, "read committed") or (is_postgresql and level == "read uncommitted"):
        return []
    hint = "Leave 'isolation_level' out of the OPTIONS of the database."
    if is_postgresql:
        hint = (
            "Set it for the role: ALTER ROLE … SET default_transaction_isolation = 'read"
            " committed'."
        )
    return [
        Error(
            f"The database {repository.using!r} says that its isolation level is {level.upper()}."
            f" {_NEEDED}.",
            hint=hint,
            id="ebbs_and_flows.E016",
        )
    ]


def require_supported(repository: FlowRepository) -> None:
    """Raise `UnsupportedDatabase` where flows cannot be run safely; asks the server once."""
    connection = repository.connection
    asked = (connection.alias, str(connection.settings_dict["NAME"]))
    # Within a test's transaction nothing else runs, and the question would count as a query.
    if asked in _accepted or connection.in_atomic_block:
        return
    found = [item for item in check_configuration(repository.using) if item.level >= ERROR]
    _refuse(found or check_server(repository))
    _accepted.add(asked)


def require_second_connection(repository: FlowRepository) -> None:
    """Raise `UnsupportedDatabase` unless a worker can open a connection for its heartbeat."""
    connection = repository.connection
    if connection.vendor == "sqlite" or connection.in_atomic_block:
        return
    connection.ensure_connection()
    refusals: list[Exception] = []

    def open_another() -> None:
        another = connections[connection.alias]
        try:
            another.ensure_connection()
        except (DatabaseError, InterfaceError) as error:
            refusals.append(error)
        finally:
            another.close()

    thread = threading.Thread(target=open_another, name="flow-second-connection")
    thread.start()
    thread.join()
    if refusals:
        said = str(refusals[0]).strip().splitlines()[0]
        raise UnsupportedDatabase(
            f"This process cannot open a second connection to the database {connection.alias!r},"
            f" which its heartbeat needs ({said}): allow each worker process {CONNECTIONS}."
        )


def _refuse(found: list[CheckMessage]) -> None:
    for item in found:
        raise UnsupportedDatabase(f"{item.msg} {item.hint}")
