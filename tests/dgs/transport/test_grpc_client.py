from __future__ import annotations

import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from random import Random

import grpc
import pytest

from dgs.config import RetryConfig
from dgs.errors import ConfigError, ServerUnavailableError, TooLargeError
from dgs.transport import Method, RetryingTransport
from dgs.transport.grpc_client import GrpcTransport
from dgs.transport.grpc_server import GrpcServerHandle, serve_handler
from dgs.transport.options import CONTROL_LIMIT_BYTES
from tests.helpers.echo import EchoHandler

TIMEOUT_S = 20.0


@pytest.fixture
def refusing() -> Iterator[str]:
    """An address that is taken, so nobody else gets it, and refuses connections."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture
def silent() -> Iterator[str]:
    """An address that accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("method", [Method.STATUS, Method.EXCHANGE])
def test_a_refused_connection_is_told_with_the_address(refusing: str, method: Method) -> None:
    transport = GrpcTransport(refusing)
    with pytest.raises(ServerUnavailableError, match=f"{refusing}: connection refused") as caught:
        transport.call(method, b"", timeout_s=TIMEOUT_S)
    transport.close()
    assert "grpc._channel" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("method", [Method.STATUS, Method.EXCHANGE])
def test_a_silent_server_is_told_when_the_deadline_passes(silent: str, method: Method) -> None:
    transport = GrpcTransport(silent)
    with pytest.raises(ServerUnavailableError, match=rf"{silent}: no reply within 0\.2 s"):
        transport.call(method, bytes(3 << 20), timeout_s=0.2)
    transport.close()


@pytest.mark.parametrize("host", ["nosuch-host.invalid", "unix"])
def test_a_name_that_does_not_resolve_is_unavailable_within_the_deadline(host: str) -> None:
    transport = GrpcTransport(f"{host}:7070")
    with pytest.raises(ServerUnavailableError, match=rf"{host}:7070: (the name|no reply)"):
        transport.call(Method.STATUS, b"", timeout_s=2.0)
    transport.close()


def test_a_malformed_address_is_refused_before_anything_is_opened() -> None:
    with pytest.raises(ConfigError, match="'localhost'"):
        GrpcTransport("localhost")


def test_another_service_at_the_address_is_a_configuration_error() -> None:
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        transport = GrpcTransport(f"127.0.0.1:{port}")
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port} answers, but not as"):
            transport.call(Method.EXCHANGE, b"", timeout_s=TIMEOUT_S)
        transport.close()
        server.stop(None).wait()


def test_a_reply_above_the_limit_is_refused_and_the_connection_stays_usable(
    server: GrpcServerHandle,
) -> None:
    transport = GrpcTransport(server.address, max_reply_bytes=1000)
    text = "the reply of PullModel exceeds the limit of 1000 bytes"
    with pytest.raises(TooLargeError, match=text) as caught:
        transport.call(Method.PULL_MODEL, b"reply:50000000", timeout_s=600.0)
    assert transport.call(Method.PULL_MODEL, b"reply:1000", timeout_s=TIMEOUT_S)[:3] == b"\0\1\2"
    with ThreadPoolExecutor(1) as pool:  # the server is not left sending what nobody reads
        pool.submit(server.stop, 600.0).result(TIMEOUT_S)
    assert caught.tb is not None
    transport.close()


@pytest.mark.parametrize("request_", [bytes(CONTROL_LIMIT_BYTES + 1), b"reply:9000000"])
def test_a_control_message_above_the_limit_is_refused_either_way(
    client: GrpcTransport, handler: EchoHandler, request_: bytes
) -> None:
    handler.limit_bytes = 100 << 20
    with pytest.raises(TooLargeError):
        client.call(Method.JOIN, request_, timeout_s=TIMEOUT_S)
    assert client.call(Method.JOIN, b"ok", timeout_s=TIMEOUT_S) == b"ok"


def test_closing_ends_a_call_in_progress(client: GrpcTransport, handler: EchoHandler) -> None:
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(client.call, Method.EXCHANGE, b"block", timeout_s=TIMEOUT_S)
        assert handler.entered.wait(TIMEOUT_S)
        client.close()
        with pytest.raises(ServerUnavailableError, match="closed"):
            pending.result(TIMEOUT_S)
        handler.leave.set()


def test_after_several_failures_the_connection_is_opened_afresh_without_back_off(
    handler: EchoHandler,
) -> None:
    with serve_handler(handler, "127.0.0.1:0") as gone:
        address = gone.address
    transport = GrpcTransport(address)
    for _ in range(3):
        with pytest.raises(ServerUnavailableError):
            transport.call(Method.STATUS, b"", timeout_s=TIMEOUT_S)
    with serve_handler(handler, address):
        assert transport.call(Method.STATUS, b"back", timeout_s=TIMEOUT_S) == b"back"
        transport.close()


@pytest.mark.parametrize("method", [Method.STATUS, Method.EXCHANGE])
def test_a_restarted_server_is_found_again_within_the_budget(
    handler: EchoHandler, method: Method
) -> None:
    first = serve_handler(handler, "127.0.0.1:0")
    inner = GrpcTransport(first.address)
    config = RetryConfig(first_wait_s=0.01, longest_wait_s=0.1)
    transport = RetryingTransport(inner, config, random=Random(0))
    assert transport.call(method, b"before", timeout_s=TIMEOUT_S) == b"before"
    first.stop(0.0)
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(transport.call, method, b"after", timeout_s=TIMEOUT_S)
        with serve_handler(handler, first.address):
            assert pending.result(TIMEOUT_S) == b"after"
            transport.close()


def test_an_attempt_that_reached_nobody_brings_no_reply_bytes(refusing: str) -> None:
    transport = GrpcTransport(refusing)
    with pytest.raises(ServerUnavailableError):
        transport.call(Method.EXCHANGE, b"12345", timeout_s=TIMEOUT_S)
    assert sum(transport.traffic.down_bytes.values()) == 0
    transport.close()


FORKING = """
import gc, os, sys
from dgs.errors import ForkError
from dgs.transport import Method
from dgs.transport.grpc_client import GrpcTransport

transport = GrpcTransport(sys.argv[1])
assert transport.call(Method.EXCHANGE, b"before", timeout_s=10.0) == b"before"
pid = os.fork()
if pid == 0:
    code = 3
    try:
        transport.call(Method.EXCHANGE, b"child", timeout_s=10.0)
    except ForkError as error:
        code = 0 if "spawn" in str(error) else 4
    transport.close()
    del transport
    gc.collect()
    os._exit(code)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert transport.call(Method.EXCHANGE, b"after", timeout_s=10.0) == b"after"
transport.close()
print("done")
"""


def test_a_forked_child_gets_a_clear_error_and_the_parents_connection_goes_on(
    server: GrpcServerHandle, handler: EchoHandler
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKING, server.address],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "done\n", done.stderr
    assert [request for _, request in handler.calls] == [b"before", b"after"]


GOAWAY = """
import sys
from dgs.config import RetryConfig
from dgs.errors import ServerUnavailableError
from dgs.transport import Method
from dgs.transport.connect import connect

[transport] = connect(sys.argv[1], RetryConfig())
try:
    transport.call(Method.STATUS, b"", timeout_s=0.5)
except ServerUnavailableError as error:
    print(error)
transport.close()
"""


def frame(kind: int, payload: bytes = b"") -> bytes:
    """Return an HTTP/2 frame of stream 0."""
    return len(payload).to_bytes(3, "big") + bytes((kind, 0)) + bytes(4) + payload


def test_what_grpc_logs_itself_stays_off_the_terminal() -> None:
    settings, goaway = 4, 7
    calm = frame(goaway, bytes(4) + (11).to_bytes(4, "big") + b"too_many_pings")
    environ = {k: v for k, v in os.environ.items() if k != "GRPC_VERBOSITY"}
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        listener.settimeout(TIMEOUT_S)

        def turn_away() -> None:
            for _ in range(2):
                connection, _ = listener.accept()
                with connection:
                    connection.sendall(frame(settings))
                    connection.recv(1 << 16)
                    connection.sendall(calm)
                    connection.recv(1 << 16)

        turned_away = pool.submit(turn_away)
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        done = subprocess.run(
            [sys.executable, "-c", GOAWAY, address],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env=environ,
            check=True,
        )
        turned_away.cancel()
    assert "gave up on server" in done.stdout
    assert "chttp2" not in done.stderr, done.stderr
    assert "oaway" not in done.stderr, done.stderr
