"""The lowest versions of what the package and its extras need, one a line: constraints for pip.

`python tests/lowest.py` prints them; the session `lowest` of nox installs them.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(?:\[[^\]]*\])?\s*>=\s*(?P<version>[\w.]+)")


def requirements() -> dict[str, list[str]]:
    """Return what is needed, by extra; the package's own needs are under an empty name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {"": project["dependencies"], **project["optional-dependencies"]}


def lowest() -> dict[str, set[str]]:
    """Return the lower bounds of each package, by its name in lower case."""
    found: dict[str, set[str]] = {}
    for needed in requirements().values():
        for requirement in needed:
            match = _REQUIREMENT.match(requirement)
            if match:
                found.setdefault(match["name"].lower(), set()).add(match["version"])
    return found


def parts(version: str) -> tuple[int, ...]:
    """Return a version's numbers, comparable: 5.2 is 5.2.0, and below 5.2.1."""
    numbers = [int(part) for part in version.split(".")]
    while numbers[-1:] == [0]:
        numbers.pop()
    return tuple(numbers)


if __name__ == "__main__":
    for name, bounds in sorted(lowest().items()):
        # With several, the highest holds for all.
        print(f"{name}=={max(bounds, key=parts)}")
