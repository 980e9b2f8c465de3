"""Runs every benchmark and writes docs/benchmarks.md: `python -m bench`.

`--quick` takes two rounds and small tables, in a quarter of the time; its figures are rough.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from bench.harness import environments
from bench.report import write

FULL = {
    "steps": ["--rounds", "5"],
    "drain": ["--rounds", "3"],
    "latency": ["--rounds", "2"],
    "claim": ["--rounds", "5"],
    "memory": ["--flows", "100000"],
    "heartbeat": ["--rounds", "40"],
    "profile_step": ["--lines", "0"],
}
QUICK = {
    "steps": ["--rounds", "2", "--lengths", "10,100"],
    "drain": ["--rounds", "1", "--flows", "300"],
    "latency": ["--rounds", "1", "--flows", "8"],
    "claim": ["--rounds", "2", "--scale", "0.05"],
    "memory": ["--flows", "5000"],
    "heartbeat": ["--rounds", "10"],
    "profile_step": ["--lines", "0"],
}


def main() -> None:
    """Run the parts one after another."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    environments.make_all()
    failed = []
    for part, arguments in (QUICK if options.quick else FULL).items():
        print(f"== {part} {' '.join(arguments)}", flush=True)
        if subprocess.run(
            [sys.executable, "-m", f"bench.{part}", *arguments], check=False
        ).returncode:
            failed.append(part)
    print(f"Written: {write()}")
    if failed:
        raise SystemExit(f"Not measured: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
