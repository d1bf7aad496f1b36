"""The standard health service, `grpc.health.v1.Health`, beside the server's own.

Probes are answered by threads of their own, so that they tell the truth while every other thread is
busy. A `Watch` holds no thread between two changes. A watcher that does not read what it is sent is
cut like any call that stands still, and meanwhile holds up neither probes nor the server: the
ready-made servicer of the package would, as it sends to one after the other under one lock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2

from dgs.errors import DgsError
from dgs.transport.grpc_shell import only_message, reserve
from dgs.transport.stalls import StallGuard

__all__ = ["HealthService"]

_THREADS = 4
_MOST_WATCHERS = 1024
_REQUEST_LIMIT_S = 10.0
_STATES = health_pb2.HealthCheckResponse

Send = Callable[[bytes | None], None]


class _Watcher:
    """Send one watcher the newest state, never the same twice in a row, from the pool's threads."""

    def __init__(
        self,
        context: grpc.ServicerContext,
        send: Send,
        stalls: StallGuard,
        pool: ThreadPoolExecutor,
    ) -> None:
        self._context = context
        self._send = send
        self._stalls = stalls
        self._pool = pool
        self._lock = threading.Lock()
        self._newest = self._sent = b""
        self._ending = False
        self._busy = False

    def tell(self, state: bytes, *, last: bool = False) -> None:
        """Send a state as soon as the one before has gone; end the call after the last one."""
        with self._lock:
            self._newest = state
            self._ending |= last
            if not self._busy:
                self._busy = True
                self._pool.submit(self._drain)

    def _drain(self) -> None:
        while True:
            with self._lock:
                state = self._newest
                news = state != self._sent
                self._sent = state
                if not news and not self._ending:
                    self._busy = False
                    return
            if not self._context.is_active():
                return
            watched = self._stalls.begin(self._context)
            try:
                self._send(state if news else None)
            finally:
                watched.end()
            if not news:
                return


class HealthService:
    """Tell whoever asks whether the server serves.

    Args:
        services: names that may be asked for, beside the empty one for the server as a whole.
        stalls: cuts calls that stand still.
    """

    def __init__(self, *services: str, stalls: StallGuard) -> None:
        """Begin as serving."""
        self._services = ("", *services)
        self._stalls = stalls
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="dgs-health")
        self._lock = threading.Lock()
        self._watchers: dict[_Watcher, bool] = {}  # and whether it asked for a known service
        self._state = _STATES.SERVING
        self._draining = False

    @property
    def serving(self) -> bool:
        """Return what probes are told."""
        return bool(self._state == _STATES.SERVING)

    def handlers(self) -> grpc.GenericRpcHandler:
        """Return the service's methods."""

        def check(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            service = self._asked_for(messages, context)
            if service not in self._services:
                context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
            return iter((_encoded(self._state),))

        def watch(messages: Iterator[bytes], context: grpc.ServicerContext, send: Send) -> None:
            service = self._asked_for(messages, context)
            self._add(_Watcher(context, send, self._stalls, self._pool), service, context)

        watch.experimental_non_blocking = True  # type: ignore[attr-defined]
        for behaviour in (check, watch):
            reserve(behaviour, self._pool)
        return grpc.method_handlers_generic_handler(
            health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
            {
                "Check": grpc.stream_stream_rpc_method_handler(check),
                "Watch": grpc.stream_stream_rpc_method_handler(watch),
            },
        )

    def set_serving(self, serving: bool) -> None:
        """Set the state, and tell the watchers; after `drain` it stays."""
        with self._lock:
            if not self._draining:
                self._state = _STATES.SERVING if serving else _STATES.NOT_SERVING
                self._tell()

    def drain(self) -> None:
        """Tell everyone for good that the server serves no more, and end the watchers' calls."""
        with self._lock:
            if not self._draining:
                self._draining = True
                self._state = _STATES.NOT_SERVING
                self._tell()

    def close(self) -> None:
        """Let the threads end."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _asked_for(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> str:
        try:
            with self._stalls.upload(context, _REQUEST_LIMIT_S):
                request = only_message(messages, "the request")
            return health_pb2.HealthCheckRequest.FromString(request).service
        except (DgsError, DecodeError):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "not a HealthCheckRequest")
            raise

    def _add(self, watcher: _Watcher, service: str, context: grpc.ServicerContext) -> None:
        def remove() -> None:
            with self._lock:
                self._watchers.pop(watcher, None)

        with self._lock:
            if len(self._watchers) >= _MOST_WATCHERS:
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many watchers")
            if context.add_callback(remove):  # else the call has ended already
                self._watchers[watcher] = service in self._services
                self._tell(watcher)

    def _tell(self, *watchers: _Watcher) -> None:
        for watcher in watchers or self._watchers:
            state = self._state if self._watchers[watcher] else _STATES.SERVICE_UNKNOWN
            watcher.tell(_encoded(state), last=self._draining)


def _encoded(state: int) -> bytes:
    return health_pb2.HealthCheckResponse(status=state).SerializeToString()
