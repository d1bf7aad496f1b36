from __future__ import annotations

import socket

import pytest

from dgs.errors import AddressInUseError, ConfigError
from dgs.transport.address import (
    UnresolvedNameError,
    check_listenable,
    check_resolvable,
    is_loopback,
    join_address,
    split_address,
)


@pytest.mark.parametrize("address", ["127.0.0.1:7070", "[::1]:1", "ps-1.example.org:65535"])
def test_an_address_survives_splitting_and_joining(address: str) -> None:
    assert join_address(*split_address(address)) == address


@pytest.mark.parametrize(
    "address",
    [
        "",
        "host",
        ":7070",
        "host:",
        "host:port",
        "host:0",
        "host:65536",
        "host:-1",
        "::1:7070",
        "http://host:7070",
        "unix:/tmp/socket",
        "a:1,b:2",
        " host:1",
        "host:1\n",
        "host:\u0661",
    ],
)
def test_what_is_not_host_and_port_is_refused_by_name(address: str) -> None:
    with pytest.raises(ConfigError) as caught:
        split_address(address)
    assert repr(address) in str(caught.value)


def test_port_zero_is_for_servers_only() -> None:
    assert split_address("127.0.0.1:0", port_zero=True) == ("127.0.0.1", 0)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_a_listener_makes_the_address_in_use_and_its_end_frees_it(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(AddressInUseError, match=f"{host}:{port}.*another port"):
            check_listenable(host, port)
    check_listenable(host, port)


@pytest.mark.parametrize("host", ["192.0.2.1", "nosuch-host.invalid"])
def test_an_address_that_is_not_this_machines_is_refused_by_name(host: str) -> None:
    with pytest.raises(ConfigError, match=host):
        check_listenable(host, 0)


@pytest.mark.parametrize("address", ["127.0.0.1:7070", "[::1]:7070", "localhost:1"])
def test_a_host_that_resolves_passes_whether_it_listens_or_not(address: str) -> None:
    check_resolvable(address)


@pytest.mark.parametrize("host", ["a" * 64, "a..b"], ids=["too long", "empty part"])
def test_a_host_that_does_not_resolve_is_refused_by_name(host: str) -> None:
    with pytest.raises(
        UnresolvedNameError, match=f"server {host}:7070: the name {host!r} does not"
    ):
        check_resolvable(f"{host}:7070")


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("example.org", False),
    ],
)
def test_only_loopback_is_confined_to_the_machine(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
