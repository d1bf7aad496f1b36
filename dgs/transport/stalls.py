"""Cut calls that stand still, so that a peer which stops or crawls cannot keep a thread for ever.

gRPC bounds nothing here by itself: a request that never arrives whole, and a reply that is never
read, block the thread that serves them for as long as the peer answers pings.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from dgs.errors import ServerUnavailableError

__all__ = ["Cancellable", "StallGuard", "Watched"]


class Cancellable(Protocol):
    """What a guard needs of a call."""

    def cancel(self) -> object:
        """End the call; whoever is blocked in it goes on with an error."""
        ...


class Watched:
    """One call under watch; `StallGuard.begin` makes it.

    Args:
        guard: to tell when the call moves.
        call: what to cancel.
        until_s: when the call must have ended, in the guard's clock.
    """

    def __init__(self, guard: StallGuard, call: Cancellable, until_s: float) -> None:
        self.call = call
        self.deadline_s = 0.0
        self._guard = guard
        self._until_s = until_s
        self.moved()

    def moved(self) -> None:
        """Tell that a piece has come or gone."""
        self.deadline_s = min(self._until_s, time.monotonic() + self._guard.idle_s)

    def end(self) -> bool:
        """Stop watching; return whether the call was left alone all the time."""
        return self._guard.forget(self)


class StallGuard:
    """Cancel calls that do not move for a while, or take too long in all.

    Args:
        idle_s: seconds that a call may take from one piece to the next.
    """

    def __init__(self, idle_s: float) -> None:
        """Start the guard's thread."""
        self.idle_s = idle_s
        self._lock = threading.Lock()
        self._watched: set[Watched] = set()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dgs-stall-guard", daemon=True)
        self._thread.start()

    def begin(self, call: Cancellable, limit_s: float = float("inf")) -> Watched:
        """Watch a call until `Watched.end`.

        Args:
            call: is cancelled if it stands still.
            limit_s: seconds that it may take in all, even if it moves.
        """
        watched = Watched(self, call, time.monotonic() + limit_s)
        with self._lock:
            self._watched.add(watched)
        return watched

    def forget(self, watched: Watched) -> bool:
        """Stop watching a call; return false if it was cut, or forgotten before."""
        with self._lock:
            known = watched in self._watched
            self._watched.discard(watched)
        return known

    @contextmanager
    def upload(self, call: Cancellable, limit_s: float) -> Iterator[Watched]:
        """Watch a call while its request is read.

        Args:
            call: is cancelled if it stands still.
            limit_s: seconds within which the request must have arrived whole.

        Raises:
            ServerUnavailableError: the call was cut.
        """
        watched = self.begin(call, limit_s)
        try:
            yield watched
        finally:
            in_time = watched.end()
        # To the reader, a stream cut by a cancellation may look like one that has ended.
        if not in_time:
            raise ServerUnavailableError(
                f"the request took longer than {limit_s:g} s, or stood still for {self.idle_s:g} s"
            )

    def stop(self) -> None:
        """End the guard's thread; nothing is cut any more."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self.idle_s / 8):
            now = time.monotonic()
            with self._lock:
                late = [watched for watched in self._watched if watched.deadline_s < now]
                self._watched.difference_update(late)
            for watched in late:
                watched.call.cancel()
