"""A database of its own for a fire, on a server that is there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def made_database() -> Iterator[None]:
    """Make the database that the settings name for tests, and remove it in the end."""
    import django

    django.setup()
    from django.db import connection

    name = connection.settings_dict["NAME"]
    connection.creation.create_test_db(verbosity=0, autoclobber=True)
    # What is started from here opens its own.
    connection.close()
    try:
        yield
    finally:
        connection.creation.destroy_test_db(name, verbosity=0)
