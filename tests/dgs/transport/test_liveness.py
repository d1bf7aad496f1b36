"""A silent link, a server that comes back, peers that stand still: nobody waits for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from random import Random

import grpc
import pytest

from dgs.config import RetryConfig
from dgs.errors import MalformedError, ServerUnavailableError
from dgs.transport import Method, RetryingTransport
from dgs.transport.chunks import wrap
from dgs.transport.connect import connect
from dgs.transport.grpc_client import GrpcTransport
from dgs.transport.grpc_server import GrpcServerHandle, serve_handler
from dgs.transport.options import Keepalive
from tests.dgs.transport.conftest import VirtualTime
from tests.dgs.transport.proxy import SilentProxy
from tests.dgs.transport.test_retry import Scripted, down, retrying
from tests.helpers.echo import EchoHandler

TIMEOUT_S = 20.0
EXCHANGE = "/dgs.v1.ParameterServer/Exchange"
STATUS = "/dgs.v1.ParameterServer/Status"


@pytest.fixture
def proxy(server: GrpcServerHandle) -> Iterator[SilentProxy]:
    proxy = SilentProxy(server.address)
    yield proxy
    proxy.close()


def test_a_link_that_falls_silent_in_mid_call_is_noticed_in_the_stated_time(
    handler: EchoHandler, proxy: SilentProxy
) -> None:
    keepalive = Keepalive(0.5, 0.5)
    transport = GrpcTransport(proxy.address, keepalive=keepalive)
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(transport.call, Method.EXCHANGE, b"block", timeout_s=TIMEOUT_S)
        assert handler.entered.wait(TIMEOUT_S)
        proxy.fall_silent()
        start_s = time.monotonic()
        with pytest.raises(ServerUnavailableError, match="fell silent"):
            pending.result(TIMEOUT_S)
        # generous, because the machine may be busy; without the option it would be a minute
        assert time.monotonic() - start_s < 4 * keepalive.notice_s
        handler.leave.set()
    transport.close()


@pytest.mark.parametrize("back_s", [0.05, 0.3, 1.0, 3.0, 8.0, 20.0, 47.3, 100.0])
@pytest.mark.parametrize("seed", range(5))
def test_the_wait_between_two_attempts_never_hides_a_server_that_is_back(
    back_s: float, seed: int
) -> None:
    clock = VirtualTime()

    def outcomes() -> Iterator[ServerUnavailableError | bytes]:
        while clock.now_s < back_s:
            yield down()
        yield b"back"

    retrying(Scripted(outcomes(), clock), clock, seed).call(Method.EXCHANGE, b"", timeout_s=300.0)
    assert clock.now_s - back_s <= 2.0


def test_a_server_that_was_away_is_found_again_soon_with_the_default_settings(
    handler: EchoHandler,
) -> None:
    first = serve_handler(handler, "127.0.0.1:0")
    (transport,) = connect(first.address, RetryConfig())
    transport.call(Method.STATUS, b"before", timeout_s=TIMEOUT_S)
    first.stop(0.0)
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(transport.call, Method.EXCHANGE, b"after", timeout_s=TIMEOUT_S)
        threading.Event().wait(1.0)  # how long the server is away
        with serve_handler(handler, first.address):
            back_s = time.monotonic()
            assert pending.result(TIMEOUT_S) == b"after"
            assert time.monotonic() - back_s < 5.0
            transport.close()


class Stalled:
    """Calls whose requests begin and never end."""

    def __init__(self, channel: grpc.Channel, count: int, path: str = EXCHANGE) -> None:
        self._never = threading.Event()
        self.begun = threading.Semaphore(0)
        self.calls = [
            channel.stream_stream(path)(self._request(), timeout=60.0) for _ in range(count)
        ]

    def _request(self) -> Iterator[bytes]:
        yield wrap(bytes(1000))
        self.begun.release()
        self._never.wait(60.0)

    def end(self) -> None:
        self._never.set()
        for call in self.calls:
            call.cancel()


def await_held(server: GrpcServerHandle, least_bytes: int) -> None:
    until_s = time.monotonic() + TIMEOUT_S
    while server.in_flight.held_bytes < least_bytes:
        assert time.monotonic() < until_s
        threading.Event().wait(0.005)


def test_a_client_that_stalls_in_its_upload_does_not_hold_up_the_others(
    server: GrpcServerHandle, client: GrpcTransport
) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stalled = Stalled(channel, 5)
        await_held(server, 5 * 1000)
        for number in range(20):
            request = b"%d" % number
            assert client.call(Method.EXCHANGE, request, timeout_s=TIMEOUT_S) == request
        stalled.end()


def test_short_calls_are_answered_while_uploads_hold_every_other_thread(
    handler: EchoHandler,
) -> None:
    with serve_handler(handler, "127.0.0.1:0", max_workers_threads=3) as server:
        transport = GrpcTransport(server.address)
        with grpc.insecure_channel(server.address) as channel:
            stalled = Stalled(channel, 3)
            await_held(server, 3 * 1000)
            assert transport.call(Method.STATUS, b"short", timeout_s=TIMEOUT_S) == b"short"
            stalled.end()
        transport.close()


@pytest.mark.parametrize("path", [EXCHANGE, STATUS])
def test_uploads_that_stand_still_are_cut_and_give_their_threads_and_bytes_back(
    handler: EchoHandler, path: str
) -> None:
    with serve_handler(handler, "127.0.0.1:0", max_workers_threads=2, stall_limit_s=0.2) as server:
        with grpc.insecure_channel(server.address) as channel:
            stalled = Stalled(channel, 9, path)
            for call in stalled.calls:
                with pytest.raises(grpc.RpcError) as caught:
                    next(call)
                assert caught.value.code() is grpc.StatusCode.CANCELLED
            stalled.end()
        transport = GrpcTransport(server.address)
        for method in (Method.EXCHANGE, Method.STATUS):
            assert transport.call(method, b"next", timeout_s=TIMEOUT_S) == b"next"
        transport.close()
        assert server.in_flight.held_bytes == 0


def test_a_slow_upload_that_moves_is_not_cut(handler: EchoHandler) -> None:
    pieces = 8

    def slow() -> Iterator[bytes]:
        for _ in range(pieces):
            yield wrap(b"x")
            threading.Event().wait(0.1)

    with (
        serve_handler(handler, "127.0.0.1:0", stall_limit_s=0.5) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        replies = list(channel.stream_stream(EXCHANGE)(slow(), timeout=TIMEOUT_S))
    assert replies == [wrap(b"x" * pieces)]


def test_a_client_that_never_reads_its_reply_is_cut_and_holds_up_nobody(
    handler: EchoHandler,
) -> None:
    with serve_handler(handler, "127.0.0.1:0", max_workers_threads=1, stall_limit_s=0.3) as server:
        transport = GrpcTransport(server.address)
        with grpc.insecure_channel(server.address) as channel:
            order = wrap(b"reply:100000000")
            unread = channel.unary_stream(EXCHANGE)(order, timeout=60.0)
            until_s = time.monotonic() + TIMEOUT_S
            while not handler.calls:
                assert time.monotonic() < until_s
                threading.Event().wait(0.005)
            # the core is free at once, and the only thread when the call has been cut
            assert transport.call(Method.STATUS, b"now", timeout_s=TIMEOUT_S) == b"now"
            assert transport.call(Method.EXCHANGE, b"next", timeout_s=TIMEOUT_S) == b"next"
            with pytest.raises(grpc.RpcError) as caught:
                list(unread)
            assert caught.value.code() is grpc.StatusCode.CANCELLED
        transport.close()


@pytest.mark.parametrize("messages", [[], [b"one", b"two"]])
def test_a_control_call_has_exactly_one_message(
    server: GrpcServerHandle, handler: EchoHandler, messages: list[bytes]
) -> None:
    with grpc.insecure_channel(server.address) as channel:
        call = channel.stream_stream(STATUS)(iter(messages), timeout=TIMEOUT_S)
        with pytest.raises(grpc.RpcError) as caught:
            next(call)
        assert dict(caught.value.trailing_metadata())["dgs-reason"] == MalformedError.reason
    assert handler.calls == []


def test_many_large_uploads_at_a_small_limit_are_all_served_and_stay_within_it() -> None:
    limit_bytes, size_bytes, clients = 8 << 20, 3 << 20, 12
    handler = EchoHandler()
    most = 0
    done = threading.Event()
    with (
        serve_handler(handler, "127.0.0.1:0", max_in_flight_bytes=limit_bytes) as server,
        ThreadPoolExecutor(clients + 1) as pool,
    ):

        def look() -> None:
            nonlocal most
            while not done.wait(0.0005):
                most = max(most, server.in_flight.held_bytes)

        def send(number: int) -> bool:
            config = RetryConfig(first_wait_s=0.02, longest_wait_s=0.2)
            transport = RetryingTransport(
                GrpcTransport(server.address), config, random=Random(number)
            )
            request = bytes([number]) * size_bytes
            try:
                return transport.call(Method.EXCHANGE, request, timeout_s=60.0) == request
            finally:
                transport.close()

        looking = pool.submit(look)
        assert all(pool.map(send, range(clients)))
        done.set()
        looking.result(TIMEOUT_S)
        assert 0 < most <= limit_bytes
        assert server.in_flight.held_bytes == 0
