"""A handler for transports' tests: what it does is written in the request."""

from __future__ import annotations

import threading

from dgs import errors

SECRET = "the text of an unforeseen exception"


class EchoHandler:
    """Return the request, or do what it asks for: ``raise:NAME``, ``reply:BYTES``, ``crash``, ...

    `overlaps` counts calls that began while another was in progress; a transport must keep it 0.
    """

    def __init__(self, limit_bytes: int = 8 << 20) -> None:
        self.limit_bytes = limit_bytes
        self.calls: list[tuple[str, bytes]] = []
        self.overlaps = 0
        self.entered = threading.Event()
        self.leave = threading.Event()
        self._busy = threading.Lock()

    def max_request_bytes(self, method: str) -> int:
        return self.limit_bytes

    def handle(self, method: str, request: bytes) -> bytes:
        if not self._busy.acquire(blocking=False):
            self.overlaps += 1
            return b"overlap"
        try:
            self.calls.append((method, request))
            return self._obey(request)
        finally:
            self._busy.release()

    def _obey(self, request: bytes) -> bytes:
        order, _, argument = request[:64].partition(b":")
        if order == b"raise":
            raise getattr(errors, argument.decode())(f"{argument.decode()} of the handler")
        if order == b"long-error":
            raise errors.MalformedError("\u00fc" * 1_000_000)
        if order == b"crash":
            raise RuntimeError(SECRET)
        if order == b"exit":
            raise SystemExit(SECRET)
        if order == b"block":
            self.entered.set()
            assert self.leave.wait(10.0)
        if order == b"reply":
            return pattern(int(argument))
        return request


def pattern(count: int) -> bytes:
    """Return so many bytes in which a lost, doubled or swapped chunk shows."""
    return (bytes(range(251)) * (count // 251 + 1))[:count]
