"""The app's configuration: finds the `flows.py` of every installed app."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module

from django.apps import AppConfig, apps
from django.core import checks
from django.utils.module_loading import module_has_submodule
from django.utils.translation import gettext_lazy as _

from .exceptions import ImproperSetting


def _load_flows() -> None:
    """Import the `flows.py` of each app that has one; an error in it is raised, as admin.py's is.

    Without its templates a process would leave flows undone that it should have run.
    """
    for app in apps.get_app_configs():
        name = f"{app.name}.flows"
        try:
            import_module(name)
        except Exception as error:
            if app.module is not None and module_has_submodule(app.module, "flows"):
                error.add_note(f"ebbs_and_flows could not load {name}: mend it, then try again.")
                raise


class EbbsAndFlowsConfig(AppConfig):
    """Ebbs and flows."""

    name = "ebbs_and_flows"
    label = "ebbs_and_flows"
    verbose_name = _("Flows")
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Connect the system checks and load every installed app's flows."""
        from .checks import check_server_of_flows, check_settings
        from .engines import get_engine
        from .pacemaker import start

        checks.register(check_settings)
        checks.register(check_server_of_flows, checks.Tags.database)
        _load_flows()
        # A bad ENGINE is named by the checks, which could not be run if it were raised here.
        with suppress(ImproperSetting):
            get_engine().connect(start)
