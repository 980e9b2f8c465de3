"""Settings of the demo: one SQLite file, the admin, and two flags for scripts.

`DEMO_DATABASE_FILE` and `DEMO_REPORTS_DIR` put the database and the published reports elsewhere;
`DEMO_LEASE_SECONDS` shortens the lease, so that a killed worker's flow is taken back sooner.
"""

from __future__ import annotations

import os
from pathlib import Path

BASE_DIR = Path(__file__).resolve().parent
VAR_DIR = BASE_DIR / "var"

DATABASE_FILE = Path(os.environ.get("DEMO_DATABASE_FILE") or VAR_DIR / "demo.sqlite3")
DATABASE_FILE.parent.mkdir(parents=True, exist_ok=True)
DEMO_REPORTS_DIR = Path(os.environ.get("DEMO_REPORTS_DIR") or VAR_DIR / "reports")

# Fit for a demo on one's own machine, and for nothing else.
SECRET_KEY = "not a secret: this key is for the demo only"
DEBUG = True
ALLOWED_HOSTS = ["127.0.0.1", "localhost"]

USE_TZ = True
TIME_ZONE = "America/Los_Angeles"
LANGUAGE_CODE = "en"
ROOT_URLCONF = "demo_project.urls"
WSGI_APPLICATION = "demo_project.wsgi.application"
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
    "ebbs_and_flows",
    "demo_project.observatory",
]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
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

DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": str(DATABASE_FILE),
        "OPTIONS": {
            # Writers queue up instead of failing; readers are never held up.
            "transaction_mode": "IMMEDIATE",
            "timeout": 20,
            "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL",
        },
    }
}

# For `manage.py qcluster`, which runs flows in the background; the messages are rows too.
Q_CLUSTER = {
    "name": "observatory",
    "orm": "default",
    "workers": 2,
    "timeout": 60,
    "retry": 120,
    "catch_up": False,
}

EBBS_AND_FLOWS = {"LEASE_SECONDS": float(os.environ.get("DEMO_LEASE_SECONDS") or 30)}

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"plain": {"format": "{levelname} {name}: {message}", "style": "{"}},
    "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "plain"}},
    "root": {"handlers": ["console"], "level": "WARNING"},
}
