"""Runs the suite on the newest Python that is here and the newest Django: the other corner.

The tests of this environment's own Python are one corner of what is supported. This one is run on
SQLite behind a router, without what starts processes or a browser, and is skipped where no newer
Python is. Takes the folder of the environment that it makes, and pytest's arguments.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
STORM = "tests/test_pacemaker.py::test_a_backlog_that_waits_makes_no_storm_of_messages"
QUICK = [
    *("-m", "not processes", "--ignore=tests/browser", "--ignore=tests/test_bench.py"),
    *("--ignore=tests/test_admin_themes.py", f"--deselect={STORM}"),
]


def supported() -> list[int]:
    """Return the minor versions of Python that the package names, the newest first."""
    named = re.findall(r"Python :: 3\.(\d+)", (ROOT / "pyproject.toml").read_text())
    return sorted(map(int, named), reverse=True)


def interpreters(minor: int) -> Iterator[str]:
    """Yield where that Python may be: on the PATH, or among pyenv's."""
    on_path = shutil.which(f"python3.{minor}")
    if on_path:
        yield on_path
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from map(str, sorted(pyenv.glob(f"versions/3.{minor}.*/bin/python")))


def newest() -> str | None:
    """Return the newest supported Python that is newer than this one and can be started."""
    for minor in supported():
        if minor <= sys.version_info.minor:
            return None
        for python in interpreters(minor):
            # pyenv's commands are there for versions that are switched off, too.
            started = subprocess.run([python, "-c", ""], check=False, capture_output=True)
            if started.returncode == 0:
                return python
    return None


def main(folder: str, *arguments: str) -> int:
    python = newest()
    if python is None:
        here = f"3.{sys.version_info.minor}"
        print(f"The other corner: SKIPPED, no supported Python newer than {here} is here.")
        return 0
    subprocess.run([python, "-m", "venv", "--clear", folder], check=True)
    own = str(Path(folder) / "bin/python")
    install = ["-m", "pip", "install", "--quiet", "--no-compile", "--editable", ".[test]"]
    subprocess.run([own, *install], check=True, cwd=ROOT)
    said = subprocess.run(
        [own, "-c", "import django, sys; print(sys.version.split()[0], django.__version__)"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    corner = "Python {}, Django {}, SQLite behind a router".format(*said)
    print(f"The other corner: {corner}", flush=True)
    started = time.monotonic()
    code = subprocess.run(
        [own, "-m", "pytest", *QUICK, *arguments],
        check=False,
        cwd=ROOT,
        env={
            **os.environ,
            "EBBS_TEST_DATABASE": "sqlite",
            "EBBS_TEST_ROUTER": "1",
            # What is imported is compiled once, and the rest not at all.
            "PYTHONDONTWRITEBYTECODE": "",
        },
    ).returncode
    outcome = "passed" if code == 0 else f"FAILED (pytest's exit code {code})"
    took = time.monotonic() - started
    print(f"The other corner: {outcome} on {corner} in {took:.0f} s", flush=True)
    return int(code != 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
