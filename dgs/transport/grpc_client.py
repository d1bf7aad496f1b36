"""The way to a server shard over gRPC, as a worker uses it.

Control messages are unary calls of bytes. A streamed request that fits one chunk is sent without a
request stream: on the wire the two are the same, and gRPC then needs no thread to feed the call.
Status codes of the network become `ServerUnavailableError`, in plain words; what the server raised
comes back as the same class, by the reason in the trailing metadata.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator

import grpc

from dgs.errors import (
    ConfigError,
    DgsError,
    ForkError,
    ServerUnavailableError,
    TooLargeError,
    error_from_wire,
)
from dgs.security import ClientSecurity
from dgs.transport.address import UnresolvedNameError, join_address, split_address
from dgs.transport.base import Method, Traffic
from dgs.transport.chunks import CHUNK_BYTES, assemble, split, wrap
from dgs.transport.grpc_credentials import Credentials
from dgs.transport.handshake import diagnose
from dgs.transport.options import KEEPALIVES, Keepalive, client_options

__all__ = ["GrpcTransport"]

_LOG = logging.getLogger("dgs.transport")
_SERVICE = "/dgs.v1.ParameterServer/"
_REASON_KEY = "dgs-reason"
_REBUILD_AFTER = 3
_LARGEST_REPLY_BYTES = 16 << 30
_UNRESOLVED = "the name does not resolve"
_PLAIN_CAUSES = ("Connection refused", "resol", "unreachable", "No route", "timed out", "not found")
"""In what gRPC says of connections that failed before any handshake."""


class GrpcTransport:
    """Reach one server shard over gRPC.

    The connection opens with the first call. After several failures in a row it is opened afresh,
    because a gRPC channel may take long to notice that a server is back.
    """

    def __init__(
        self,
        address: str,
        *,
        max_reply_bytes: int = _LARGEST_REPLY_BYTES,
        keepalive: Keepalive = KEEPALIVES["steady"],
        security: ClientSecurity | None = None,
    ) -> None:
        """Name the server; nothing is opened yet.

        Args:
            address: ``HOST:PORT``.
            max_reply_bytes: most bytes of a reply; a longer one raises `TooLargeError`.
            keepalive: how soon a link that was silently cut is noticed.
            security: certificates and token; None for plaintext.

        Raises:
            ConfigError: the address is not HOST:PORT, or a file of `security` is missing or wrong.
        """
        self._address = join_address(*split_address(address))
        self._credentials = Credentials(self._address, security or ClientSecurity())
        self._max_reply_bytes = max_reply_bytes
        self._options = client_options(keepalive)
        self._traffic = Traffic()
        self._lock = threading.Lock()
        self._channel: grpc.Channel | None = None
        self._pid = 0
        self._failures = 0
        self._reached = False
        self._closed = False

    @property
    def address(self) -> str:
        """Return the server's address."""
        return self._address

    @property
    def traffic(self) -> Traffic:
        """Return the running count; a call that broke off counts what gRPC had taken of it."""
        return self._traffic

    def call(self, method: Method, request: bytes, *, timeout_s: float) -> bytes:
        """Carry one request and return the reply; see `Transport.call`.

        Raises:
            ConfigError: something answers at the address, but not this service.
            TooLargeError: the reply, or a control request, exceeds its limit.
            UnauthenticatedError: one side does not accept what the other shows of itself.
            ForbiddenError: the server knows this client, which may not do this.
        """
        channel = self._open_channel()
        try:
            if method.streamed:
                reply = self._call_streamed(channel, method, request, timeout_s)
            else:
                reply = self._call_unary(channel, method, request, timeout_s)
        except grpc.RpcError as error:
            # The error's many lines are gRPC's own words for what the raised one says in one.
            _LOG.debug("%s %s: %s", self._address, method.value, error)
            raise self._translate(channel, error, timeout_s) from None
        except DgsError:
            raise
        except ValueError as error:
            # gRPC's word for a channel that another thread has closed meanwhile.
            raise ServerUnavailableError(f"{self._address}: the connection was closed") from error
        with self._lock:
            self._failures = 0
            self._reached = True
            self._traffic.down_bytes[method] += len(reply)
        return reply

    def close(self) -> None:
        """Close the connection, ending calls in progress; later calls raise."""
        if self._forked():
            # The child of a fork must not touch gRPC; the parent's connection stays as it is.
            self._closed = True
            return
        with self._lock:
            self._closed = True
            channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def _forked(self) -> bool:
        return self._pid not in (0, os.getpid())

    def _open_channel(self) -> grpc.Channel:
        # Checked before the lock, which a thread of the parent may have held at the fork.
        if self._forked():
            raise ForkError(
                f"the connection to {self._address} was opened in process {self._pid} and used in "
                f"its forked child {os.getpid()}: create the optimizer in the child, or start "
                "processes with the 'spawn' or 'forkserver' method (DataLoader workers that do not "
                "touch the optimizer are fine)"
            )
        with self._lock:
            if self._closed:
                raise ServerUnavailableError(f"the connection to {self._address} is closed")
            if self._channel is None:
                # The scheme keeps gRPC from reading a host such as "unix" as something else.
                target = f"dns:///{self._address}"
                self._channel = self._credentials.channel(target, self._options)
                self._pid = os.getpid()
            return self._channel

    def _call_unary(
        self, channel: grpc.Channel, method: Method, request: bytes, timeout_s: float
    ) -> bytes:
        self._count_up(method, len(request))
        metadata = self._credentials.metadata()
        return channel.unary_unary(_SERVICE + method.value)(
            request, timeout=timeout_s, metadata=metadata
        )

    def _call_streamed(
        self, channel: grpc.Channel, method: Method, request: bytes, timeout_s: float
    ) -> bytes:
        path, metadata = _SERVICE + method.value, self._credentials.metadata()
        if len(request) <= CHUNK_BYTES:
            self._count_up(method, len(request))
            replies = channel.unary_stream(path)(
                wrap(request), timeout=timeout_s, metadata=metadata
            )
        else:
            chunks = self._counted(method, request)
            replies = channel.stream_stream(path)(chunks, timeout=timeout_s, metadata=metadata)
        try:
            return assemble(replies, self._max_reply_bytes, f"the reply of {method.value}")
        except BaseException:
            replies.cancel()
            raise

    def _counted(self, method: Method, request: bytes) -> Iterator[bytes]:
        left = len(request)
        for chunk in split(request):
            taken = min(left, CHUNK_BYTES)
            self._count_up(method, taken)
            left -= taken
            yield chunk

    def _count_up(self, method: Method, count_bytes: int) -> None:
        with self._lock:
            self._traffic.up_bytes[method] += count_bytes

    def _translate(self, channel: grpc.Channel, error: grpc.RpcError, timeout_s: float) -> DgsError:
        reason = dict(error.trailing_metadata() or ()).get(_REASON_KEY)
        if reason is not None:
            with self._lock:
                self._failures = 0
                self._reached = True
            return error_from_wire(reason, error.details() or "")
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            lasting = self._count_failure(channel)
            if self._is_in_doubt(error.details() or "", lasting):
                verdict = diagnose(self._address, self._credentials.security, timeout_s)
                if verdict is not None:
                    return verdict
        return _network_error(self._address, error.code(), error.details() or "", timeout_s)

    def _is_in_doubt(self, details: str, lasting: bool) -> bool:
        """Whether a failed connection may be one that time does not mend.

        A server that has been reached in plaintext is not asked each time it goes away.
        """
        if self._credentials.security.tls:
            return not any(sign in details for sign in _PLAIN_CAUSES)
        return (lasting or not self._reached) and "closed" in details

    def _count_failure(self, failed: grpc.Channel) -> bool:
        """Open the connection afresh after several failures, or if the certificates have changed.

        Returns:
            Whether there have been several.
        """
        changed = self._credentials.refresh()
        with self._lock:
            self._failures += 1
            lasting = self._failures >= _REBUILD_AFTER
            if not (lasting or changed) or self._channel is not failed:
                return False
            self._failures = 0
            stale, self._channel = self._channel, None
        stale.close()
        return lasting


def _network_error(address: str, code: grpc.StatusCode, details: str, timeout_s: float) -> DgsError:
    """Say in plain words why a call failed that the server did not answer itself."""
    codes = grpc.StatusCode
    if code is codes.RESOURCE_EXHAUSTED and "larger than max" in details:
        return TooLargeError(f"{address}: {details}")
    if code in (codes.UNIMPLEMENTED, codes.UNAUTHENTICATED, codes.PERMISSION_DENIED):
        return ConfigError(
            f"{address} answers, but not as a parameter server of this version "
            f"({code.name}: {details}): check the address, and that both sides run the same release"
        )
    words = _cause(code, details, timeout_s)
    failure = UnresolvedNameError if words == _UNRESOLVED else ServerUnavailableError
    return failure(f"{address}: {words}")


def _cause(code: grpc.StatusCode, details: str, timeout_s: float) -> str:
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"no reply within {timeout_s:g} s"
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return f"the server is busy ({details})"
    if code is grpc.StatusCode.CANCELLED:
        return "the call was cancelled (the connection was closed, or the request took too long)"
    for sign, words in (
        ("Connection refused", "connection refused (is the server running?)"),
        ("DNS resolution failed", _UNRESOLVED),
        ("Domain name not found", _UNRESOLVED),
        ("errors resolving", _UNRESOLVED),
        ("Network is unreachable", "the network is unreachable"),
        ("No route to host", "no route to the host"),
        ("Connection timed out", "the host does not answer"),
        ("ping timeout", "the connection fell silent"),
        ("Connection reset", "the connection broke"),
        ("Socket closed", "the connection broke"),
        ("GOAWAY", "the server closed the connection"),
    ):
        if sign in details:
            return words
    return f"the connection failed ({details or code.name})"
