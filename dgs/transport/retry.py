"""Patience around any transport: the same bytes again until an answer comes or the budget is spent.

Repeating is safe because every request carries its sequence number: the server answers a repeated
one with the reply it gave before. Only failures that time or a second sending can mend are retried;
what the server refuses for good is raised at once.
"""

from __future__ import annotations

import logging
import time
import weakref
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
from dgs.transport.address import UnresolvedNameError
from dgs.transport.base import Method, Traffic, Transport
from dgs.transport.slow import NOTE_AFTER_S, SlowAttempts

__all__ = ["RetryingTransport"]

_LOG = logging.getLogger("dgs.transport")
_RETRIES_OF_A_FAULT = 3
_LAST_ATTEMPT_S = 1.0
_UNRESOLVED_S = 3.0
_SHORTEST_PAUSE_S = 1e-3
_KINDS = (NotReadyError, ServerUnavailableError, ChecksumError, InternalError)


class RetryingTransport:
    """Retry the calls of another transport; one call's `timeout_s` is the budget of all attempts.

    What it exceeds the configured budget by, for the size of its messages, each attempt has more.
    `ServerUnavailableError` and `NotReadyError` are retried while the budget lasts, `ChecksumError`
    and `InternalError` three times. A name that has never resolved gets 3 s only: most likely it is
    misspelt.
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
        self._resolved = False
        self._slow = SlowAttempts(inner.address, clock)
        weakref.finalize(self, self._slow.stop)  # for those that nobody closes

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
        attempt_s = self._config.attempt_s + max(0.0, timeout_s - self._config.budget_s)
        faults = 0
        pauses = self._pauses()
        course = _Course(self.address)
        while True:
            left_s = timeout_s - (self._clock() - start)
            course.attempts += 1
            try:
                with self._slow.attempt(method.value):
                    reply = self._inner.call(
                        method, request, timeout_s=min(attempt_s, max(left_s, 0.0))
                    )
                self._resolved = True
                course.tell_success(self._clock() - start)
                return reply
            except (ServerUnavailableError, NotReadyError) as error:
                cause: DgsError = error
            except (ChecksumError, InternalError) as error:
                faults += 1
                if faults > _RETRIES_OF_A_FAULT:
                    raise
                cause = error
            self._pause_or_give_up(cause, course, start, timeout_s, next(pauses))

    def close(self) -> None:
        """Close the inner transport; a call that waits for its next attempt ends at once."""
        self._closed.set()
        self._slow.stop()
        self._inner.close()

    def _pauses(self) -> Iterator[float]:
        """Yield the seconds to wait after each attempt: doubling, bounded, spread over a half."""
        longest_s = self._config.first_wait_s
        while True:
            longest_s = min(longest_s, self._config.longest_wait_s)
            yield longest_s * (0.5 + 0.5 * self._random.random())
            longest_s *= 2

    def _pause_or_give_up(
        self, cause: DgsError, course: _Course, start: float, timeout_s: float, pause_s: float
    ) -> None:
        self._resolved |= not isinstance(cause, UnresolvedNameError)
        if not self._resolved:
            timeout_s = min(timeout_s, _UNRESOLVED_S)
        tried_s = self._clock() - start
        # The last pause is cut so that one more attempt has time to succeed.
        room_s = timeout_s - tried_s - min(_LAST_ATTEMPT_S, timeout_s / 4)
        has_room = room_s >= _SHORTEST_PAUSE_S
        if has_room and not self._closed.is_set():
            course.tell_failure(cause, tried_s)
            self._wait(min(pause_s, room_s))
        # NotReadyError stays as the cause, because callers act on it; what else failed is in the
        # text, and a second traceback would only hide it.
        behind = cause if isinstance(cause, NotReadyError) else None
        if self._closed.is_set():
            raise ServerUnavailableError(f"the connection to {self.address} is closed") from behind
        if not has_room:
            raise course.failure(cause, tried_s) from behind


class _Course:
    """What has become of one call so far, and what was said about it.

    Args:
        address: of the server.
    """

    def __init__(self, address: str) -> None:
        self.attempts = 0
        self._address = address
        self._told: set[type[DgsError]] = set()
        self._told_of_wait = False

    def tell_failure(self, cause: DgsError, tried_s: float) -> None:
        """Log the first failure of each kind; that a server is not ready yet only if it lasts."""
        kind = next(k for k in _KINDS if isinstance(cause, k))
        if kind is NotReadyError and tried_s >= NOTE_AFTER_S and not self._told_of_wait:
            self._told_of_wait = True
            _LOG.warning(
                "server %s is not ready after %.0f s: %s; still waiting",
                self._address,
                tried_s,
                self._words(cause),
            )
        if kind not in self._told:
            self._told.add(kind)
            level = logging.INFO if kind is NotReadyError else logging.WARNING
            _LOG.log(level, "server %s: %s; trying again", self._address, self._words(cause))

    def tell_success(self, tried_s: float) -> None:
        """Log the end of what was told as a failure."""
        if ServerUnavailableError in self._told:
            _LOG.warning("server %s is back after %.1f s", self._address, tried_s)
        elif NotReadyError in self._told:
            level = logging.WARNING if self._told_of_wait else logging.INFO
            _LOG.log(level, "server %s was ready after %.1f s", self._address, tried_s)
        elif self._told:
            _LOG.warning("server %s answered at attempt %d", self._address, self.attempts)

    def failure(self, cause: DgsError, tried_s: float) -> ServerUnavailableError:
        """Return the error that ends the call."""
        plural = "" if self.attempts == 1 else "s"
        tried = f"{self._address} after {tried_s:.1f} s and {self.attempts} attempt{plural}"
        words = self._words(cause)
        if isinstance(cause, UnresolvedNameError):
            return UnresolvedNameError(
                f"gave up on server {tried}: {words}. Check the spelling of the host's name"
            )
        if isinstance(cause, NotReadyError):
            return ServerUnavailableError(f"gave up waiting for server {tried}: {words}")
        return ServerUnavailableError(
            f"gave up on server {tried}; last cause: {words}. Check that the server runs and "
            "listens on this address, and that no firewall is between"
        )

    def _words(self, cause: DgsError) -> str:
        """Return the cause's text; it may name the server, as the message around it does."""
        return str(cause).removeprefix(f"{self._address}: ")
