"""The service's methods as gRPC calls them: from its streams to the guard, and back.

All methods are registered as streams both ways, which on the wire a unary call is too: gRPC would
wait for the request of a unary method by itself, without a limit, in one of the threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NoReturn

import grpc

from dgs.errors import DgsError, MalformedError, ServerUnavailableError, TooLargeError
from dgs.transport.admission import InFlight
from dgs.transport.base import Method
from dgs.transport.chunks import assemble, split
from dgs.transport.gate import Caller
from dgs.transport.grpc_door import Door
from dgs.transport.guard import GuardedHandler, defect
from dgs.transport.options import CONTROL_LIMIT_BYTES
from dgs.transport.stalls import StallGuard

__all__ = ["SERVICE", "CountingPool", "Shell", "only_message", "reserve"]

SERVICE = "dgs.v1.ParameterServer"
_REASON_KEY = "dgs-reason"
_CONTROL_THREADS = 8
_REFUSING_THREADS = 2


class CountingPool(ThreadPoolExecutor):
    """Threads that know how many calls they have taken and not ended."""

    def __init__(self, threads: int, name: str) -> None:
        """Start without a thread."""
        super().__init__(threads, thread_name_prefix=name)
        self._count = threading.Lock()
        self._pending = 0

    @property
    def pending(self) -> int:
        """Return how many calls are being served or wait for a thread."""
        return self._pending

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Take one call."""
        future = super().submit(fn, *args, **kwargs)
        with self._count:
            self._pending += 1
        future.add_done_callback(self._ended)
        return future

    def _ended(self, _: Future[Any]) -> None:
        with self._count:
            self._pending -= 1


def reserve(behaviour: Callable[..., Any], pool: ThreadPoolExecutor) -> None:
    """Let gRPC call a method's behaviour in a pool of its own, whatever the others do."""
    behaviour.experimental_thread_pool = pool  # type: ignore[attr-defined]


def only_message(messages: Iterator[bytes], what: str) -> bytes:
    """Return the one message of a stream.

    Raises:
        MalformedError: there is none, or another one.
    """
    first = next(messages, None)
    if first is None or next(messages, None) is not None:
        raise MalformedError(f"{what} is not exactly one message")
    return first


class Shell(grpc.GenericRpcHandler):
    """Carry requests from gRPC to the guard, and replies and errors back.

    Args:
        guard: answers the requests.
        stalls: cuts calls that stand still.
        in_flight: bounds the bytes of streamed requests.
        door: tells who calls, and turns away who may not.
        threads: streamed requests that can arrive at the same time.
        most_calls: calls of either sort taken at a time; further ones are put off.
        upload_limit_s: seconds within which a request must have arrived whole.
    """

    def __init__(
        self,
        guard: GuardedHandler,
        stalls: StallGuard,
        in_flight: InFlight,
        door: Door,
        *,
        threads: int,
        most_calls: int,
        upload_limit_s: float,
    ) -> None:
        self._guard = guard
        self._stalls = stalls
        self._in_flight = in_flight
        self._door = door
        self._most_calls = most_calls
        self._upload_limit_s = upload_limit_s
        self._streamed = CountingPool(threads, "dgs-rpc")
        # uploads that take all of the others' threads must hold up neither short calls nor refusals
        self._control = CountingPool(_CONTROL_THREADS, "dgs-control")
        self._refusing = CountingPool(_REFUSING_THREADS, "dgs-refuse")
        self._refuse = self._refusal()
        self._methods = {f"/{SERVICE}/{m.value}": (self._handler(m), self._pool(m)) for m in Method}

    @property
    def pools(self) -> tuple[CountingPool, ...]:
        """Return the threads, to be shut down in the end; the first are for the gRPC server."""
        return self._streamed, self._control, self._refusing

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """Return what serves a call; gRPC asks for each, in the one thread that takes them all."""
        handler, pool = self._methods.get(details.method, (None, self._refusing))
        busy = handler is not None and pool.pending >= self._most_calls
        return self._refuse if busy else handler

    def _pool(self, method: Method) -> CountingPool:
        return self._streamed if method.streamed else self._control

    def _handler(self, method: Method) -> grpc.RpcMethodHandler:
        def serve(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            answer = self._answer_streamed if method.streamed else self._answer_unary
            try:
                caller = self._door.identify(context)  # before anything of the request is read
                reply = answer(method.value, messages, context, caller)
            except DgsError as error:
                _abort(context, error)
            except grpc.RpcError:
                what = f"the request of {method.value} did not arrive whole"
                _abort(context, ServerUnavailableError(what))
            except BaseException:  # a thread that dies would leave its call open for ever
                _abort(context, defect(method.value))
            return self._sent(context, split(reply) if method.streamed else iter((reply,)))

        reserve(serve, self._pool(method))
        return grpc.stream_stream_rpc_method_handler(serve)

    def _refusal(self) -> grpc.RpcMethodHandler:
        def refuse(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            what = f"the server is busy: {self._most_calls} calls are in progress"
            _abort(context, ServerUnavailableError(what))

        reserve(refuse, self._refusing)
        return grpc.stream_stream_rpc_method_handler(refuse)

    def _answer_unary(
        self,
        method: str,
        messages: Iterator[bytes],
        context: grpc.ServicerContext,
        caller: Caller,
    ) -> bytes:
        with self._stalls.upload(context, self._upload_limit_s):
            request = only_message(messages, f"the request of {method}")
        admit = partial(self._door.admit, caller)
        reply = self._guard.handle(method, request, context.is_active, admit)
        if len(reply) > CONTROL_LIMIT_BYTES:
            raise TooLargeError(f"the reply of {method} exceeds {CONTROL_LIMIT_BYTES} bytes")
        return reply

    def _answer_streamed(
        self,
        method: str,
        chunks: Iterator[bytes],
        context: grpc.ServicerContext,
        caller: Caller,
    ) -> bytes:
        limit_bytes = self._guard.max_request_bytes(method)
        with self._in_flight.request() as arrival:

            def read() -> bytes:
                with self._stalls.upload(context, self._upload_limit_s) as watched:

                    def counted() -> Iterator[bytes]:
                        for chunk in chunks:
                            watched.moved()
                            arrival.add(len(chunk))
                            yield chunk

                    # A client that breaks off can make its request look complete; the frame inside
                    # has its own length and checksum, so the handler refuses such a piece.
                    request = assemble(counted(), limit_bytes, f"the request of {method}")
                arrival.complete()
                return request

            admit = partial(self._door.admit, caller)
            return self._guard.handle(method, read(), context.is_active, admit)

    def _sent(self, context: grpc.ServicerContext, messages: Iterator[bytes]) -> Iterator[bytes]:
        """Yield what is sent; gRPC comes for more when it has passed on what it got."""
        watched = self._stalls.begin(context)
        try:
            for message in messages:
                yield message
                watched.moved()
        finally:
            watched.end()


def _abort(context: grpc.ServicerContext, error: DgsError) -> NoReturn:
    context.set_trailing_metadata(((_REASON_KEY, error.reason),))
    context.abort(grpc.StatusCode[error.code], str(error))
    raise AssertionError("abort returned")
