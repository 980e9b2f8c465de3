"""Its settings: PostgreSQL, with the broker and the age of connections that the scene asks for."""

from __future__ import annotations

import os

SECRET_KEY = "only for benchmarks"
USE_TZ = True
TIME_ZONE = "UTC"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
INSTALLED_APPS = [
    "django.contrib.contenttypes",
    "django.contrib.auth",
    "django_q",
    "ebbs_and_flows",
    "bench.background_project",
]
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": os.environ["BENCH_DATABASE"],
        "HOST": os.environ.get("PGHOST", "127.0.0.1"),
        "PORT": os.environ.get("PGPORT", "5432"),
        "USER": os.environ.get("PGUSER", "postgres"),
        "PASSWORD": os.environ.get("PGPASSWORD", ""),
        "CONN_MAX_AGE": int(os.environ.get("BENCH_CONN_MAX_AGE", "60")),
        "CONN_HEALTH_CHECKS": True,
    }
}
Q_CLUSTER = {
    "name": os.environ["BENCH_DATABASE"],
    "workers": 2,
    "timeout": 60,
    "retry": 120,
    "log_level": "WARNING",
}
if os.environ.get("BENCH_BROKER") == "redis":
    Q_CLUSTER["redis"] = {
        "host": os.environ.get("REDIS_HOST", "127.0.0.1"),
        "port": int(os.environ.get("REDIS_PORT", "6379")),
    }
else:
    Q_CLUSTER["orm"] = "default"
