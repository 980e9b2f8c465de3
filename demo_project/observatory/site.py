"""The demo's web server, and the cluster that runs flows beside it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from django.conf import settings
from django.contrib.staticfiles.handlers import StaticFilesHandler
from django.core.servers.basehttp import ThreadedWSGIServer, WSGIRequestHandler
from django.core.wsgi import get_wsgi_application

HOST = "127.0.0.1"
PATIENCE = 10
"""Seconds that the cluster has to end; the demo's tasks take a fraction of one."""


def open_server(port: int) -> ThreadedWSGIServer:
    """Return a server that holds the port but does not answer yet; raises `OSError`."""
    server = ThreadedWSGIServer((HOST, port), WSGIRequestHandler, ipv6=False)
    server.set_app(StaticFilesHandler(get_wsgi_application()))
    return server


@contextmanager
def cluster() -> Iterator[None]:
    """Have django-q2's cluster run, as `manage.py qcluster` starts it, and end it at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "django", "qcluster"],
        cwd=settings.BASE_DIR.parent,
        stdin=subprocess.DEVNULL,
        # A group of its own: a Ctrl-C is for the demo, which then ends the whole of it.
        process_group=0,
    )
    try:
        yield
    finally:
        try:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
