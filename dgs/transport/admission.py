"""How many bytes of requests may be in a server's memory at a time.

A request counts from its first byte until it has been answered. One that finds no room is put off:
it is dropped, and its client sends it again after a pause. So that large requests get through even
while small ones keep coming, the oldest of those that are arriving is not put off at once: room is
kept for it as others end.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from dgs.errors import ConfigError, ServerUnavailableError

__all__ = ["Arrival", "InFlight"]

_PATIENCE_S = 10.0


class Arrival:
    """One request that takes room; `InFlight.request` makes it.

    Args:
        in_flight: whose room.
    """

    def __init__(self, in_flight: InFlight) -> None:
        self.held_bytes = 0
        self._in_flight = in_flight

    def add(self, count_bytes: int) -> None:
        """Take room for a piece that has arrived.

        Raises:
            ServerUnavailableError: there is none; the request is to be sent again later.
        """
        self._in_flight.take(self, count_bytes)

    def complete(self) -> None:
        """Tell that the request has arrived whole; its bytes count until it is answered."""
        self._in_flight.complete(self)


class InFlight:
    """Count the bytes of requests that are arriving or waiting, and keep them within a limit.

    The sum never exceeds the limit, unless one request alone does: it is served by itself.

    Args:
        limit_bytes: most bytes of all requests together.
        patience_s: seconds that the oldest arriving request waits for room before it is put off.

    Example:
        >>> in_flight = InFlight(10)
        >>> with in_flight.request() as arrival:
        ...     arrival.add(8)
        ...     in_flight.held_bytes
        8
        >>> in_flight.held_bytes
        0
    """

    def __init__(self, limit_bytes: int, *, patience_s: float = _PATIENCE_S) -> None:
        """Begin with nothing in flight."""
        if limit_bytes < 1:
            raise ConfigError(f"max_in_flight_bytes={limit_bytes} is not valid: give at least 1")
        self._limit_bytes = limit_bytes
        self._patience_s = patience_s
        self._changed = threading.Condition()
        self._held_bytes = 0
        self._put_off = 0
        self._arriving: dict[Arrival, None] = {}  # the oldest first
        self._claimant: Arrival | None = None

    @property
    def limit_bytes(self) -> int:
        """Return the limit."""
        return self._limit_bytes

    @property
    def held_bytes(self) -> int:
        """Return how many bytes of requests there are now."""
        return self._held_bytes

    @property
    def put_off(self) -> int:
        """Return how many requests have been put off so far."""
        return self._put_off

    @contextmanager
    def request(self) -> Iterator[Arrival]:
        """Hold a request's room until the context ends."""
        arrival = Arrival(self)
        with self._changed:
            self._arriving[arrival] = None
        try:
            yield arrival
        finally:
            with self._changed:
                self._arriving.pop(arrival, None)
                self._held_bytes -= arrival.held_bytes
                self._changed.notify_all()

    def take(self, arrival: Arrival, count_bytes: int) -> None:
        """Take room for a piece of a request; see `Arrival.add`."""
        with self._changed:
            if not self._has_room(arrival, count_bytes) and not self._claim(arrival, count_bytes):
                self._put_off += 1
                raise ServerUnavailableError(
                    f"the server is busy: {self._held_bytes} bytes of requests are in flight, and "
                    f"{count_bytes} more would exceed the limit of {self._limit_bytes}; the same "
                    "request may be sent again"
                )
            arrival.held_bytes += count_bytes
            self._held_bytes += count_bytes

    def complete(self, arrival: Arrival) -> None:
        """Let the next arriving request be the oldest; see `Arrival.complete`."""
        with self._changed:
            self._arriving.pop(arrival, None)

    def _has_room(self, arrival: Arrival, count_bytes: int) -> bool:
        if self._claimant not in (None, arrival):
            return False
        alone = self._held_bytes == arrival.held_bytes
        return alone or self._held_bytes + count_bytes <= self._limit_bytes

    def _claim(self, arrival: Arrival, count_bytes: int) -> bool:
        """Wait for room, while all others are put off; only the oldest may."""
        if next(iter(self._arriving), None) is not arrival:
            return False
        self._claimant = arrival
        try:
            return self._changed.wait_for(
                lambda: self._has_room(arrival, count_bytes), self._patience_s
            )
        finally:
            self._claimant = None
