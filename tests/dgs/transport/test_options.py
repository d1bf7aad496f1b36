from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc._cython import cygrpc

from dgs.transport.chunks import CHUNK_BYTES
from dgs.transport.options import CONTROL_LIMIT_BYTES, client_options, server_options

NAMES = sorted({name for name, _ in (*client_options(), *server_options())})


@pytest.fixture(scope="module")
def library() -> bytes:
    return Path(cygrpc.__file__).read_bytes()


def known(name: str, library: bytes) -> bool:
    return re.search(re.escape(name.encode()) + rb"(?![a-z0-9_.])", library) is not None


@pytest.mark.parametrize("name", NAMES)
def test_the_installed_grpc_knows_the_option(name: str, library: bytes) -> None:
    assert known(name, library)


@pytest.mark.parametrize(
    "name", ["grpc.keepalive_time", "grpc.http2.min_recv_ping_interval_without_data_ms"]
)
def test_a_wrong_name_would_be_noticed(name: str, library: bytes) -> None:
    assert not known(name, library)


def test_a_server_tolerates_the_pings_of_its_clients() -> None:
    client, server = dict(client_options()), dict(server_options())
    shortest_ms = server["grpc.http2.min_ping_interval_without_data_ms"]
    assert client["grpc.keepalive_time_ms"] >= 2 * shortest_ms


def test_the_options_of_a_server_keep_a_second_one_off_its_port() -> None:
    with ThreadPoolExecutor(1) as pool:
        first = grpc.server(pool, options=server_options())
        second = grpc.server(pool, options=server_options())
        port = first.add_insecure_port("127.0.0.1:0")
        with pytest.raises(RuntimeError, match="bind"):
            second.add_insecure_port(f"127.0.0.1:{port}")
        for server in (first, second):
            server.stop(None).wait()


def test_no_option_is_given_twice_and_a_chunk_fits_one_message() -> None:
    for options in (client_options(), server_options()):
        assert len(dict(options)) == len(options)
    assert CHUNK_BYTES + 16 < CONTROL_LIMIT_BYTES
