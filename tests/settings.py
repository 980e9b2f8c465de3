"""Settings of the tests: SQLite, or the server that `EBBS_TEST_DATABASE` names."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

BASE_DIR = Path(__file__).resolve().parent.parent

SECRET_KEY = "only for tests"
DEBUG = False
USE_TZ = True
TIME_ZONE = "Europe/Berlin"
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = "tests.urls"
STATIC_URL = "static/"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "django.contrib.staticfiles",
    "django_q",
    "django_tasks_db",
    "ebbs_and_flows",
    "tests.shop",
    "demo_project.observatory",
]
# A theme of the admin comes before it.
if THEME := os.environ.get("EBBS_TEST_THEME", ""):
    INSTALLED_APPS.insert(0, THEME)
# The one for production takes a good part of a second for each user that a test makes.
# For Django 6.1 and later.
MAILERS = {"default": {"BACKEND": "django.core.mail.backends.locmem.EmailBackend"}}
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "tests.browser.policy.strict_policy",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
        },
    },
]

DATABASE = os.environ.get("EBBS_TEST_DATABASE", "sqlite")

# A process that a test starts works on the test's own database.
NAME = os.environ.get("EBBS_TEST_DATABASE_NAME", "")

DATABASES: dict[str, dict[str, Any]]
if DATABASE == "postgresql":
    DATABASES = {
        "default": {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": NAME or "postgres",
            "HOST": os.environ.get("PGHOST", "127.0.0.1"),
            "PORT": os.environ.get("PGPORT", "5432"),
            "USER": os.environ.get("PGUSER", "postgres"),
            "PASSWORD": os.environ.get("PGPASSWORD", ""),
            "TEST": {"NAME": f"test_ebbs_{os.getpid()}"},
        }
    }
elif DATABASE == "mariadb":
    import pymysql

    pymysql.install_as_MySQLdb()
    DATABASES = {
        "default": {
            "ENGINE": "django.db.backends.mysql",
            "NAME": NAME or "mysql",
            "HOST": os.environ.get("MYSQL_HOST", "127.0.0.1"),
            "PORT": os.environ.get("MYSQL_TCP_PORT", "3306"),
            "USER": os.environ.get("MYSQL_USER", "root"),
            "PASSWORD": os.environ.get("MYSQL_PWD", ""),
            "OPTIONS": {"charset": "utf8mb4"},
            "TEST": {
                "NAME": f"test_ebbs_{os.getpid()}",
                "CHARSET": "utf8mb4",
                "COLLATION": "utf8mb4_general_ci",
            },
        }
    }
elif DATABASE == "sqlite":
    TEST_FILE = Path(tempfile.gettempdir()) / f"test-ebbs-{os.getpid()}.sqlite3"
    DATABASES = {
        "default": {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": NAME or str(TEST_FILE),
            "OPTIONS": {
                "transaction_mode": "IMMEDIATE",
                "timeout": 20,
                "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL",
            },
            # A file, because threads and processes are to see the same database.
            "TEST": {"NAME": str(TEST_FILE)},
        }
    }
else:
    raise ValueError(f"EBBS_TEST_DATABASE is {DATABASE!r}: give sqlite, postgresql or mariadb.")

# The flows on a database of their own, and a router that sends the app's models there.
if os.environ.get("EBBS_TEST_ROUTER"):
    DATABASE_ROUTERS = ["tests.router.FlowsElsewhere"]
    first = DATABASES["default"]
    DATABASES["flows"] = {
        **first,
        "NAME": os.environ.get("EBBS_TEST_FLOWS_NAME", "") or f"{first['NAME']}_flows",
        "TEST": {**first["TEST"], "NAME": f"{first['TEST']['NAME']}_flows"},
    }

EBBS_AND_FLOWS: dict[str, object] = {
    # Short in the tests that end a worker and wait for its lease to expire.
    "LEASE_SECONDS": float(os.environ.get("EBBS_TEST_LEASE_SECONDS", "30")),
}
if os.environ.get("EBBS_TEST_ENGINE") == "django_tasks":
    EBBS_AND_FLOWS["ENGINE"] = "ebbs_and_flows.engines.django_tasks.DjangoTasksEngine"
TASKS = {"default": {"BACKEND": "django_tasks_db.DatabaseBackend"}}

Q_CLUSTER = {
    # Of its own, so that a test's cluster takes no other's messages.
    "name": os.environ.get("EBBS_TEST_CLUSTER", f"ebbs-tests-{os.getpid()}"),
    "workers": 2,
    "timeout": 60,
    "retry": 120,
    "catch_up": False,
    "log_level": "WARNING",
}
if os.environ.get("EBBS_TEST_BROKER") == "redis":
    Q_CLUSTER["redis"] = {
        "host": os.environ.get("REDIS_HOST", "127.0.0.1"),
        "port": int(os.environ.get("REDIS_PORT", "6379")),
    }
else:
    Q_CLUSTER["orm"] = "flows" if "flows" in DATABASES else "default"
