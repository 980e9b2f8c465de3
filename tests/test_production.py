"""The how-to of production: its settings are such that the checks find nothing in them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOW_TO = (ROOT / "docs/how-to/production.md").read_text()
DATABASE, OVER_ORM, OVER_REDIS, DJANGO_TASKS, NO_QUEUE = re.findall(
    r"```python\n# settings.py\n(.*?)```", HOW_TO, re.DOTALL
)
SETTINGS = """
SECRET_KEY = "x"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
INSTALLED_APPS = ["django_q", "ebbs_and_flows"]
"""


@pytest.mark.parametrize(
    "blocks",
    [
        [DATABASE, OVER_ORM],
        [DATABASE, OVER_REDIS],
        [DATABASE, DJANGO_TASKS],
        [DATABASE, NO_QUEUE],
    ],
    ids=["orm", "redis", "django-tasks", "no-queue"],
)
def test_the_settings_of_the_how_to_pass_the_checks(blocks: list[str], tmp_path: Path) -> None:
    needs_django_q = {OVER_ORM, OVER_REDIS} & {*blocks}
    settings = SETTINGS if needs_django_q else SETTINGS.replace('"django_q", ', "")
    (tmp_path / "how_to_settings.py").write_text(settings + "".join(blocks))
    done = subprocess.run(
        [sys.executable, "-m", "django", "check"],
        env={
            **os.environ,
            "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}",
            "DJANGO_SETTINGS_MODULE": "how_to_settings",
            "PYTHONWARNINGS": "ignore",
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "System check identified no issues" in done.stdout + done.stderr, done.stderr
