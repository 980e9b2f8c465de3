"""How the flows of every app are found."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SETTINGS = """
SECRET_KEY = "x"
USE_TZ = True
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}}
INSTALLED_APPS = ["django_q", "ebbs_and_flows", "bakery"]
Q_CLUSTER = {"orm": "default", "timeout": 60, "retry": 120}
"""


def check(folder: Path, flows: str | None) -> subprocess.CompletedProcess[str]:
    (folder / "bakery").mkdir()
    (folder / "bakery/__init__.py").touch()
    (folder / "its_settings.py").write_text(SETTINGS)
    if flows is not None:
        (folder / "bakery/flows.py").write_text(flows)
    return subprocess.run(
        [sys.executable, "-m", "django", "migrate"],
        env={
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "its_settings",
            "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.processes
@pytest.mark.one_database
@pytest.mark.parametrize("wrong", ["import no_such_module", "1 / 0", "def ("])
def test_an_error_in_an_apps_flows_is_loud_and_names_the_module(
    tmp_path: Path, wrong: str
) -> None:
    done = check(tmp_path, f"{wrong}\n")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last == "ebbs_and_flows could not load bakery.flows: mend it, then try again."
    assert wrong in done.stderr


@pytest.mark.processes
@pytest.mark.one_database
def test_an_app_needs_no_flows(tmp_path: Path) -> None:
    done = check(tmp_path, None)
    assert done.returncode == 0, done.stderr
