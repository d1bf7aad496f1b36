"""A client that never waits: what it asks for comes out, and replies go in from the beginning.

`dgs.client.Client.join` waits for replies. Here it is run anew each time one has come, with all
replies so far at hand, until it asks for nothing more. It is a function of its replies, so the last
run is what one run that waits would have been.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from dgs.errors import DgsError
from dgs.transport.base import Method, Traffic
from experiments.faults.simulation.network import Outcome

__all__ = ["Asked", "Call", "Inline", "Script", "ScriptedTransport"]


class Call(NamedTuple):
    """A request, and the shard it is for."""

    shard: int
    method: str
    request: bytes


class Asked(BaseException):
    """The client needs a reply that is not there yet."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call


class Script:
    """Replies that have come so far, handed out in order."""

    def __init__(self) -> None:
        self.replies: list[Outcome] = []
        self._next = 0

    def rewind(self) -> None:
        """Begin with the first reply again."""
        self._next = 0

    def reply_to(self, call: Call) -> bytes:
        """Return the next reply, or raise what came instead.

        Raises:
            Asked: it is not there yet.
        """
        if self._next == len(self.replies):
            raise Asked(call)
        outcome = self.replies[self._next]
        self._next += 1
        if isinstance(outcome, DgsError):
            raise outcome
        return outcome


class ScriptedTransport:
    """The way to one shard, as the client sees it."""

    def __init__(self, shard: int, script: Script) -> None:
        self._shard = shard
        self._script = script
        self.address = f"shard{shard}"
        self.traffic = Traffic()

    def call(self, method: Method, request: bytes, *, timeout_s: float) -> bytes:
        """Return the next reply; see `dgs.transport.base.Transport`."""
        return self._script.reply_to(Call(self._shard, method.value, request))

    def close(self) -> None:
        """Do nothing."""


class Inline:
    """Runs at once what a pool of threads would run at some time."""

    def submit(self, call: Callable[..., bytes], *args: object) -> _Done:
        """Make the call."""
        return _Done(call(*args))


class _Done:
    def __init__(self, value: bytes) -> None:
        self._value = value

    def result(self) -> bytes:
        return self._value
