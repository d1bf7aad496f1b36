"""The gRPC options of both sides, in one table.

gRPC ignores an option whose name it does not know, and keepalive settings of the two sides must fit
each other or the server drops the client ("too many pings"). So every name and every number stands
here, once, and a test looks each name up in the installed library.
"""

from __future__ import annotations

__all__ = [
    "CONTROL_LIMIT_BYTES",
    "QUIET_GRPC",
    "client_options",
    "server_options",
]

CONTROL_LIMIT_BYTES = 8 << 20
"""Most bytes of one gRPC message: a whole control message, or a chunk (which is far smaller)."""

QUIET_GRPC = ("GRPC_VERBOSITY", "NONE")
"""Environment variable, and the value with which gRPC's own log stays off the user's terminal: what
is in it ("Got goaway ...") becomes an error in plain words anyway."""

_KEEPALIVE_S = 30.0
_KEEPALIVE_TIMEOUT_S = 10.0
_SHORTEST_PING_INTERVAL_S = 10.0
_HANDSHAKE_S = 10.0
_STREAMS_PER_CONNECTION = 64
_CONNECTIONS = 4096
_METADATA_BYTES = 16 << 10
_FIRST_RECONNECT_S = 0.5
_CONNECT_ATTEMPT_S = 5.0
_LONGEST_RECONNECT_S = 5.0

_Options = tuple[tuple[str, int], ...]


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def _common() -> _Options:
    return (
        ("grpc.keepalive_time_ms", _ms(_KEEPALIVE_S)),
        ("grpc.keepalive_timeout_ms", _ms(_KEEPALIVE_TIMEOUT_S)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.max_receive_message_length", CONTROL_LIMIT_BYTES),
        ("grpc.max_send_message_length", CONTROL_LIMIT_BYTES),
        ("grpc.max_metadata_size", _METADATA_BYTES),
    )


def server_options() -> _Options:
    """Return the options of a server.

    Example:
        >>> dict(server_options())["grpc.so_reuseport"]
        0
    """
    return (
        *_common(),
        # With the default, a second server takes the same port and gets half of the calls.
        ("grpc.so_reuseport", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", _ms(_SHORTEST_PING_INTERVAL_S)),
        ("grpc.max_concurrent_streams", _STREAMS_PER_CONNECTION),
        ("grpc.max_allowed_incoming_connections", _CONNECTIONS),
        ("grpc.server_handshake_timeout_ms", _ms(_HANDSHAKE_S)),
    )


def client_options() -> _Options:
    """Return the options of a client.

    Example:
        >>> dict(client_options())["grpc.enable_retries"]
        0
    """
    return (
        *_common(),
        # Without traffic, pings go on: a silent link must be noticed while a call waits.
        ("grpc.http2.max_pings_without_data", 0),
        # gRPC's own retries stop silently above 256 KiB, so they are left out altogether.
        ("grpc.enable_retries", 0),
        # A proxy for web pages is no way to a parameter server.
        ("grpc.enable_http_proxy", 0),
        # A rebuilt channel must not inherit the back-off of the one it replaces.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.initial_reconnect_backoff_ms", _ms(_FIRST_RECONNECT_S)),
        ("grpc.min_reconnect_backoff_ms", _ms(_CONNECT_ATTEMPT_S)),
        ("grpc.max_reconnect_backoff_ms", _ms(_LONGEST_RECONNECT_S)),
    )
