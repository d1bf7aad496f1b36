"""A server in the same process: no network, the same errors, the same counts."""

from __future__ import annotations

import threading

from dgs.errors import ServerUnavailableError
from dgs.transport.base import Method, Traffic
from dgs.transport.guard import GuardedHandler, Handler

__all__ = ["LocalTransport"]


class LocalTransport:
    """Call a server's core directly.

    The core answers before `call` returns, so `timeout_s` never comes into play.
    """

    def __init__(self, handler: Handler | GuardedHandler) -> None:
        """Connect to a handler.

        Args:
            handler: the server's core. If transports in several threads reach the same core, wrap
                it in one `GuardedHandler` and give that to each of them.
        """
        shared = isinstance(handler, GuardedHandler)
        self._guard = handler if shared else GuardedHandler(handler)
        self._traffic = Traffic()
        self._count = threading.Lock()
        self._closed = False

    @property
    def address(self) -> str:
        """Return the word ``local``."""
        return "local"

    @property
    def traffic(self) -> Traffic:
        """Return the running count of what was carried."""
        return self._traffic

    def call(self, method: Method, request: bytes, *, timeout_s: float) -> bytes:
        """Answer one request; see `Transport.call`."""
        if self._closed:
            raise ServerUnavailableError("the connection to the local server is closed")
        with self._count:
            self._traffic.up_bytes[method] += len(request)
        reply = self._guard.handle(method.value, request)
        with self._count:
            self._traffic.down_bytes[method] += len(reply)
        return reply

    def close(self) -> None:
        """Refuse later calls; the server itself goes on."""
        self._closed = True
