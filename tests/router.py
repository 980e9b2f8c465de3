"""A router of a project that keeps its flows on a database of their own."""

from __future__ import annotations

from typing import Any

from django.db.models import Model

TOGETHER = {"ebbs_and_flows", "django_q", "shop"}
"""The app, its queue, and what its atomic tasks write: what is to commit together."""


class FlowsElsewhere:
    """Sends what is to commit together to the database `flows`, and nothing else."""

    def db_for_read(self, model: type[Model], **hints: Any) -> str | None:
        return "flows" if model._meta.app_label in TOGETHER else None

    db_for_write = db_for_read

    def allow_migrate(self, db: str, app_label: str, **hints: Any) -> bool:
        if app_label == "django_tasks_database":
            # One of its migrations looks at its table on each database, whatever a router says.
            return True
        return (db == "flows") == (app_label in TOGETHER)
