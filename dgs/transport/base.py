"""What carries a request to one server shard and brings the reply back.

A transport knows bytes and errors, nothing else: the six methods of the service, a request, a
reply, and an error class rebuilt from what the server raised. Everything above it (sessions,
retries of a whole exchange, shards) is the client's, everything below it the network's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol, runtime_checkable

__all__ = ["Method", "Traffic", "Transport"]


class Method(Enum):
    """The RPCs of the service; the value is the name in `proto/parameter_server.proto`."""

    JOIN = "Join"
    PUT_MODEL = "PutModel"
    EXCHANGE = "Exchange"
    PULL_MODEL = "PullModel"
    LEAVE = "Leave"
    STATUS = "Status"

    @property
    def streamed(self) -> bool:
        """Whether request and reply travel as chunks, because either may exceed one message."""
        return self in (Method.PUT_MODEL, Method.EXCHANGE, Method.PULL_MODEL)


@dataclass(slots=True)
class Traffic:
    """Bytes of requests and replies that a transport has carried, by method.

    Counts messages as the service defines them (frames and control messages), every attempt of a
    retried call included; HTTP/2 and TCP framing is not counted.
    """

    up_bytes: dict[Method, int] = field(default_factory=lambda: dict.fromkeys(Method, 0))
    down_bytes: dict[Method, int] = field(default_factory=lambda: dict.fromkeys(Method, 0))


@runtime_checkable
class Transport(Protocol):
    """A way to one server shard.

    Implementations may be called from several threads, but a client has at most one call in flight
    for each session.
    """

    @property
    def address(self) -> str:
        """Name the server for messages, such as ``127.0.0.1:7070``."""
        ...

    @property
    def traffic(self) -> Traffic:
        """Return the running count of what was carried."""
        ...

    def call(self, method: Method, request: bytes, *, timeout_s: float) -> bytes:
        """Carry one request and return the reply.

        Args:
            method: the RPC.
            request: the whole request; a repeated call with the same bytes is safe.
            timeout_s: seconds until the attempts end; every wait is bounded by it.

        Raises:
            DgsError: what the server raised, as the same class.
            ServerUnavailableError: no reply within `timeout_s`; whether the request was carried
                out is unknown, and the same bytes may be sent again.
            ForkError: called in another process than the one that opened the connection.
        """
        ...

    def close(self) -> None:
        """Release the connection; later calls raise `ServerUnavailableError`."""
        ...
