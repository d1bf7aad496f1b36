"""From what a user writes to connections."""

from __future__ import annotations

import pytest

import dgs
from dgs.config import RetryConfig
from dgs.errors import ConfigError
from dgs.transport.connect import connect, split_addresses
from dgs.transport.local import LocalTransport
from dgs.transport.retry import RetryingTransport

RETRY = RetryConfig()


@pytest.mark.parametrize("text", ["a:1,b:2", " a:1 , b:2,", "a:1,,b:2"])
def test_shards_are_separated_by_commas(text: str) -> None:
    assert split_addresses(text) == ["a:1", "b:2"]
    assert [t.address for t in connect(text, RETRY)] == ["a:1", "b:2"]


def test_the_environment_is_read_only_where_nothing_is_given() -> None:
    environ = {"DGS_SERVER": "env:1"}
    assert [t.address for t in connect(None, RETRY, environ)] == ["env:1"]
    assert [t.address for t in connect("arg:2", RETRY, environ)] == ["arg:2"]


def test_servers_here_and_there_are_asked_again_and_transports_are_taken_as_they_are() -> None:
    here, there = connect([dgs.ParameterServer(), "a:1"], RETRY)
    assert isinstance(here, RetryingTransport)
    assert isinstance(there, RetryingTransport)
    plain = LocalTransport(dgs.ParameterServer())
    assert connect(plain, RETRY) == [plain]


@pytest.mark.parametrize(
    ("servers", "message"),
    [
        (None, "no server: pass server="),
        (",", "names no server"),
        ([], "list of servers is empty"),
        ("host", "'host' is not a server address"),
        (7070, "server=7070 is not valid"),
    ],
)
def test_what_is_no_server_is_refused_with_what_to_give(servers: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        connect(servers, RETRY, {})
