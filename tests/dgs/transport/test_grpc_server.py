from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from time import monotonic

import grpc
import pytest

from dgs.errors import AddressInUseError, ConfigError, InternalError, ServerUnavailableError
from dgs.security import ServerSecurity
from dgs.transport import GuardedHandler, Method
from dgs.transport.chunks import wrap
from dgs.transport.grpc_client import GrpcTransport
from dgs.transport.grpc_server import GrpcServerHandle, serve_handler
from dgs.transport.stalls import StallGuard
from tests.dgs.transport.test_chunks import BAD_CHUNKS
from tests.helpers.echo import SECRET, EchoHandler

TIMEOUT_S = 20.0
EXCHANGE = "/dgs.v1.ParameterServer/Exchange"


@pytest.fixture
def raw(server: GrpcServerHandle) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as channel:
        yield channel


def exchange(channel: grpc.Channel, chunks: list[bytes]) -> list[bytes]:
    return list(channel.stream_stream(EXCHANGE)(iter(chunks), timeout=TIMEOUT_S))


@pytest.mark.parametrize(
    "chunks",
    [*([bad] for bad in BAD_CHUNKS.values()), [], [b"", b""], [wrap(b"a"), b""]],
    ids=[*BAD_CHUNKS, "no chunk", "two empty chunks", "an empty chunk behind"],
)
def test_a_malformed_stream_is_an_invalid_argument_and_never_reaches_the_handler(
    raw: grpc.Channel, handler: EchoHandler, chunks: list[bytes]
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        exchange(raw, chunks)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert dict(caught.value.trailing_metadata())["dgs-reason"] == "malformed"
    assert handler.calls == []
    assert exchange(raw, [wrap(b"still here")]) == [wrap(b"still here")]


@pytest.mark.parametrize("order", [b"crash", b"exit"])
def test_no_exception_leaks_its_text_or_ends_the_server(
    raw: grpc.Channel, client: GrpcTransport, order: bytes
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        exchange(raw, [wrap(order)])
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert SECRET not in str(caught.value)
    with pytest.raises(InternalError, match="incident"):
        client.call(Method.STATUS, order, timeout_s=TIMEOUT_S)
    assert client.call(Method.STATUS, b"alive", timeout_s=TIMEOUT_S) == b"alive"


def test_two_servers_cannot_share_a_port(server: GrpcServerHandle) -> None:
    with pytest.raises(AddressInUseError, match=f"{server.address}.*take another port"):
        serve_handler(EchoHandler(), server.address)


def test_a_port_that_another_program_listens_on_is_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(AddressInUseError, match=address):
            serve_handler(EchoHandler(), address)


@pytest.mark.parametrize("address", ["192.0.2.1:0", "nosuch-host.invalid:0", "127.0.0.1"])
def test_an_address_that_cannot_be_listened_on_is_a_configuration_error(address: str) -> None:
    with pytest.raises(ConfigError, match=address.removesuffix(":0")):
        serve_handler(EchoHandler(), address)


@pytest.mark.parametrize(
    ("listen", "reach"),
    [("0.0.0.0:0", "127.0.0.2"), ("localhost:0", "localhost"), ("[::1]:0", "[::1]")],
)
def test_it_listens_on_other_addresses_than_the_loopback(listen: str, reach: str) -> None:
    try:
        handle = serve_handler(EchoHandler(), listen, security=ServerSecurity(insecure=True))
    except ConfigError as error:
        pytest.skip(str(error))
    with handle:
        port = handle.address.rpartition(":")[2]
        transport = GrpcTransport(f"{reach}:{port}")
        assert transport.call(Method.EXCHANGE, b"x", timeout_s=TIMEOUT_S) == b"x"
        transport.close()


def test_stopping_lets_a_call_in_progress_end_and_refuses_new_ones(
    server: GrpcServerHandle, client: GrpcTransport, handler: EchoHandler
) -> None:
    assert not server.wait(0.0)
    with ThreadPoolExecutor(2) as pool:
        pending = pool.submit(client.call, Method.EXCHANGE, b"block", timeout_s=TIMEOUT_S)
        assert handler.entered.wait(TIMEOUT_S)
        stopping = pool.submit(server.stop, TIMEOUT_S)
        late = GrpcTransport(server.address)
        refused = ""
        until = monotonic() + TIMEOUT_S
        while not refused or "no reply" in refused:
            assert monotonic() < until
            with pytest.raises(ServerUnavailableError) as caught:
                late.call(Method.STATUS, b"", timeout_s=0.05)
            refused = str(caught.value)
        handler.leave.set()
        assert pending.result(TIMEOUT_S) == b"block"
        stopping.result(TIMEOUT_S)
        late.close()
    assert server.wait(TIMEOUT_S)


def test_when_stop_returns_the_handler_is_not_being_called(
    server: GrpcServerHandle, client: GrpcTransport, handler: EchoHandler
) -> None:
    with ThreadPoolExecutor(2) as pool:
        pending = pool.submit(client.call, Method.EXCHANGE, b"block", timeout_s=TIMEOUT_S)
        assert handler.entered.wait(TIMEOUT_S)
        stopping = pool.submit(server.stop, 0.0)
        with pytest.raises(ServerUnavailableError):
            pending.result(TIMEOUT_S)
        assert not stopping.done()
        handler.leave.set()
        stopping.result(TIMEOUT_S)
    server.stop()


class WatchingGuard(GuardedHandler):
    """A guard that keeps, for each request, the question whether its caller still waits."""

    def __init__(self, handler: EchoHandler) -> None:
        super().__init__(handler)
        self.wanted: dict[bytes, Callable[[], bool]] = {}

    def handle(
        self,
        method: str,
        request: bytes,
        wanted: Callable[[], bool] = lambda: True,
        admit: Callable[[str, bytes], None] = lambda method, request: None,
    ) -> bytes:
        self.wanted[request] = wanted
        return super().handle(method, request, wanted, admit)


def test_a_call_whose_caller_has_gone_is_not_carried_out(handler: EchoHandler) -> None:
    guard = WatchingGuard(handler)
    with serve_handler(guard, "127.0.0.1:0") as server, ThreadPoolExecutor(1) as pool:
        transport = GrpcTransport(server.address)
        first = pool.submit(transport.call, Method.EXCHANGE, b"block", timeout_s=TIMEOUT_S)
        assert handler.entered.wait(TIMEOUT_S)
        with pytest.raises(ServerUnavailableError, match="no reply within"):
            transport.call(Method.EXCHANGE, b"given up", timeout_s=0.2)
        until = monotonic() + TIMEOUT_S
        while guard.wanted.get(b"given up", lambda: False)():
            assert monotonic() < until
        handler.leave.set()
        first.result(TIMEOUT_S)
        transport.call(Method.EXCHANGE, b"next", timeout_s=TIMEOUT_S)
        transport.close()
    assert [request for _, request in handler.calls] == [b"block", b"next"]


def test_calls_beyond_the_limit_are_told_to_come_again(handler: EchoHandler) -> None:
    with (
        serve_handler(handler, "127.0.0.1:0", max_concurrent_calls=1) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        transport = GrpcTransport(server.address)
        first = pool.submit(transport.call, Method.EXCHANGE, b"block", timeout_s=TIMEOUT_S)
        assert handler.entered.wait(TIMEOUT_S)
        with pytest.raises(ServerUnavailableError, match="the server is busy"):
            transport.call(Method.PULL_MODEL, b"", timeout_s=TIMEOUT_S)
        handler.leave.set()
        assert first.result(TIMEOUT_S) == b"block"
        transport.close()


def test_an_upload_that_never_ends_is_cancelled_and_frees_its_thread(handler: EchoHandler) -> None:
    never = Event()

    def endless() -> Iterator[bytes]:
        yield wrap(b"a beginning")
        never.wait(TIMEOUT_S)

    with serve_handler(handler, "127.0.0.1:0", max_workers_threads=1, upload_limit_s=0.2) as server:
        with grpc.insecure_channel(server.address) as channel:
            stalled = channel.stream_stream(EXCHANGE)(endless(), timeout=TIMEOUT_S)
            with pytest.raises(grpc.RpcError) as caught:
                next(stalled)
            assert caught.value.code() is grpc.StatusCode.CANCELLED
            assert exchange(channel, [wrap(b"next")]) == [wrap(b"next")]
        never.set()
    assert handler.calls == [("Exchange", b"next")]


class Cancellable:
    """What the stall guard sees of a call."""

    def __init__(self) -> None:
        self.cancelled = Event()

    def cancel(self) -> None:
        self.cancelled.set()


def test_a_stream_cut_for_its_slowness_is_refused_even_if_it_looks_complete() -> None:
    guard = StallGuard(0.01)
    call = Cancellable()
    with pytest.raises(ServerUnavailableError, match="stood still"), guard.upload(call, 600.0):
        assert call.cancelled.wait(TIMEOUT_S)
    guard.stop()


def test_a_stream_that_moves_is_cut_when_it_takes_too_long_in_all() -> None:
    guard = StallGuard(0.1)
    call = Cancellable()

    def move_until_cut() -> None:
        with guard.upload(call, 0.2) as watched:
            while not call.cancelled.wait(0.005):
                watched.moved()

    with pytest.raises(ServerUnavailableError, match=r"longer than 0\.2 s"):
        move_until_cut()
    guard.stop()
