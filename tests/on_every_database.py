"""Runs the suite on SQLite and on each database server that answers; says which it ran on.

Takes pytest's arguments. The servers are looked for where PGHOST, PGPORT, PGUSER, PGPASSWORD and
MYSQL_HOST, MYSQL_TCP_PORT, MYSQL_USER, MYSQL_PWD say, by default on this machine's own ports.
EBBS_TEST_DATABASES=sqlite,postgresql limits the choice.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

PROBES = {
    "sqlite": "import sqlite3; print('SQLite', sqlite3.sqlite_version)",
    "postgresql": """
import os, psycopg
with psycopg.connect(
    host=os.environ.get("PGHOST", "127.0.0.1"), port=os.environ.get("PGPORT", "5432"),
    user=os.environ.get("PGUSER", "postgres"), password=os.environ.get("PGPASSWORD", ""),
    dbname="postgres", connect_timeout=3,
) as connection:
    print("PostgreSQL", connection.execute("show server_version").fetchone()[0])
""",
    "mariadb": """
import os, pymysql
with pymysql.connect(
    host=os.environ.get("MYSQL_HOST", "127.0.0.1"),
    port=int(os.environ.get("MYSQL_TCP_PORT", "3306")),
    user=os.environ.get("MYSQL_USER", "root"), password=os.environ.get("MYSQL_PWD", ""),
    connect_timeout=3,
) as connection:
    print("MariaDB", connection.get_server_info())
""",
}


def main(arguments: list[str]) -> int:
    wanted = os.environ.get("EBBS_TEST_DATABASES", ",".join(PROBES)).split(",")
    lines, failed = [], False
    for database in wanted:
        if database not in PROBES:
            print(f"There is no database {database!r}: the names are {', '.join(PROBES)}.")
            return 2
        probe = subprocess.run(
            [sys.executable, "-c", PROBES[database]], check=False, capture_output=True, text=True
        )
        if probe.returncode:
            reason = probe.stderr.strip().splitlines()[-1]
            lines.append(f"  {database:<12}SKIPPED, no server answers: {reason}")
            continue
        started = time.monotonic()
        code = subprocess.run(
            [sys.executable, "-m", "pytest", *arguments],
            check=False,
            env={**os.environ, "EBBS_TEST_DATABASE": database},
        ).returncode
        outcome = "passed" if code == 0 else f"FAILED (pytest's exit code {code})"
        took = time.monotonic() - started
        lines.append(f"  {database:<12}{outcome} on {probe.stdout.strip()} in {took:.0f} s")
        failed = failed or code != 0
    print("\nThe suite was run on:", *lines, sep="\n", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
