"""Addresses of servers: HOST:PORT and nothing else."""

from __future__ import annotations

import errno
import ipaddress
import queue
import re
import socket
import threading

from dgs.errors import AddressInUseError, ConfigError, DgsError, ServerUnavailableError

__all__ = [
    "UnresolvedNameError",
    "check_listenable",
    "check_resolvable",
    "is_loopback",
    "join_address",
    "split_address",
]

LOOKUP_S = 3.0
"""Seconds that looking up a name may take before it gets the benefit of the doubt."""

_ADDRESS = re.compile(
    r"(?:\[(?P<v6>[0-9A-Fa-f:.]+(?:%[A-Za-z0-9._-]+)?)\]|(?P<host>[A-Za-z0-9._-]+))"
    r":(?P<port>[0-9]{1,5})"
)


class UnresolvedNameError(ServerUnavailableError):
    """The host's name does not resolve; most likely it is misspelt."""


def split_address(address: str, *, port_zero: bool = False) -> tuple[str, int]:
    """Split an address into host and port, and refuse everything that is not HOST:PORT.

    Args:
        address: such as ``127.0.0.1:7070``, ``[::1]:7070`` or ``ps.example.org:7070``.
        port_zero: accept port 0, with which a server lets the system choose.

    Returns:
        The host, without brackets, and the port.

    Raises:
        ConfigError: naming the address.

    Example:
        >>> split_address("[::1]:7070")
        ('::1', 7070)
    """
    match = _ADDRESS.fullmatch(address) if isinstance(address, str) else None
    if match is None:
        raise ConfigError(
            f"{address!r} is not a server address: give HOST:PORT, such as 127.0.0.1:7070 "
            "(an IPv6 host goes in brackets: [::1]:7070)"
        )
    port = int(match["port"])
    lowest = 0 if port_zero else 1
    if not lowest <= port <= 65535:
        raise ConfigError(f"the port of {address!r} is not between {lowest} and 65535")
    return match["v6"] or match["host"], port


def join_address(host: str, port: int) -> str:
    """Write host and port as one address; the inverse of `split_address`.

    Example:
        >>> join_address("::1", 7070)
        '[::1]:7070'
    """
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Return whether only processes of the same machine can reach a host's ports.

    Example:
        >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("0.0.0.0")
        (True, True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_resolvable(address: str) -> None:
    """Raise an error if the name of a server's host does not resolve.

    Args:
        address: HOST:PORT; nothing is connected to.

    Raises:
        ConfigError: the address is not HOST:PORT.
        UnresolvedNameError: there is no such host; a lookup without an answer in 3 s passes.

    Example:
        >>> check_resolvable("127.0.0.1:7070")
    """
    host, port = split_address(address)
    answers: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            answers.put(None)
        except (OSError, UnicodeError) as error:  # the latter for a part of impossible length
            answers.put(error)

    # a lookup cannot be given a deadline, so it is left behind if it takes too long
    threading.Thread(target=look_up, name=f"look up {host}", daemon=True).start()
    try:
        failure = answers.get(timeout=LOOKUP_S)
    except queue.Empty:
        return
    if failure is not None:
        raise UnresolvedNameError(
            f"server {address}: the name {host!r} does not resolve "
            f"({getattr(failure, 'strerror', None) or failure}); check its spelling"
        )


def check_listenable(host: str, port: int) -> None:
    """Raise the error that says why an address cannot be listened on, if it cannot.

    gRPC tells no cause, and is content when one of a name's several addresses is free.

    Raises:
        AddressInUseError: another socket listens on one of the host's addresses.
        ConfigError: the name does not resolve, or none of its addresses is this machine's.
    """
    name = join_address(host, port)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"cannot listen on {name}: the name does not resolve") from error
    failures = [_bind_failure(family, where) for family, _, _, _, where in found]
    for failure in failures:
        if failure is not None and failure.errno == errno.EADDRINUSE:
            raise _listen_error(name, failure) from failure
    first = failures[0]
    # A machine without IPv6 may still list ::1 for localhost, so one good address is enough.
    if first is not None and None not in failures:
        raise _listen_error(name, first) from first


def _bind_failure(family: int, where: tuple[object, ...]) -> OSError | None:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # Connections of a server that has just ended are no obstacle; a listener still is.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
    except OSError as error:
        return error
    return None


def _listen_error(name: str, error: OSError) -> DgsError:
    if error.errno == errno.EADDRINUSE:
        return AddressInUseError(
            f"cannot listen on {name}: another process does already; stop it, or take another port "
            "(port 0 lets the system choose)"
        )
    if isinstance(error, PermissionError):
        return ConfigError(f"cannot listen on {name}: the port needs privileges; take another")
    return ConfigError(
        f"cannot listen on {name}: {error.strerror}; give an address of this machine"
    )
