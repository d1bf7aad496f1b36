"""The gRPC options of both sides, in one table.

gRPC ignores an option whose name it does not know, and keepalive settings of the two sides must fit
each other or the server drops the client ("too many pings"). So every name and every number stands
here, once, and a test looks each name up in the installed library.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import NamedTuple

__all__ = [
    "CONTROL_LIMIT_BYTES",
    "KEEPALIVES",
    "QUIET_GRPC",
    "Keepalive",
    "client_options",
    "server_options",
]

CONTROL_LIMIT_BYTES = 8 << 20
"""Most bytes of one gRPC message: a whole control message, or a chunk (which is far smaller)."""

QUIET_GRPC = ("GRPC_VERBOSITY", "NONE")
"""Environment variable, and the value with which gRPC's own log stays off the user's terminal: what
is in it ("Got goaway ...") becomes an error in plain words anyway."""


class Keepalive(NamedTuple):
    """When a side that hears nothing asks whether the other is there, and how long it waits."""

    after_s: float
    timeout_s: float

    @property
    def notice_s(self) -> float:
        """Return the seconds within which a link that was silently cut is noticed.

        Example:
            >>> KEEPALIVES["steady"].notice_s, KEEPALIVES["fast"].notice_s
            (60.0, 14.5)
        """
        return self.after_s + self.timeout_s


KEEPALIVES = MappingProxyType({"steady": Keepalive(30.0, 30.0), "fast": Keepalive(10.0, 4.5)})
"""By the names that `dgs.config.RetryConfig.keepalive` may have.

A ping, and its answer, wait behind all that is queued on a slow link: up to a window of bytes, and
what routers keep. So ``steady`` waits long enough for some 70 kB/s, ``fast`` for some 500 kB/s."""

_SHORTEST_PING_INTERVAL_S = 5.0
_WINDOW_BYTES = 2 << 20
_HANDSHAKE_S = 10.0
_STREAMS_PER_CONNECTION = 64
_CONNECTIONS = 4096
_METADATA_BYTES = 16 << 10
_FIRST_RECONNECT_S = 0.2
_CONNECT_ATTEMPT_S = 2.0
_LONGEST_RECONNECT_S = 1.0

_Options = tuple[tuple[str, int], ...]


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def _common(keepalive: Keepalive) -> _Options:
    return (
        ("grpc.keepalive_time_ms", _ms(keepalive.after_s)),
        ("grpc.keepalive_timeout_ms", _ms(keepalive.timeout_s)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.max_receive_message_length", CONTROL_LIMIT_BYTES),
        ("grpc.max_send_message_length", CONTROL_LIMIT_BYTES),
        ("grpc.max_metadata_size", _METADATA_BYTES),
        # gRPC would also ping in the middle of a message, to find how large a window the link can
        # use. On a slow link a large one only makes the queue longer, and answers late. A fixed one
        # of this size still carries 20 MB/s over 100 ms.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", _WINDOW_BYTES),
    )


def server_options() -> _Options:
    """Return the options of a server; it tolerates the pings of every client in `KEEPALIVES`.

    Example:
        >>> dict(server_options())["grpc.so_reuseport"]
        0
    """
    return (
        *_common(KEEPALIVES["steady"]),
        # With the default, a second server takes the same port and gets half of the calls.
        ("grpc.so_reuseport", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", _ms(_SHORTEST_PING_INTERVAL_S)),
        ("grpc.max_concurrent_streams", _STREAMS_PER_CONNECTION),
        ("grpc.max_allowed_incoming_connections", _CONNECTIONS),
        ("grpc.server_handshake_timeout_ms", _ms(_HANDSHAKE_S)),
    )


def client_options(keepalive: Keepalive = KEEPALIVES["steady"]) -> _Options:
    """Return the options of a client.

    Args:
        keepalive: how soon a silent link is noticed.

    Example:
        >>> dict(client_options())["grpc.enable_retries"]
        0
    """
    return (
        *_common(keepalive),
        # Without this, an unanswered ping is waited for for a minute, whatever stands above.
        ("grpc.http2.ping_timeout_ms", _ms(keepalive.timeout_s)),
        # Without traffic, pings go on: a silent link must be noticed while a call waits.
        ("grpc.http2.max_pings_without_data", 0),
        # gRPC's own retries stop silently above 256 KiB, so they are left out altogether.
        ("grpc.enable_retries", 0),
        # A proxy for web pages is no way to a parameter server.
        ("grpc.enable_http_proxy", 0),
        # A rebuilt channel must not inherit the back-off of the one it replaces.
        ("grpc.use_local_subchannel_pool", 1),
        # A server that is back must be found well within 5 s: the wait of the channel and that of
        # `RetryConfig.longest_wait_s` may come one after the other.
        ("grpc.initial_reconnect_backoff_ms", _ms(_FIRST_RECONNECT_S)),
        ("grpc.min_reconnect_backoff_ms", _ms(_CONNECT_ATTEMPT_S)),
        ("grpc.max_reconnect_backoff_ms", _ms(_LONGEST_RECONNECT_S)),
    )
