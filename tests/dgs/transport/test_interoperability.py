"""Any gRPC client or server generated from the .proto can take the other side."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from dgs._proto import parameter_server_pb2 as pb
from dgs._proto import parameter_server_pb2_grpc as stubs
from dgs.errors import FencedError
from dgs.transport import Method
from dgs.transport.grpc_client import GrpcTransport
from dgs.transport.grpc_server import serve_handler
from tests.helpers.echo import pattern

FRAME = pattern(3_000_000)
TIMEOUT_S = 20.0


class TypedHandler:
    """Answer control messages with typed ones, and return a frame as it came."""

    def max_request_bytes(self, method: str) -> int:
        return len(FRAME)

    def handle(self, method: str, request: bytes) -> bytes:
        if method == "Join":
            joining = pb.JoinRequest.FromString(request)
            return pb.JoinReply(
                run=joining.incarnation, initialiser=joining.worker
            ).SerializeToString()
        if method == "Leave":
            raise FencedError("a newer one is here")
        return request


def pieces(frame: bytes, size: int) -> Iterator[pb.Chunk]:
    for start in range(0, len(frame), size):
        yield pb.Chunk(data=frame[start : start + size])


def test_a_generated_client_speaks_to_this_server() -> None:
    with (
        serve_handler(TypedHandler(), "127.0.0.1:0") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = stubs.ParameterServerStub(channel)
        joined = stub.Join(pb.JoinRequest(worker="a", incarnation=7), timeout=TIMEOUT_S)
        assert (joined.run, joined.initialiser) == (7, "a")
        for method in (stub.PutModel, stub.Exchange, stub.PullModel):
            replies = method(pieces(FRAME, 70_000), timeout=TIMEOUT_S)
            assert b"".join(chunk.data for chunk in replies) == FRAME
        assert [c.data for c in stub.Exchange(iter([pb.Chunk()]), timeout=TIMEOUT_S)] == [b""]
        with pytest.raises(grpc.RpcError) as caught:
            stub.Leave(pb.LeaveRequest(), timeout=TIMEOUT_S)
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert caught.value.details() == "a newer one is here"
        assert dict(caught.value.trailing_metadata())["dgs-reason"] == "fenced"


class GeneratedServicer(stubs.ParameterServerServicer):
    """A server as another language would write it, with another size of chunk."""

    def Status(self, request: pb.StatusRequest, context: grpc.ServicerContext) -> pb.StatusReply:
        return pb.StatusReply(version=41)

    def Leave(self, request: pb.LeaveRequest, context: grpc.ServicerContext) -> pb.LeaveReply:
        context.set_trailing_metadata((("dgs-reason", "fenced"),))
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "too old")
        raise AssertionError

    def Exchange(
        self, request_iterator: Iterator[pb.Chunk], context: grpc.ServicerContext
    ) -> Iterator[pb.Chunk]:
        yield from pieces(b"".join(chunk.data for chunk in request_iterator), 70_000)


def test_this_client_speaks_to_a_generated_server() -> None:
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        stubs.add_ParameterServerServicer_to_server(GeneratedServicer(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        transport = GrpcTransport(f"127.0.0.1:{port}")
        status = transport.call(Method.STATUS, b"", timeout_s=TIMEOUT_S)
        assert pb.StatusReply.FromString(status).version == 41
        for frame in (FRAME, FRAME[:100_000]):
            assert transport.call(Method.EXCHANGE, frame, timeout_s=TIMEOUT_S) == frame
        with pytest.raises(FencedError, match="too old"):
            transport.call(Method.LEAVE, b"", timeout_s=TIMEOUT_S)
        transport.close()
        server.stop(None).wait()
