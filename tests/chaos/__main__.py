"""`python -m tests.chaos`: sets flows on fire and says what is left.

`short` is for every change: a share of each, chosen at random, on each database that answers.
`long` is every statement, all pairs, networks, and 10,000 flows with 1,000 faults and as many acts
of operators, on each database. The others are one kind of run on one database, which
EBBS_TEST_DATABASE names.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time

from tests.on_every_database import PROBES

from .server import can_be_private, private_server

FAST_LEASE, ENDLESS_LEASE = "2", "3600"


def every_statement(database: str, options: argparse.Namespace) -> int:
    """Try every statement, or a share of the cases, on one database."""
    os.environ["EBBS_TEST_LEASE_SECONDS"] = ENDLESS_LEASE
    from .database import made_database

    with made_database():
        from . import every_statement

        return every_statement.main(database, share=options.share, seed=options.seed)


def all_pairs(database: str, options: argparse.Namespace) -> int:
    """Pause a worker at each statement while another actor does something, on one database."""
    os.environ["EBBS_TEST_LEASE_SECONDS"] = ENDLESS_LEASE
    from .database import made_database

    with made_database():
        from . import all_pairs

        return all_pairs.main(database, most=options.pairs, seed=options.seed)


def networks(database: str, options: argparse.Namespace) -> int:
    """Break the link between a worker and one database server."""
    os.environ["EBBS_TEST_LEASE_SECONDS"] = FAST_LEASE
    if database == "sqlite":
        print("sqlite: networks SKIPPED, as a file has none.")
        return 0
    from . import links

    if not links.can_be_made() or not can_be_private(database):
        print(
            f"{database}: networks SKIPPED, as they need root, iproute2 and the server's programs."
        )
        return 0
    with links.link(), private_server(database, [links.HERE]):
        from .database import made_database

        with made_database():
            from . import networks

            return networks.main(database, most=options.pairs, seed=options.seed)


def at_random(database: str, options: argparse.Namespace) -> int:
    """Let things go wrong at random on one database."""
    os.environ["EBBS_TEST_LEASE_SECONDS"] = FAST_LEASE
    os.environ["EBBS_TEST_CLUSTER"] = f"ebbs-chaos-{os.getpid()}"
    with private_server(database) as server:
        if database != "sqlite" and server is None:
            print(f"The {database} server is not killed here: its programs are not installed.")
        from .database import made_database

        with made_database():
            from . import at_random

            return at_random.main(
                database,
                flows=options.flows,
                faults=options.faults,
                server=server,
                seed=options.seed,
            )


def answering() -> list[str]:
    """Return the databases that there are; say which there are not."""
    wanted = os.environ.get("EBBS_TEST_DATABASES", ",".join(PROBES)).split(",")
    found = []
    for database in wanted:
        probe = subprocess.run(
            [sys.executable, "-c", PROBES[database]], check=False, capture_output=True
        )
        if probe.returncode:
            print(f"{database}: SKIPPED, no server answers.")
        else:
            found.append(database)
    return found


def start(database: str, *arguments: str) -> subprocess.Popen[bytes]:
    """Start one fire in a process of its own, with the settings of its database."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.chaos", *arguments],
        env={**os.environ, "EBBS_TEST_DATABASE": database},
    )


def short() -> int:
    """Try a third of every statement's cases, some pairs, and some faults at random, on each."""
    started, codes = time.monotonic(), []
    databases = answering()
    for fire in (
        ["every-statement", "--share", "0.3"],
        ["all-pairs", "--pairs", "150"],
        ["at-random", "--flows", "300", "--faults", "40"],
    ):
        # Together: they wait for their disks, and for leases, more than they compute.
        processes = [start(database, *fire) for database in databases]
        codes += [process.wait() for process in processes]
    print(f"The proof by fire took {time.monotonic() - started:.0f} s on {', '.join(databases)}.")
    return int(any(codes))


def long(arguments: list[str]) -> int:
    """Try every statement, all pairs, networks, and thousands of flows, on each database."""
    started, codes = time.monotonic(), []
    databases = [
        database
        for database in PROBES
        if database == "sqlite" or can_be_private(database) or database in answering()
    ]
    for fire in (
        ["every-statement"],
        ["all-pairs"],
        ["networks", "--pairs", "200"],
        ["at-random", *arguments],
    ):
        processes = [start(database, *fire) for database in databases]
        codes += [process.wait() for process in processes]
    print(f"The long run took {time.monotonic() - started:.0f} s on {', '.join(databases)}.")
    return int(any(codes))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument(
        "fire", choices=["short", "long", "every-statement", "all-pairs", "networks", "at-random"]
    )
    parser.add_argument("--flows", type=int, default=10_000)
    parser.add_argument("--faults", type=int, default=1_000)
    parser.add_argument("--pairs", type=int, help="how many cases, by default all")
    parser.add_argument("--share", type=float, default=1, help="of the statements' cases")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    options = parser.parse_args()
    os.environ["DJANGO_SETTINGS_MODULE"] = "tests.chaos.settings"
    database = os.environ.get("EBBS_TEST_DATABASE", "sqlite")
    if options.fire == "short":
        return short()
    if options.fire == "long":
        return long(sys.argv[2:])
    if options.fire == "every-statement":
        return every_statement(database, options)
    if options.fire == "networks":
        return networks(database, options)
    if options.fire == "all-pairs":
        return all_pairs(database, options)
    return at_random(database, options)


if __name__ == "__main__":
    sys.exit(main())
