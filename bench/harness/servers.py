"""Places for a benchmark's data, made for it and removed after it; what serves them, in words."""

from __future__ import annotations

import os
import platform
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psycopg

from .contender import REDIS_URL

PG = {
    "host": os.environ.get("PGHOST", "127.0.0.1"),
    "port": os.environ.get("PGPORT", "5432"),
    "user": os.environ.get("PGUSER", "postgres"),
    "password": os.environ.get("PGPASSWORD", ""),
}


def _administer(statement: str) -> None:
    with psycopg.connect(**PG, dbname="postgres", autocommit=True) as connection:
        connection.execute(statement)


@contextmanager
def postgresql_database(name: str) -> Iterator[str]:
    """Make an empty database and yield its URL; drop it in the end."""
    database = f"bench_{os.getpid()}_{name}".lower()
    _administer(f'CREATE DATABASE "{database}"')
    try:
        secret = f":{PG['password']}" if PG["password"] else ""
        yield f"postgresql://{PG['user']}{secret}@{PG['host']}:{PG['port']}/{database}"
    finally:
        _administer(f'DROP DATABASE "{database}" WITH (FORCE)')


@contextmanager
def redis_database() -> Iterator[str]:
    """Empty one numbered database of the Redis server and yield its URL; empty it in the end."""
    import redis

    with redis.from_url(REDIS_URL) as connection:
        connection.flushdb()
        try:
            yield REDIS_URL
        finally:
            connection.flushdb()


@contextmanager
def place(variant: str, name: str) -> Iterator[tuple[str, str]]:
    """Yield the URL (or file) and the folder for a contender's data on that kind of server."""
    # So that what was made is removed when the benchmark is ended from outside.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    servers = variant.split("-")
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=f"bench-{name}-"))
        url = str(Path(folder) / "bench.sqlite3")
        if "redis" in servers:
            url = stack.enter_context(redis_database())
        if "postgresql" in servers:
            url = stack.enter_context(postgresql_database(name))
        yield url, folder


def describe() -> list[str]:
    """Return a line for the machine and one for each server, with the settings that matter."""
    system = f"{platform.system()} {platform.release()}, {os.cpu_count()} cores"
    lines = [f"{system}, Python {platform.python_version()}"]
    names = ("fsync", "synchronous_commit", "wal_sync_method", "full_page_writes")
    try:
        with psycopg.connect(**PG, dbname="postgres") as connection:
            shown = {
                name: connection.execute(f"SHOW {name}").fetchone()
                for name in ("server_version", *names)
            }
        said = {name: row[0] if row else "?" for name, row in shown.items()}
        settings = ", ".join(f"{name}={said[name]}" for name in names)
        lines.append(f"PostgreSQL {said['server_version']} over TCP: {settings}")
    except psycopg.OperationalError as error:
        lines.append(f"PostgreSQL: none ({str(error).strip()})")
    lines.append(
        f"SQLite {sqlite3.sqlite_version}: ours with journal_mode=WAL, synchronous=NORMAL;"
        f" each peer with its own default"
    )
    lines.append(f"Redis {_describe_redis()}")
    return lines


def commit() -> str:
    """Return the revision of the code that is measured."""
    ran = subprocess.run(
        ["git", "describe", "--always", "--dirty"], check=False, capture_output=True, text=True
    )
    return ran.stdout.strip() or "unknown"


def _describe_redis() -> str:
    try:
        import redis
    except ImportError as error:
        return f"none ({error})"
    try:
        with redis.from_url(REDIS_URL) as connection:
            version = connection.info("server")["redis_version"]
            save = connection.config_get("save")["save"] or "none"
            aof = connection.config_get("appendonly")["appendonly"]
    except redis.RedisError as error:
        return f"none ({error})"
    return f"{version}: appendonly={aof}, snapshots: {save}"
