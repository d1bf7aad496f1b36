"""The gRPC shell around a server's core.

Every error leaves as a status code, a text and the trailing metadata `dgs-reason`; nothing else
about the server does. Requests are put together within the core's limit, and within a time limit,
by threads; the core itself is called by one of them at a time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType

import grpc

from dgs.errors import ConfigError, DgsError, ServerUnavailableError, TooLargeError
from dgs.transport.address import check_listenable, join_address, split_address
from dgs.transport.base import Method
from dgs.transport.chunks import assemble, split
from dgs.transport.guard import GuardedHandler, Handler, defect
from dgs.transport.options import CONTROL_LIMIT_BYTES, server_options

__all__ = ["GrpcServerHandle", "Handler", "serve_handler"]

_SERVICE = "dgs.v1.ParameterServer"
_REASON_KEY = "dgs-reason"


class _StallGuard:
    """Cancel calls whose request does not arrive whole in time, so that they free their thread."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._lock = threading.Lock()
        self._deadlines: dict[grpc.ServicerContext, float] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dgs-stall-guard", daemon=True)
        self._thread.start()

    @contextmanager
    def watch(self, context: grpc.ServicerContext) -> Iterator[None]:
        with self._lock:
            self._deadlines[context] = time.monotonic() + self._limit_s
        try:
            yield
        finally:
            with self._lock:
                in_time = self._deadlines.pop(context, None) is not None
        # To the reader, a stream cut by a cancellation may look like one that has ended.
        if not in_time:
            raise ServerUnavailableError(f"the request took longer than {self._limit_s:g} s")

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self._limit_s / 8):
            now = time.monotonic()
            with self._lock:
                late = [context for context, until in self._deadlines.items() if until < now]
                for context in late:
                    del self._deadlines[context]
            for context in late:
                context.cancel()


class _Shell:
    """Carry requests from gRPC to the guard, and replies and errors back."""

    def __init__(self, guard: GuardedHandler, stalls: _StallGuard) -> None:
        self._guard = guard
        self._stalls = stalls

    def handlers(self) -> grpc.GenericRpcHandler:
        """Return the service, bytes in and bytes out."""
        by_name = {
            method.value: grpc.stream_stream_rpc_method_handler(self._streamed(method.value))
            if method.streamed
            else grpc.unary_unary_rpc_method_handler(self._unary(method.value))
            for method in Method
        }
        return grpc.method_handlers_generic_handler(_SERVICE, by_name)

    def _unary(self, method: str) -> Callable[[bytes, grpc.ServicerContext], bytes]:
        def serve(request: bytes, context: grpc.ServicerContext) -> bytes:
            return self._answer(method, context, lambda: request, CONTROL_LIMIT_BYTES)

        return serve

    def _streamed(
        self, method: str
    ) -> Callable[[Iterator[bytes], grpc.ServicerContext], Iterator[bytes]]:
        def serve(chunks: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            # A client that breaks off can make its request look complete; the frame inside it has
            # its own length and checksum, so the handler refuses such a piece.
            def read() -> bytes:
                limit_bytes = self._guard.max_request_bytes(method)
                with self._stalls.watch(context):
                    return assemble(chunks, limit_bytes, f"the request of {method}")

            return split(self._answer(method, context, read, None))

        return serve

    def _answer(
        self,
        method: str,
        context: grpc.ServicerContext,
        read: Callable[[], bytes],
        reply_limit_bytes: int | None,
    ) -> bytes:
        error: DgsError
        try:
            reply = self._guard.handle(method, read(), context.is_active)
            if reply_limit_bytes is None or len(reply) <= reply_limit_bytes:
                return reply
            error = TooLargeError(f"the reply of {method} exceeds {reply_limit_bytes} bytes")
        except DgsError as raised:
            error = raised
        except grpc.RpcError:
            error = ServerUnavailableError(f"the request of {method} did not arrive whole")
        except BaseException:  # a thread of the pool that dies would leave its call open for ever
            error = defect(method)
        context.set_trailing_metadata(((_REASON_KEY, error.reason),))
        context.abort(grpc.StatusCode[error.code], str(error))
        raise AssertionError("abort returned")


class GrpcServerHandle:
    """A running server; leave its `with` block, or call `stop`, to end it."""

    def __init__(
        self,
        address: str,
        server: grpc.Server,
        pool: ThreadPoolExecutor,
        guard: GuardedHandler,
        stalls: _StallGuard,
    ) -> None:
        """Take over a started server; `serve_handler` does this."""
        self._address = address
        self._server = server
        self._pool = pool
        self._guard = guard
        self._stalls = stalls

    @property
    def address(self) -> str:
        """Return the bound ``HOST:PORT``."""
        return self._address

    def stop(self, grace_s: float = 5.0) -> None:
        """Refuse new calls, let those in progress end, free the port; repeated calls do nothing.

        When this returns, the handler is not being called and never will be again.

        Args:
            grace_s: seconds that calls in progress may take; then they are cancelled.
        """
        self._server.stop(grace_s).wait()
        self._guard.close()
        self._stalls.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until the server has stopped.

        Args:
            timeout_s: seconds to wait at most; None for as long as it takes.

        Returns:
            Whether the server has stopped.
        """
        return not self._server.wait_for_termination(timeout_s)

    def __enter__(self) -> GrpcServerHandle:
        """Return the handle."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the server."""
        self.stop()


def serve_handler(
    handler: Handler | GuardedHandler,
    address: str,
    *,
    max_workers_threads: int = 32,
    max_concurrent_calls: int = 256,
    upload_limit_s: float = 600.0,
) -> GrpcServerHandle:
    """Answer calls at an address until the returned handle is stopped.

    Args:
        handler: the server's core; only one thread at a time calls it. Give a `GuardedHandler` if
            local transports reach the same core.
        address: ``HOST:PORT`` to listen on; port 0 lets the system choose.
        max_workers_threads: requests that can arrive at the same time. A slow upload holds one
            thread, so this is more than the number of cores.
        max_concurrent_calls: calls beyond this many are told at once to try again later.
        upload_limit_s: seconds within which a streamed request must have arrived whole.

    Raises:
        ConfigError: the address is malformed, or is not one of this machine's.
        AddressInUseError: another process listens there.
    """
    host, port = split_address(address, port_zero=True)
    check_listenable(host, port)
    pool = ThreadPoolExecutor(max_workers_threads, thread_name_prefix="dgs-rpc")
    server = grpc.server(
        pool, options=server_options(), maximum_concurrent_rpcs=max_concurrent_calls
    )
    try:
        bound = server.add_insecure_port(join_address(host, port))
    except RuntimeError as error:
        pool.shutdown(wait=False)
        check_listenable(host, port)
        raise ConfigError(f"cannot listen on {address}: {error}") from error
    guard = handler if isinstance(handler, GuardedHandler) else GuardedHandler(handler)
    stalls = _StallGuard(upload_limit_s)
    server.add_generic_rpc_handlers((_Shell(guard, stalls).handlers(),))
    server.start()
    return GrpcServerHandle(join_address(host, bound), server, pool, guard, stalls)
