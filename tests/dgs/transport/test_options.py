from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import grpc
import pytest
from grpc._cython import cygrpc

from dgs import config
from dgs.config import RetryConfig
from dgs.errors import ConfigError
from dgs.transport.chunks import CHUNK_BYTES
from dgs.transport.options import (
    CONTROL_LIMIT_BYTES,
    KEEPALIVES,
    client_options,
    server_options,
)

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


@pytest.mark.parametrize("name", KEEPALIVES)
def test_a_server_tolerates_the_pings_of_its_clients(name: str) -> None:
    client, server = dict(client_options(KEEPALIVES[name])), dict(server_options())
    shortest_ms = server["grpc.http2.min_ping_interval_without_data_ms"]
    assert client["grpc.keepalive_time_ms"] >= 2 * shortest_ms


@pytest.mark.parametrize(("name", "notice_s"), [("steady", 60), ("fast", 14.5)])
def test_a_silent_link_is_noticed_within_the_stated_time(name: str, notice_s: float) -> None:
    keepalive = KEEPALIVES[name]
    options = dict(client_options(keepalive))
    assert keepalive.notice_s == notice_s
    asks_ms, answers_ms = (options[f"grpc.keepalive_{what}_ms"] for what in ("time", "timeout"))
    assert asks_ms + answers_ms == 1000 * notice_s
    # gRPC gives up a ping by this timeout, not by the one whose name says so
    assert options["grpc.http2.ping_timeout_ms"] == answers_ms


def test_the_profiles_are_those_that_the_configuration_names() -> None:
    assert set(KEEPALIVES) == set(get_args(config.Keepalive))
    assert RetryConfig().keepalive == "steady"
    with pytest.raises(ConfigError, match=r"keepalive='slow'.*'steady', 'fast'"):
        RetryConfig(keepalive="slow")


def test_reconnecting_and_waiting_together_leave_room_below_five_seconds() -> None:
    options = dict(client_options())
    jitter = 1.2
    connect_ms = options["grpc.min_reconnect_backoff_ms"]
    backoff_ms = jitter * options["grpc.max_reconnect_backoff_ms"]
    # the server comes back in the middle of an attempt whose second packet has just been lost
    assert connect_ms - 1000 + backoff_ms + 1000 * RetryConfig().longest_wait_s < 4500


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
