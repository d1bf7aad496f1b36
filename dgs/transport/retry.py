"""Patience around any transport: the same bytes again until an answer comes or the budget is spent.

Repeating is safe because every request carries its sequence number: the server answers a repeated
one with the reply it gave before. Only failures that time or a second sending can mend are retried;
what the server refuses for good is raised at once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from random import Random
from threading import Event

from dgs.config import RetryConfig
from dgs.errors import (
    ChecksumError,
    DgsError,
    InternalError,
    NotReadyError,
    ServerUnavailableError,
)
from dgs.transport.base import Method, Traffic, Transport

__all__ = ["RetryingTransport"]

_LOG = logging.getLogger("dgs.transport")
_RETRIES_OF_A_FAULT = 3
_LAST_ATTEMPT_S = 1.0
_SHORTEST_PAUSE_S = 1e-3


class RetryingTransport:
    """Retry the calls of another transport; one call's `timeout_s` is the budget of all attempts.

    `ServerUnavailableError` and `NotReadyError` are retried while the budget lasts, `ChecksumError`
    and `InternalError` three times.
    """

    def __init__(
        self,
        inner: Transport,
        config: RetryConfig,
        *,
        random: Random,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], object] | None = None,
    ) -> None:
        """Wrap a transport.

        Args:
            inner: makes the attempts; closed together with this one.
            config: seconds of an attempt and of the waits between attempts.
            random: spreads the waits, so that workers do not return all at once.
            clock: tells seconds; never goes back.
            wait: blocks for so many seconds; the default ends early when the transport is closed.
        """
        self._inner = inner
        self._config = config
        self._random = random
        self._clock = clock
        self._closed = Event()
        self._wait = wait or self._closed.wait

    @property
    def address(self) -> str:
        """Return the server's address."""
        return self._inner.address

    @property
    def traffic(self) -> Traffic:
        """Return the running count, every attempt included."""
        return self._inner.traffic

    def call(self, method: Method, request: bytes, *, timeout_s: float) -> bytes:
        """Carry one request, several times if need be; see `Transport.call`.

        Raises:
            ServerUnavailableError: the budget is spent; the text tells the attempts and the cause.
        """
        start = self._clock()
        faults = 0
        pauses = self._pauses()
        attempts = 0
        while True:
            left_s = timeout_s - (self._clock() - start)
            attempts += 1
            try:
                reply = self._inner.call(
                    method, request, timeout_s=min(self._config.attempt_s, max(left_s, 0.0))
                )
                self._report_success(attempts, start)
                return reply
            except (ServerUnavailableError, NotReadyError) as error:
                cause: DgsError = error
            except (ChecksumError, InternalError) as error:
                faults += 1
                if faults > _RETRIES_OF_A_FAULT:
                    raise
                cause = error
            self._pause_or_give_up(cause, attempts, start, timeout_s, next(pauses))

    def close(self) -> None:
        """Close the inner transport; a call that waits for its next attempt ends at once."""
        self._closed.set()
        self._inner.close()

    def _pauses(self) -> Iterator[float]:
        """Yield the seconds to wait after each attempt: doubling, bounded, spread over a half."""
        longest_s = self._config.first_wait_s
        while True:
            longest_s = min(longest_s, self._config.longest_wait_s)
            yield longest_s * (0.5 + 0.5 * self._random.random())
            longest_s *= 2

    def _pause_or_give_up(
        self, cause: DgsError, attempts: int, start: float, timeout_s: float, pause_s: float
    ) -> None:
        tried_s = self._clock() - start
        # The last pause is cut so that one more attempt has time to succeed.
        room_s = timeout_s - tried_s - min(_LAST_ATTEMPT_S, timeout_s / 4)
        has_room = room_s >= _SHORTEST_PAUSE_S
        if has_room and not self._closed.is_set():
            self._pause(cause, attempts, min(pause_s, room_s))
        if self._closed.is_set():
            raise ServerUnavailableError(f"the connection to {self.address} is closed") from cause
        if not has_room:
            raise self._gave_up(cause, attempts, tried_s) from cause

    def _pause(self, cause: DgsError, attempts: int, pause_s: float) -> None:
        if attempts == 1:
            _LOG.warning("server %s: %s; trying again", self.address, cause)
        self._wait(pause_s)

    def _gave_up(self, cause: DgsError, attempts: int, tried_s: float) -> ServerUnavailableError:
        plural = "" if attempts == 1 else "s"
        return ServerUnavailableError(
            f"gave up on server {self.address} after {tried_s:.1f} s and {attempts} "
            f"attempt{plural}; last cause: {cause}. Check that the server runs and listens on this "
            "address, and that no firewall is between"
        )

    def _report_success(self, attempts: int, start: float) -> None:
        if attempts > 1:
            _LOG.warning("server %s is back after %.1f s", self.address, self._clock() - start)
