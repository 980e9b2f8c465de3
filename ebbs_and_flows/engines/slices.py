"""What a message makes a worker do, whatever queue it came by."""

from __future__ import annotations

import time
from collections.abc import Callable

from ..conf import get_settings


def run_slice(is_stopping: Callable[[], bool], hand_on: Callable[[], object]) -> None:
    """Run due flows until none is left, `SLICE_SECONDS` are over or the worker is to stop.

    Then `hand_on()` is called if there is more to do. A flow that fails is no failed message.
    """
    from ..runner import flow_runner

    ends_at = time.monotonic() + get_settings().SLICE_SECONDS

    def is_over() -> bool:
        return time.monotonic() >= ends_at or is_stopping()

    while not is_over():
        if flow_runner.run_next(stop=is_over) is None:
            return
    if flow_runner.has_work():
        hand_on()
