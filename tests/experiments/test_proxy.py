"""A fault proxy does to connections what it is told, and nothing else."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from experiments.faults.proxy import FaultProxy, Link
from tests.helpers.processes import PATIENCE_S


class Echo:
    """A server that sends back what it gets."""

    def __init__(self, prefix: bytes = b"") -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._prefix = prefix
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._open.append(client)
                self._threads.append(threading.Thread(target=self._echo, args=(client,)))
                self._threads[-1].start()

    def _echo(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            client.sendall(self._prefix)
            while data := client.recv(1 << 16):
                client.sendall(data)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # closed already
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for client in self._open:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE_S)


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.close()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[FaultProxy]:
    with FaultProxy(echo.address, seed=3) as proxy:
        yield proxy


def dial(proxy: FaultProxy) -> socket.socket:
    host, _, port = proxy.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=PATIENCE_S)


def read(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        data += (piece := connection.recv(1 << 16))
        assert piece, f"closed after {len(data)} of {count} bytes"
    return data


def comes_back(connection: socket.socket, data: bytes) -> bool:
    connection.sendall(data)
    return read(connection, len(data)) == data


def is_reset(connection: socket.socket) -> bool:
    try:
        connection.recv(1)
    except ConnectionResetError:
        return True
    return False


def test_bytes_arrive_unchanged_and_are_counted(proxy: FaultProxy) -> None:
    with dial(proxy) as connection:
        assert comes_back(connection, bytes(range(256)) * 20)
    assert proxy.carried_bytes == 2 * 256 * 20


def test_bytes_arrive_in_order_whatever_the_pieces_and_delays(proxy: FaultProxy) -> None:
    proxy.set_link(Link(latency_s=1e-3, jitter_s=3e-3, longest_write_bytes=7))
    with dial(proxy) as connection:
        assert all(comes_back(connection, bytes([i]) * 300 + b"end") for i in range(5))


def test_latency_delays_and_bandwidth_stretches(proxy: FaultProxy) -> None:
    with dial(proxy) as connection:
        proxy.set_link(Link(latency_s=0.05))
        start = time.monotonic()
        assert comes_back(connection, b"ping")
        assert time.monotonic() - start >= 0.1
        proxy.set_link(Link(bytes_per_s=1e5, longest_write_bytes=1000))
        start = time.monotonic()
        assert comes_back(connection, bytes(10_000))
        assert time.monotonic() - start >= 0.09


def test_the_end_of_one_direction_is_passed_on_and_the_other_goes_on(proxy: FaultProxy) -> None:
    with dial(proxy) as connection:
        connection.sendall(b"last words")
        connection.shutdown(socket.SHUT_WR)
        assert read(connection, 10) == b"last words"
        assert connection.recv(1) == b""


def test_a_cut_closes_in_order_and_new_connections_are_served(proxy: FaultProxy) -> None:
    with dial(proxy) as connection, dial(proxy) as second:
        assert comes_back(connection, b"a")
        assert comes_back(second, b"b")
        proxy.cut()
        assert connection.recv(1) == b""
        assert second.recv(1) == b""
        assert proxy.connections == 0
    with dial(proxy) as connection:
        assert comes_back(connection, b"c")


def test_a_reset_is_seen_as_one(proxy: FaultProxy) -> None:
    with dial(proxy) as connection:
        assert comes_back(connection, b"a")
        proxy.reset()
        assert is_reset(connection)


def test_a_black_hole_is_silent_and_what_it_swallowed_never_arrives(proxy: FaultProxy) -> None:
    with dial(proxy) as swallowed, dial(proxy) as idle:
        assert comes_back(swallowed, b"a")
        assert comes_back(idle, b"b")
        proxy.black_hole()
        with dial(proxy) as late:
            for connection in (swallowed, late):
                connection.settimeout(0.2)
                connection.sendall(b"lost")
                with pytest.raises(TimeoutError):
                    connection.recv(1)
                connection.settimeout(PATIENCE_S)
            proxy.heal()
            assert is_reset(swallowed)
            assert is_reset(late)
        assert comes_back(idle, b"nothing of this one was lost")


def test_connections_are_refused_until_healed_on_the_same_port(proxy: FaultProxy) -> None:
    with dial(proxy) as connection:
        assert comes_back(connection, b"a")
        proxy.refuse()
        for _ in range(20):
            with pytest.raises(ConnectionRefusedError):
                dial(proxy)
        assert comes_back(connection, b"open ones stay")
    proxy.heal()
    with dial(proxy) as connection:
        assert comes_back(connection, b"b")


def test_without_a_server_connections_are_reset(proxy: FaultProxy) -> None:
    proxy.aim(None)
    with pytest.raises(ConnectionResetError), dial(proxy) as connection:
        connection.recv(1)


def test_the_server_behind_the_port_may_change(proxy: FaultProxy) -> None:
    other = Echo(b"other")
    try:
        proxy.aim(other.address)
        with dial(proxy) as connection:
            assert read(connection, 5) == b"other"
    finally:
        other.close()
    with pytest.raises(ConnectionResetError), dial(proxy) as connection:
        connection.recv(1)


def test_a_dead_server_resets_its_clients(echo: Echo, proxy: FaultProxy) -> None:
    with dial(proxy) as connection:
        assert comes_back(connection, b"a")
        echo.close()
        assert connection.recv(1) == b""  # an orderly end is passed on as such


def test_closing_resets_and_frees_the_port(echo: Echo) -> None:
    proxy = FaultProxy(echo.address)
    with dial(proxy) as connection:
        assert comes_back(connection, b"a")
        proxy.close()
        proxy.close()
        assert is_reset(connection)
    with pytest.raises(ConnectionRefusedError):
        dial(proxy)
