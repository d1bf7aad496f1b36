"""What stands between any transport and the server's core.

The core is a plain state machine: one call at a time, no limits on what it is given, defects raise
whatever they raise. The guard adds what every way of reaching it needs, so that a server in the
same process and one across a network behave, and fail, alike.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from dgs.errors import (
    DgsError,
    InternalError,
    ServerUnavailableError,
    StateError,
    TooLargeError,
    error_from_wire,
)

__all__ = ["GuardedHandler", "Handler", "Journal", "Unkept", "defect"]

_LOG = logging.getLogger("dgs.server")
_LONGEST_TEXT = 2000
_TELLS_NO_STATE = frozenset({"Status"})
"""Answered also while nothing can be kept: it is how one learns of that."""


class Handler(Protocol):
    """The server's core, as transports see it; calls come one at a time."""

    def handle(self, method: str, request: bytes) -> bytes:
        """Answer one request.

        Args:
            method: name of the RPC, such as ``Exchange``.
            request: the whole request.

        Raises:
            DgsError: the request was refused; the class and the text go to the client.
        """
        ...

    def max_request_bytes(self, method: str) -> int:
        """Return the most bytes that a request of this method can need."""
        ...


class Journal(Protocol):
    """Where the handler's changes are kept; a reply must not overtake them."""

    @property
    def position(self) -> int:
        """Number of changes so far; asked in the turn of the request that made the last one."""
        ...

    def wait(self, position: int) -> None:
        """Return once so many changes are kept, whichever thread asks.

        Raises:
            StateError: they cannot be.
        """
        ...


class Unkept:
    """The journal of a state that is in memory only."""

    position = 0

    def wait(self, position: int) -> None:
        """Return at once."""


def defect(what: str) -> InternalError:
    """Log the exception being handled under a fresh number, and return an error that only names it.

    The text of an unforeseen exception may hold anything, so it stays in the server's log.
    """
    incident = secrets.token_hex(4)
    _LOG.exception("incident %s: %s failed", incident, what)
    return InternalError(f"internal error, incident {incident}")


def _portable(error: DgsError) -> DgsError:
    """Return the error as a client across a network would see it: same class, bounded text."""
    text = str(error).encode("utf-8", "replace").decode("utf-8")
    if len(text) > _LONGEST_TEXT:
        text = text[: _LONGEST_TEXT - 3] + "..."
    return error_from_wire(error.reason, text)


def _unkept(error: StateError) -> ServerUnavailableError:
    """Return what a client is told: the same request is right once the server can keep it."""
    _LOG.info("nothing is acknowledged: %s", error)
    return ServerUnavailableError("the server cannot keep what it is sent at the moment")


class GuardedHandler:
    """Serialise the calls of a handler, bound their size, and let only `DgsError` out.

    Transports in several threads that reach one handler must share one guard. While one request
    waits for the journal, others have their turn.
    """

    def __init__(self, handler: Handler, journal: Journal | None = None) -> None:
        """Guard a handler.

        Args:
            handler: the core; from now on it is called through this guard only.
            journal: keeps what the handler changes; None if nothing does.
        """
        self._handler = handler
        self._journal = journal or Unkept()
        self._lock = threading.Lock()
        self._closed = False

    def handle(
        self,
        method: str,
        request: bytes,
        wanted: Callable[[], bool] = lambda: True,
        admit: Callable[[str, bytes], None] = lambda method, request: None,
    ) -> bytes:
        """Answer one request when its turn comes.

        Args:
            method: name of the RPC.
            request: the whole request.
            wanted: asked when the turn has come; false leaves the request alone, because its
                caller has gone and will send it again.
            admit: asked then with the method and the request, before the handler; raises if the
                caller may not make it.

        Raises:
            DgsError: what the handler raised, as a client would see it.
            InternalError: the handler raised anything else; the log has it.
            ServerUnavailableError: the guard is closed, or nobody waits for the answer any more.
        """
        limit_bytes = self.max_request_bytes(method)
        if len(request) > limit_bytes:
            raise TooLargeError(f"the request of {method} exceeds the limit of {limit_bytes} bytes")
        position = 0
        try:
            with self.turn():
                if not wanted():
                    raise ServerUnavailableError("the caller has gone")
                admit(method, request)
                try:
                    return bytes(self._handler.handle(method, request))
                finally:
                    position = self._journal.position
        except StateError as error:
            raise _unkept(error) from error
        except DgsError as error:
            raise _portable(error) from error
        except Exception as error:
            raise defect(method) from error
        finally:
            if method not in _TELLS_NO_STATE:
                self._keep(position)

    def _keep(self, position: int) -> None:
        """Wait until nothing that a reply, or a refusal, may tell of can be lost."""
        try:
            self._journal.wait(position)
        except StateError as error:
            raise _unkept(error) from error
        except Exception as error:
            raise defect("the log") from error

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Keep all requests waiting.

        Raises:
            ServerUnavailableError: the guard is closed.
        """
        with self._lock:
            if self._closed:
                raise ServerUnavailableError("the server is stopping")
            yield

    def max_request_bytes(self, method: str) -> int:
        """Return the handler's limit.

        Raises:
            InternalError: the handler failed to tell it.
        """
        try:
            return self._handler.max_request_bytes(method)
        except Exception as error:
            raise defect(f"the limit of {method}") from error

    def close(self) -> None:
        """Wait for the call in progress, then refuse all others; the handler is called no more."""
        with self._lock:
            self._closed = True
