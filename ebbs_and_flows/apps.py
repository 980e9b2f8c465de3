"""The app's configuration: finds the `flows.py` of every installed app."""

from __future__ import annotations

from contextlib import suppress

from django.apps import AppConfig
from django.core import checks
from django.utils.module_loading import autodiscover_modules
from django.utils.translation import gettext_lazy as _

from .exceptions import ImproperSetting


class EbbsAndFlowsConfig(AppConfig):
    """Ebbs and flows."""

    name = "ebbs_and_flows"
    label = "ebbs_and_flows"
    verbose_name = _("Flows")
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Connect the system checks and load every installed app's flows."""
        from .checks import check_settings
        from .engines import get_engine
        from .pacemaker import start

        checks.register(check_settings)
        autodiscover_modules("flows")
        # A bad ENGINE is named by the checks, which could not be run if it were raised here.
        with suppress(ImproperSetting):
            get_engine().connect(start)
