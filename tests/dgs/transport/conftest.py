"""Servers and transports of these tests; every port is the system's choice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random

import pytest

from dgs.config import RetryConfig
from dgs.transport import LocalTransport, RetryingTransport, Transport
from dgs.transport.grpc_client import GrpcTransport
from dgs.transport.grpc_server import GrpcServerHandle, serve_handler
from tests.helpers.echo import EchoHandler


@dataclass
class VirtualTime:
    """A clock that only waiting moves."""

    now_s: float = 0.0
    waits: list[float] = field(default_factory=list)

    def clock(self) -> float:
        return self.now_s

    def wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now_s += seconds


@dataclass
class Subject:
    """A transport under test and the handler at its far end."""

    transport: Transport
    handler: EchoHandler
    retrying: bool


@pytest.fixture
def handler() -> EchoHandler:
    return EchoHandler()


@pytest.fixture
def server(handler: EchoHandler) -> Iterator[GrpcServerHandle]:
    with serve_handler(handler, "127.0.0.1:0") as handle:
        yield handle


@pytest.fixture
def client(server: GrpcServerHandle) -> Iterator[GrpcTransport]:
    transport = GrpcTransport(server.address)
    yield transport
    transport.close()


@pytest.fixture(params=["local", "grpc", "retry-local", "retry-grpc"])
def subject(request: pytest.FixtureRequest, handler: EchoHandler) -> Iterator[Subject]:
    transport: Transport
    retrying, _, kind = request.param.rpartition("-")
    if kind == "local":
        transport = LocalTransport(handler)
    else:
        transport = GrpcTransport(request.getfixturevalue("server").address)
    if retrying:
        time = VirtualTime()
        transport = RetryingTransport(
            transport, RetryConfig(), random=Random(0), clock=time.clock, wait=time.wait
        )
    yield Subject(transport, handler, bool(retrying))
    transport.close()
