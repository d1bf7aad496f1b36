"""Faults on the way between a client and its server, each at a call that the test names."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto

from dgs.errors import DgsError, ServerUnavailableError
from dgs.transport.base import Method, Traffic, Transport


class Fault(Enum):
    """What happens to one call."""

    DROP_REQUEST = auto()
    """The request never arrives; the caller sees an unavailable server."""

    DROP_REPLY = auto()
    """The request is carried out, its reply is lost; the caller sees an unavailable server."""

    DUPLICATE = auto()
    """The request arrives twice; the caller gets the second reply."""

    CORRUPT_REQUEST = auto()
    """One bit of the request is turned over on the way."""

    CORRUPT_REPLY = auto()
    """One bit of the reply is turned over on the way."""

    DELAY_UNTIL_NEXT = auto()
    """The request arrives just before the next call's; its reply is lost."""

    DELAY_PAST_NEXT = auto()
    """The request is overtaken by the next call's; its reply is lost."""


def corrupt(message: bytes) -> bytes:
    """Turn over one bit in the middle; an empty message grows by a byte."""
    if not message:
        return b"\x00"
    middle = len(message) // 2
    return message[:middle] + bytes((message[middle] ^ 0x10,)) + message[middle + 1 :]


class FaultyTransport:
    """Carry calls through another transport, with faults by call number.

    Calls are counted from 0 over all methods, so the same plan gives the same run. What a delayed
    request raises when it arrives late is lost with its reply.
    """

    def __init__(self, inner: Transport, plan: Mapping[int, Fault]) -> None:
        self._inner = inner
        self._plan = dict(plan)
        self._calls = 0
        self._before_next: list[tuple[Method, bytes]] = []
        self._after_next: list[tuple[Method, bytes]] = []

    @property
    def address(self) -> str:
        return self._inner.address

    @property
    def traffic(self) -> Traffic:
        return self._inner.traffic

    @property
    def calls(self) -> int:
        """Return how many calls were made, faulty ones included."""
        return self._calls

    def call(self, method: Method, request: bytes, *, timeout_s: float) -> bytes:
        fault = self._plan.get(self._calls)
        self._calls += 1
        late, self._after_next = self._after_next, []
        held, self._before_next = self._before_next, []
        self._deliver(held, timeout_s)
        try:
            return self._carry(fault, method, request, timeout_s)
        finally:
            self._deliver(late, timeout_s)

    def close(self) -> None:
        self._inner.close()

    def _deliver(self, requests: list[tuple[Method, bytes]], timeout_s: float) -> None:
        for method, request in requests:
            try:
                self._inner.call(method, request, timeout_s=timeout_s)
            except DgsError:
                continue  # nobody waits for this reply any more

    def _carry(
        self, fault: Fault | None, method: Method, request: bytes, timeout_s: float
    ) -> bytes:
        if fault is Fault.DELAY_UNTIL_NEXT:
            self._before_next.append((method, request))
        if fault is Fault.DELAY_PAST_NEXT:
            self._after_next.append((method, request))
        if fault in (Fault.DROP_REQUEST, Fault.DELAY_UNTIL_NEXT, Fault.DELAY_PAST_NEXT):
            raise ServerUnavailableError(f"{self.address}: the test lost the request")
        if fault is Fault.CORRUPT_REQUEST:
            request = corrupt(request)
        reply = self._inner.call(method, request, timeout_s=timeout_s)
        if fault is Fault.DUPLICATE:
            reply = self._inner.call(method, request, timeout_s=timeout_s)
        if fault is Fault.DROP_REPLY:
            raise ServerUnavailableError(f"{self.address}: the test lost the reply")
        return corrupt(reply) if fault is Fault.CORRUPT_REPLY else reply
