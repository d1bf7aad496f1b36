"""Tell of attempts that last long while they last, so that nobody watches a silent program.

A call blocks its thread, so somebody else has to speak up: one thread per transport, started by the
first call, which looks once a second. Beginning and ending an attempt take no lock, so a fork in
between leaves none behind.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["NOTE_AFTER_S", "SlowAttempts"]

_LOG = logging.getLogger("dgs.transport")

NOTE_AFTER_S = 10.0
"""Seconds after which an attempt, or a wait for a server to be ready, is worth a word."""

_LOOK_EVERY_S = 1.0


@dataclass(slots=True)
class _Attempt:
    what: str
    start_s: float
    noted: bool = False


class SlowAttempts:
    """The attempts under way on one transport.

    Args:
        address: of the server, for the messages.
        clock: tells seconds; never goes back.
    """

    def __init__(self, address: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Start without a thread."""
        self._address = address
        self._clock = clock
        self._running: dict[int, _Attempt] = {}
        self._numbers = itertools.count()
        self._stopped = threading.Event()

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Follow one attempt for as long as the context lasts.

        Args:
            what: name of the RPC.
        """
        number = next(self._numbers)
        if number == 0:
            threading.Thread(target=self._run, name="dgs-slow-attempts", daemon=True).start()
        running = self._running[number] = _Attempt(what, self._clock())
        try:
            yield
            if running.noted:
                lasted_s = self._clock() - running.start_s
                _LOG.warning("server %s answered %s after %.1f s", self._address, what, lasted_s)
        finally:
            del self._running[number]

    def look(self) -> None:
        """Log each attempt that has lasted for `NOTE_AFTER_S`, once."""
        now_s = self._clock()
        for attempt in self._running.copy().values():
            lasted_s = now_s - attempt.start_s
            if lasted_s >= NOTE_AFTER_S and not attempt.noted:
                attempt.noted = True
                _LOG.warning(
                    "server %s has not answered %s for %.0f s; still waiting "
                    "(is it busy, stopped, or cut off?)",
                    self._address,
                    attempt.what,
                    lasted_s,
                )

    def stop(self) -> None:
        """Let the thread end."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(_LOOK_EVERY_S):
            self.look()
