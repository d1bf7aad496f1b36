"""The standard health service, asked by the standard client."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dgs.transport.grpc_server import GrpcServerHandle, serve_handler
from tests.dgs.transport.test_liveness import Stalled, await_held
from tests.helpers.echo import EchoHandler

TIMEOUT_S = 20.0
SERVICE = "dgs.v1.ParameterServer"
STATES = health_pb2.HealthCheckResponse


@pytest.fixture
def channel(server: GrpcServerHandle) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as channel:
        yield channel


def check(channel: grpc.Channel, service: str = "") -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service=service)
    return int(stub.Check(request, timeout=TIMEOUT_S).status)


def watch(channel: grpc.Channel, service: str = "") -> grpc.Call:
    stub = health_pb2_grpc.HealthStub(channel)
    return stub.Watch(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT_S)


@pytest.mark.parametrize("service", ["", SERVICE])
def test_a_probe_is_told_what_was_set(
    server: GrpcServerHandle, channel: grpc.Channel, service: str
) -> None:
    assert check(channel, service) == STATES.SERVING
    server.set_serving(False)
    assert check(channel, service) == STATES.NOT_SERVING
    server.set_serving(True)
    assert check(channel, service) == STATES.SERVING


def test_an_unknown_service_is_not_found_by_a_probe_and_unknown_to_a_watcher(
    server: GrpcServerHandle, channel: grpc.Channel
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        check(channel, "nosuch")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    states = watch(channel, "nosuch")
    assert next(states).status == STATES.SERVICE_UNKNOWN
    server.stop(TIMEOUT_S)  # ends the watcher's call, not with the grace period
    assert list(states) == []


@pytest.mark.parametrize("service", ["", SERVICE])
def test_a_watcher_is_told_each_change_and_the_end(
    server: GrpcServerHandle, channel: grpc.Channel, service: str
) -> None:
    states = watch(channel, service)
    assert next(states).status == STATES.SERVING
    server.set_serving(False)
    assert next(states).status == STATES.NOT_SERVING
    server.set_serving(True)
    assert next(states).status == STATES.SERVING
    start_s = time.monotonic()
    server.stop(TIMEOUT_S)
    assert [state.status for state in states] == [STATES.NOT_SERVING]
    assert time.monotonic() - start_s < TIMEOUT_S / 2
    server.set_serving(True)


def test_probes_are_answered_while_every_request_thread_is_held_by_a_slow_upload(
    server: GrpcServerHandle, channel: grpc.Channel
) -> None:
    with grpc.insecure_channel(server.address) as other:
        stalled = Stalled(other, 40)
        await_held(server, 32 * 1000)
        assert check(channel) == STATES.SERVING
        assert next(watch(channel)).status == STATES.SERVING
        stalled.end()


def test_probes_are_answered_while_the_core_is_busy_and_calls_are_refused(
    handler: EchoHandler,
) -> None:
    with (
        serve_handler(handler, "127.0.0.1:0", max_concurrent_calls=1) as server,
        grpc.insecure_channel(server.address) as channel,
        ThreadPoolExecutor(1) as pool,
    ):
        call = channel.unary_unary(f"/{SERVICE}/Status")
        busy = pool.submit(call, b"block", timeout=TIMEOUT_S)
        assert handler.entered.wait(TIMEOUT_S)
        with pytest.raises(grpc.RpcError) as caught:
            call(b"", timeout=TIMEOUT_S)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert check(channel) == STATES.SERVING
        handler.leave.set()
        busy.result(TIMEOUT_S)


def test_many_watchers_hold_no_thread(server: GrpcServerHandle, channel: grpc.Channel) -> None:
    watchers = [watch(channel) for _ in range(50)]
    assert {next(w).status for w in watchers} == {STATES.SERVING}
    threads = sum("dgs-health" in thread.name for thread in threading.enumerate())
    assert threads <= 4
    assert check(channel) == STATES.SERVING
    server.set_serving(False)
    assert {next(w).status for w in watchers} == {STATES.NOT_SERVING}
    for watcher in watchers:
        watcher.cancel()


@pytest.mark.parametrize("request_", [b"\xff\xff", b"\x0a\x05ab"])
def test_what_is_no_probe_is_refused(channel: grpc.Channel, request_: bytes) -> None:
    for name in ("Check", "Watch"):
        call = channel.unary_stream(f"/grpc.health.v1.Health/{name}")
        with pytest.raises(grpc.RpcError) as caught:
            list(call(request_, timeout=TIMEOUT_S))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
