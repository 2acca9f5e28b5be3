"""Threads that compute, so that the event loop never does.

Invariants
    * One worker runs its jobs one after another in the order they were put.
    * Threads are daemons: a computation in progress never keeps the process from ending.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

__all__ = ("Worker",)

_log = logging.getLogger(__name__)


class Worker:
    """A thread with a queue of jobs."""

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._put = 0
        self._done = 0
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def put(self, job: Callable[[], None]) -> int:
        """Add a job; returns its ticket. Called from one thread only."""
        self._put += 1
        self._jobs.put(job)
        return self._put

    def ahead(self, ticket: int) -> int:
        """How many jobs are before that of a ticket; 0 while it runs, negative afterwards."""
        return ticket - self._done - 1

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                job()
            except Exception:
                _log.exception("a job failed")
            self._done += 1
            del job  # and with it what it worked on
