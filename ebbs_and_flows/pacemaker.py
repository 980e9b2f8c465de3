"""Finds what is due or orphaned and has a worker woken for it: a thread in each worker process.

A queue's own scheduler is too coarse for retries and for `run_at`, and a message may be lost. The
database knows what is due, so it is asked, once each `PACEMAKER_SECONDS`.
"""

from __future__ import annotations

import logging
import os
import threading

from django.db import DatabaseError, InterfaceError, connections

from .conf import get_settings
from .runner import FlowRunner, flow_runner

logger = logging.getLogger("ebbs_and_flows")


class Pacemaker(threading.Thread):
    """Wakes workers until it is stopped or its process ends."""

    def __init__(self, runner: FlowRunner = flow_runner) -> None:
        super().__init__(name="flow-pacemaker", daemon=True)
        self._runner = runner
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Stop and wait for the end."""
        self._stopped.set()
        self.join()

    def run(self) -> None:
        """Beat until stopped; a database that goes away is waited for."""
        reachable = True
        try:
            self._sync_recurring()
            while not self._stopped.wait(get_settings().PACEMAKER_SECONDS):
                try:
                    self._runner.wake_worker()
                    if not reachable:
                        logger.warning("The pacemaker reaches the database again.")
                    reachable = True
                except (DatabaseError, InterfaceError):
                    if reachable:
                        logger.warning("The pacemaker cannot reach the database.", exc_info=True)
                    reachable = False
                    self._close_connection()
                except Exception:
                    # A broker that is away, for instance: the flows are still there.
                    logger.exception("The pacemaker could not wake a worker.")
        finally:
            self._close_connection()

    def _sync_recurring(self) -> None:
        try:
            self._runner.sync_recurring()
        except Exception:
            # The next worker that starts tries again; what is due runs meanwhile.
            logger.exception("The recurring flows could not be brought up to date.")
            self._close_connection()

    def _close_connection(self) -> None:
        connections[self._runner.service.repository.using].close()


_started_in: int | None = None


def start() -> None:
    """Start this process's pacemaker, unless it has one."""
    global _started_in
    if _started_in != os.getpid():
        _started_in = os.getpid()
        Pacemaker().start()
