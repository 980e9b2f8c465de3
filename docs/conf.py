"""Sphinx's configuration: `make docs` builds the pages into docs/_build, warnings being errors."""

from __future__ import annotations

import sys
from pathlib import Path

import django
from django.conf import settings

# The docs of this tree, not of what may be installed.
sys.path.insert(0, str(Path(__file__).parent.parent))

settings.configure(
    SECRET_KEY="only for the docs",
    USE_TZ=True,
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    INSTALLED_APPS=[
        "django.contrib.auth",
        "django.contrib.contenttypes",
        "django_q",
        "ebbs_and_flows",
    ],
    Q_CLUSTER={"orm": "default", "timeout": 60, "retry": 120},
)
django.setup()

from ebbs_and_flows import __version__  # noqa: E402

project = "ebbs_and_flows"
author = "The ebbs_and_flows developers"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"ebbs_and_flows {release}"
myst_heading_anchors = 3

# Docstrings are written with plain backticks.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
# Signatures as they are written, not as what their defaults evaluate to.
autodoc_preserve_defaults = True
