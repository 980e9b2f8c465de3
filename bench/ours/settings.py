"""Settings of the project: the database that BENCH_ORDER names, everything else by default."""

from __future__ import annotations

from urllib.parse import urlsplit

from bench.harness.contender import Order

order = Order.read()

SECRET_KEY = "only for benchmarks"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
INSTALLED_APPS = [
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django_q",
    "ebbs_and_flows",
    "bench.ours",
]

if order.url.startswith("postgresql://"):
    url = urlsplit(order.url)
    DATABASES = {
        "default": {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": url.path.lstrip("/"),
            "HOST": url.hostname,
            "PORT": url.port,
            "USER": url.username,
            "PASSWORD": url.password or "",
        }
    }
else:
    DATABASES = {
        "default": {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": order.url,
            "OPTIONS": {
                "transaction_mode": "IMMEDIATE",
                "timeout": 20,
                "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL",
            },
        }
    }

Q_CLUSTER = {
    "name": "ebbs-bench",
    "workers": order.workers,
    "timeout": 60,
    "retry": 120,
    "log_level": "WARNING",
}
if order.variant.endswith("-redis"):
    from bench.harness.servers import REDIS_HOST, REDIS_NUMBER, REDIS_PORT

    Q_CLUSTER["redis"] = {"host": REDIS_HOST, "port": int(REDIS_PORT), "db": int(REDIS_NUMBER)}
else:
    Q_CLUSTER["orm"] = "default"
