"""The way between workers and servers: messages get lost, doubled, late and damaged."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Protocol

from dgs.errors import DgsError, error_from_wire
from experiments.faults.simulation.clock import Clock
from experiments.faults.simulation.weather import Weather

__all__ = ["Answer", "Network", "Outcome", "Receiver"]

Outcome = bytes | DgsError
Answer = Callable[[Outcome], None]

_LATE = 40
"""How many times the usual delay a late message takes: longer than it takes to send it again."""

_FIXED = 5
"""Bytes of magic and wire version. Damage there makes something that is no frame at all, which
receivers rightly refuse for good instead of asking for it again."""

_FRAMES = {"Exchange": (True, True), "PutModel": (True, False), "PullModel": (False, True)}
"""Whether request and reply carry a checksum of their own."""


class Receiver(Protocol):
    """Who answers requests."""

    def receive(self, method: str, request: bytes, answer: Answer) -> None:
        """Answer at once, later, or never."""
        ...


class Network:
    """Carry requests and replies, each copy on its own way.

    Args:
        clock: when copies arrive.
        weather: what happens to them.
        rng: decides it.
    """

    def __init__(self, clock: Clock, weather: Weather, rng: Random) -> None:
        self._clock = clock
        self._weather = weather
        self._rng = rng

    def call(self, to: Receiver, method: str, request: bytes, answer: Answer) -> None:
        """Send a request; `answer` is called once for each copy of a reply that arrives."""
        checked = _FRAMES.get(method, (False, False))

        def reply(outcome: Outcome) -> None:
            if isinstance(outcome, DgsError):  # only class and text travel
                error = error_from_wire(outcome.reason, str(outcome))
                self._carry(b"", False, lambda _: answer(error))
            else:
                self._carry(outcome, checked[1], answer)

        self._carry(request, checked[0], lambda r: to.receive(method, r, reply))

    def _carry(self, message: bytes, checked: bool, arrive: Callable[[bytes], None]) -> None:
        weather, rng = self._weather, self._rng
        copies = 1 if weather.is_calm else (rng.random() >= weather.drop)
        copies += rng.random() < weather.duplicate
        for _ in range(copies):
            delay_s = weather.delay_s * (0.5 + rng.random())
            if rng.random() < weather.late:
                delay_s *= _LATE * rng.random()
            data = message
            if checked and rng.random() < weather.flip:
                data = self._damage(message)
            self._clock.after(delay_s, lambda data=data: arrive(data))  # type: ignore[misc]

    def _damage(self, message: bytes) -> bytes:
        damaged = bytearray(message)
        damaged[self._rng.randrange(_FIXED, len(message))] ^= 1 << self._rng.randrange(8)
        return bytes(damaged)
