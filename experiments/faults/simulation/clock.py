"""Virtual time: what happens next, and what has happened."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable

__all__ = ["Clock", "Trace"]

Action = Callable[[], None]


class Clock:
    """Carry out actions in the order of their times; those of one time in the order of asking.

    Example:
        >>> clock = Clock()
        >>> clock.after(2.0, lambda: print("b", clock.now))
        >>> clock.after(1.0, lambda: print("a", clock.now))
        >>> clock.step(), clock.step(), clock.step()
        a 1.0
        b 2.0
        (True, True, False)
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.steps = 0
        self._queue: list[tuple[float, int, Action]] = []
        self._asked = 0

    def after(self, delay_s: float, action: Action) -> None:
        """Have an action carried out `delay_s` from now."""
        self._asked += 1
        heapq.heappush(self._queue, (self.now + delay_s, self._asked, action))

    def step(self) -> bool:
        """Carry out the next action; False if there is none."""
        if not self._queue:
            return False
        self.now, _, action = heapq.heappop(self._queue)
        self.steps += 1
        action()
        return True


class Trace:
    """What happened, in order: cheap to note, written out only when somebody asks.

    Args:
        clock: tells when.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._events: list[tuple[float, str, tuple[object, ...]]] = []

    def add(self, what: str, *facts: object) -> None:
        """Note an event; `facts` are numbers and strings only, so that hashes can be compared."""
        self._events.append((self._clock.now, what, facts))

    def lines(self) -> list[str]:
        """Return one line per event."""
        return [f"{t:9.4f}  {what:<22} {_words(facts)}" for t, what, facts in self._events]

    def digest(self) -> str:
        """Hash all of it: two runs of one seed must agree."""
        return hashlib.blake2b("\n".join(self.lines()).encode(), digest_size=16).hexdigest()


def _words(facts: tuple[object, ...]) -> str:
    return " ".join(str(fact) for fact in facts)
