"""The app's configuration."""

from __future__ import annotations

from django.apps import AppConfig


class ObservatoryConfig(AppConfig):
    """The observatory."""

    name = "demo_project.observatory"
    default_auto_field = "django.db.models.BigAutoField"
