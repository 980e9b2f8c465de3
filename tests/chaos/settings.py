"""Settings of the workers that are tried: the tests' own, with the flows of this package."""

from __future__ import annotations

import os

from tests.settings import *  # noqa: F403
from tests.settings import DATABASES, INSTALLED_APPS, Q_CLUSTER

# The demo's tasks take a second to import, in each worker that is started in another's place.
INSTALLED_APPS = [*(app for app in INSTALLED_APPS if "demo" not in app), "tests.chaos"]

EBBS_AND_FLOWS = {
    "LEASE_SECONDS": float(os.environ.get("EBBS_TEST_LEASE_SECONDS", "30")),
    # Many are lost here that did nothing wrong; what ends its workers has a test of its own.
    "MAX_INTERRUPTIONS": 1000,
    "SLICE_SECONDS": 5,
}
Q_CLUSTER = {**Q_CLUSTER, "poll": 0.2, "recycle": 100_000}

if DATABASES["default"]["ENGINE"].endswith("mysql"):
    # The driver reads the machine's certificates for each connection, which takes 20 ms.
    DATABASES["default"]["OPTIONS"]["ssl_disabled"] = True
