"""The seam to a queue: an engine wakes the queue's workers, and nothing else."""

from __future__ import annotations

from functools import cache
from typing import Protocol, cast

from django.utils.module_loading import import_string

from ..conf import get_settings
from ..exceptions import ImproperSetting


class Engine(Protocol):
    """What `ENGINE` names: a class without arguments."""

    def dispatch(self, using: str) -> None:
        """Tell some worker that a flow is due, once the current transaction commits."""


@cache
def _load(path: str) -> Engine:
    try:
        return cast(Engine, import_string(path)())
    except ImportError as error:
        raise ImproperSetting(
            f"EBBS_AND_FLOWS['ENGINE'] is {path!r}, which cannot be imported ({error}): give the"
            f" dotted path of an engine's class."
        ) from error


def get_engine() -> Engine:
    """Return the engine in force; raises `ImproperSetting`."""
    return _load(get_settings().ENGINE)
