"""Publishes reports: HTML files that stand alone, each there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from django.conf import settings
from django.template.loader import render_to_string

URL = "/reports/"


def reports_folder() -> Path:
    """Return the folder of the published reports: `DEMO_REPORTS_DIR` of the settings."""
    default = Path(__file__).resolve().parent.parent / "var" / "reports"
    return Path(getattr(settings, "DEMO_REPORTS_DIR", default))


def publish(file_name: str, template: str, values: Mapping[str, Any]) -> str:
    """Write a report under that name and return its URL.

    A reader sees the report before or the one after, never half of one: it is written beside
    its place and then moved there, which the file system does in one step. A process that is
    killed in between leaves a hidden file and no harm.
    """
    html = render_to_string(template, dict(values))
    folder = reports_folder()
    folder.mkdir(parents=True, exist_ok=True)
    written = folder / f".{file_name}-{uuid4().hex}"
    try:
        with written.open("x", encoding="utf-8") as file:
            file.write(html)
            file.flush()
            os.fsync(file.fileno())
        os.replace(written, folder / file_name)  # noqa: PTH105 - the name that it is known by
    except BaseException:
        written.unlink(missing_ok=True)
        raise
    return f"{URL}{file_name}"
