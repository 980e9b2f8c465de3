"""The admin's pages are at home in themes that restyle it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.one_database
@pytest.mark.parametrize("theme", ["unfold", "jazzmin"])
def test_each_page_renders_under(theme: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/themed_pages.py"],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "EBBS_TEST_THEME": theme, "EBBS_TEST_DATABASE": "sqlite"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
