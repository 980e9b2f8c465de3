"""Reports who looked at which flow's values: by the signal `values_viewed`, and to a logger."""

from __future__ import annotations

import logging

from .conf import get_settings
from .signals import send_values_viewed

logger = logging.getLogger("ebbs_and_flows.access")


def is_on() -> bool:
    """Whether `ACCESS_LOG` is set."""
    return get_settings().ACCESS_LOG


def report_view(flow_id: int, actor: str, page: str) -> None:
    """Report a view of a flow's values, if `ACCESS_LOG` is on; no value or name is passed on."""
    if not is_on():
        return
    logger.info(
        "%s viewed values of flow %s (%s).",
        actor,
        flow_id,
        page,
        extra={"flow": flow_id, "actor": actor, "page": page},
    )
    send_values_viewed(flow_id, actor, page)
