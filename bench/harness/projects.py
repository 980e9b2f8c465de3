"""The settings that every contender's Django project shares."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from .contender import Order


def settings(order: Order, *apps: str) -> dict[str, Any]:
    """Return the settings of a project with these apps on the order's database."""
    return {
        "SECRET_KEY": "only for benchmarks",
        "USE_TZ": True,
        "DEFAULT_AUTO_FIELD": "django.db.models.BigAutoField",
        "INSTALLED_APPS": ["django.contrib.auth", "django.contrib.contenttypes", *apps],
        "DATABASES": {"default": _database(order.url)},
    }


def _database(url: str) -> dict[str, Any]:
    if url.startswith("postgresql://"):
        parts = urlsplit(url)
        return {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": parts.path.lstrip("/"),
            "HOST": parts.hostname,
            "PORT": parts.port,
            "USER": parts.username,
            "PASSWORD": parts.password or "",
        }
    return {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": url,
        "OPTIONS": {
            "transaction_mode": "IMMEDIATE",
            "timeout": 20,
            "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL",
        },
    }
