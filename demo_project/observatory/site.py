"""The demo's web server and the worker beside it, both in this process."""

from __future__ import annotations

import logging
import threading

from django.contrib.staticfiles.handlers import StaticFilesHandler
from django.core.servers.basehttp import ThreadedWSGIServer, WSGIRequestHandler
from django.core.wsgi import get_wsgi_application
from django.db import DatabaseError, connection

from ebbs_and_flows import flow_runner

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"


def open_server(port: int) -> ThreadedWSGIServer:
    """Return a server that holds the port but does not answer yet; raises `OSError`."""
    server = ThreadedWSGIServer((HOST, port), WSGIRequestHandler, ipv6=False)
    server.set_app(StaticFilesHandler(get_wsgi_application()))
    return server


class BackgroundWorker(threading.Thread):
    """Runs what falls due while the site is served: flows from the admin, retries, repairs.

    A project of one's own runs `manage.py qcluster` instead; the demo is to be one command.
    """

    def __init__(self) -> None:
        super().__init__(name="demo-worker", daemon=True)
        self._stopped = threading.Event()

    def run(self) -> None:
        """Look for due flows until stopped."""
        try:
            while not self._stopped.wait(0.5):
                try:
                    while flow_runner.run_next(stop=self._stopped.is_set) is not None:
                        if self._stopped.is_set():
                            return
                except DatabaseError:
                    logger.exception("The worker could not reach the database; it tries again.")
                    connection.close()
        finally:
            connection.close()

    def stop(self) -> None:
        """Let the task in progress end, for a few seconds at most."""
        self._stopped.set()
        self.join(timeout=5)
