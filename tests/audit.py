"""Looks for published vulnerabilities in what the package needs, and in what is installed.

The lower bounds of pyproject.toml are compared with the list in `advisories.toml`, which needs no
network. What is installed is looked up by pip-audit, unless its service cannot be reached: that is
printed, and is no failure.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.lowest import lowest, parts

LIST = Path(__file__).parent / "advisories.toml"
_UNREACHABLE = ("ConnectionError", "ServiceError", "Max retries", "Name or service", "timed out")


def advisories() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = tomllib.loads(LIST.read_text())["advisory"]
    return found


def problems() -> list[str]:
    """Return a sentence for each lower bound that a published vulnerability is in."""
    bounds = lowest()
    return [
        f"{advisory['package']}>={bound} admits {', '.join(advisory['ids'])}:"
        f" require {advisory['fixed_in']} ({advisory['source']})."
        for advisory in advisories()
        for bound in sorted(bounds.get(advisory["package"], ()))
        if parts(bound) < parts(advisory["fixed_in"])
    ]


def _audit_installed() -> int:
    if find_spec("pip_audit") is None:
        print("pip-audit: SKIPPED, it is not installed.")
        return 0
    command = [sys.executable, "-m", "pip_audit", "--progress-spinner=off", "--skip-editable"]
    done = subprocess.run(
        [*command, "--timeout=10", "--format=json"], check=False, capture_output=True, text=True
    )
    try:
        report = json.loads(done.stdout)["dependencies"]
    except ValueError:
        if any(sign in done.stderr for sign in _UNREACHABLE):
            print("pip-audit: SKIPPED, its service cannot be reached.")
            return 0
        print(done.stderr)
        return done.returncode or 1
    looked_up = [package for package in report if "vulns" in package]
    if not looked_up:
        # A mirror of the package index may answer in its place, and knows no vulnerabilities.
        print(f"pip-audit: SKIPPED, its service knows none of the {len(report)} packages.")
        return 0
    for package in looked_up:
        for found in package["vulns"]:
            fixed = ", ".join(found["fix_versions"]) or "no version"
            print(f"{package['name']} {package['version']} has {found['id']}: fixed in {fixed}.")
    print(f"pip-audit: {len(looked_up)} of {len(report)} installed packages looked up.")
    return int(any(package["vulns"] for package in looked_up))


def main() -> int:
    found = problems()
    for problem in found:
        print(problem)
    if not found:
        print(f"Lower bounds: none has one of the {len(advisories())} advisories in {LIST.name}.")
    return int(bool(found)) or _audit_installed()


if __name__ == "__main__":
    sys.exit(main())
