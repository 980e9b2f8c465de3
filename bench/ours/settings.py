"""Settings of the project: the database that BENCH_ORDER names, everything else by default."""

from __future__ import annotations

from bench.harness import projects
from bench.harness.contender import REDIS, Order

order = Order.read()
globals().update(projects.settings(order, "django_q", "ebbs_and_flows", "bench.ours"))

Q_CLUSTER = {
    "name": "ebbs-bench",
    "workers": 1,
    "timeout": 60,
    "retry": 120,
    "log_level": "WARNING",
    **({"redis": REDIS} if order.variant.endswith("-redis") else {"orm": "default"}),
}
