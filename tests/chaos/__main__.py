"""`python -m tests.chaos`: sets flows on fire and says what is left."""

from __future__ import annotations

import argparse
import os
import sys


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("fire", choices=["every-statement"])
    parser.parse_args()
    os.environ["DJANGO_SETTINGS_MODULE"] = "tests.chaos.settings"
    # So long that no lease expires by itself.
    os.environ["EBBS_TEST_LEASE_SECONDS"] = "3600"
    from .database import made_database

    with made_database():
        from . import every_statement

        return every_statement.main(os.environ.get("EBBS_TEST_DATABASE", "sqlite"))


if __name__ == "__main__":
    sys.exit(main())
