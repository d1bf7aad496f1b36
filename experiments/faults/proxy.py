"""A TCP proxy that misbehaves on demand: what a network does to a connection, without a network.

It listens on a port of its own for as long as it lives, in front of a server that may come and go
and change its port. Faults are switched while connections are open; each switch is complete when
the method returns. Delays, jitter and the sizes of writes are drawn from a seed.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from random import Random
from types import TracebackType
from typing import Any, TypeVar

__all__ = ["FaultProxy", "Link"]

T = TypeVar("T")

READ_BYTES = 1 << 16
QUEUED_PIECES = 64
"""Pieces on their way in one direction; then the sender is held up, as by a full window."""

SWITCH_S = 30.0
"""Bound of every switch: what it waits for takes microseconds."""

RESET = struct.pack("ii", 1, 0)
"""SO_LINGER with a time of 0: closing sends a reset, and what is unsent is dropped."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """What a link does to the bytes that it carries, in each direction.

    Example:
        >>> Link(latency_s=0.05, bytes_per_s=1e6).jitter_s
        0.0
    """

    latency_s: float = 0.0
    """Seconds from one end to the other."""

    jitter_s: float = 0.0
    """Up to so many seconds more, drawn for each piece; pieces keep their order."""

    bytes_per_s: float = float("inf")
    """Bandwidth of each direction of each connection."""

    longest_write_bytes: int = READ_BYTES
    """What arrives is written in pieces of random lengths up to this."""


class _Lost(Exception):
    """Bytes were swallowed: what follows them must never arrive."""


class _Direction:
    """One direction of one connection."""

    def __init__(self, source: socket.socket, sink: socket.socket, random: Random) -> None:
        self._source = source
        self._sink = sink
        self._random = random
        self._pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(QUEUED_PIECES)
        self._due_s = 0.0
        self._free_s = 0.0

    async def read(self, proxy: _Loop) -> None:
        """Take what comes and say when it is due at the other end."""
        loop = asyncio.get_running_loop()
        while True:
            data = await loop.sock_recv(self._source, READ_BYTES)
            if proxy.swallows:
                raise _Lost
            extra_s = self._random.random() * proxy.link.jitter_s
            self._due_s = max(self._due_s, loop.time() + proxy.link.latency_s + extra_s)
            await self._pieces.put((self._due_s, data))
            if not data:
                return

    async def write(self, proxy: _Loop) -> None:
        """Hand over what is due."""
        loop = asyncio.get_running_loop()
        while True:
            due_s, data = await self._pieces.get()
            await asyncio.sleep(max(0.0, due_s - loop.time()))
            if proxy.swallows:
                raise _Lost
            if not data:
                self._sink.shutdown(socket.SHUT_WR)
                return
            while data:
                length = self._random.randint(1, proxy.link.longest_write_bytes)
                piece, data = data[:length], data[length:]
                proxy.carried_bytes += len(piece)
                await loop.sock_sendall(self._sink, piece)
                self._free_s = max(self._free_s, loop.time()) + len(piece) / proxy.link.bytes_per_s
                if self._free_s - loop.time() > 1e-3:
                    await asyncio.sleep(self._free_s - loop.time())


class _Connection:
    """A client's connection and the one to the server that belongs to it."""

    def __init__(self, proxy: _Loop, client: socket.socket, random: Random) -> None:
        self._proxy = proxy
        self._client = client
        self._server: socket.socket | None = None
        self._random = random
        self._hard = True
        self.lost = False
        """Whether bytes of it were swallowed."""
        self.task = asyncio.get_running_loop().create_task(self._run())

    def end(self, *, hard: bool) -> None:
        """Close both sides, by reset or in order."""
        self._hard = hard
        self.task.cancel()

    async def _run(self) -> None:
        try:
            await self._carry()
            self._hard = False
        except _Lost:
            await self._stay_silent()
        except OSError:  # one side has reset, or there is no server: so does the other side
            self._hard = True
        except asyncio.CancelledError:
            pass
        finally:
            self._close()

    async def _carry(self) -> None:
        loop = asyncio.get_running_loop()
        if self._proxy.swallows:
            raise _Lost
        if self._proxy.target is None:
            raise ConnectionRefusedError
        self._server = _socket()
        await loop.sock_connect(self._server, self._proxy.target)
        up = _Direction(self._client, self._server, Random(self._random.random()))
        down = _Direction(self._server, self._client, Random(self._random.random()))
        tasks = [
            loop.create_task(step(self._proxy)) for d in (up, down) for step in (d.read, d.write)
        ]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _stay_silent(self) -> None:
        """Keep both sides open, swallow what the client sends, and never answer."""
        self.lost = True
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            while await loop.sock_recv(self._client, READ_BYTES):
                pass
        await asyncio.Event().wait()

    def _close(self) -> None:
        for side in (self._client, self._server):
            if side is None:
                continue
            if self._hard:
                with contextlib.suppress(OSError):
                    side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            side.close()


def _socket() -> socket.socket:
    made = socket.socket()
    made.setblocking(False)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def _bound(port: int) -> socket.socket:
    made = _socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    made.bind(("127.0.0.1", port))
    return made


class _Loop:
    """The part of a proxy that lives on its event loop."""

    def __init__(self, target: tuple[str, int] | None, link: Link, seed: int) -> None:
        self.target = target
        self.link = link
        self.swallows = False
        self.carried_bytes = 0
        self.connections: set[_Connection] = set()
        self._random = Random(seed)
        # Never listens: without it, the port could become another's while connections are refused,
        # and a client that connects to it from that very port would be connected to itself.
        self._holder = _bound(0)
        self.port: int = self._holder.getsockname()[1]
        self._accepting: asyncio.Task[None] | None = None

    async def listen(self) -> None:
        if self._accepting is None:
            listener = _bound(self.port)
            listener.listen(128)
            self._accepting = asyncio.get_running_loop().create_task(self._accept(listener))

    async def refuse(self) -> None:
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.gather(self._accepting, return_exceptions=True)
            self._accepting = None

    async def end_all(self, *, hard: bool, lost_only: bool = False) -> None:
        ended = [c for c in self.connections if c.lost or not lost_only]
        for connection in ended:
            connection.end(hard=hard)
        await asyncio.gather(*(c.task for c in ended), return_exceptions=True)

    async def heal(self) -> None:
        self.swallows = False
        await self.end_all(hard=True, lost_only=True)
        await self.listen()

    async def shut(self) -> None:
        await self.refuse()
        await self.end_all(hard=True)
        self._holder.close()

    async def _accept(self, listener: socket.socket) -> None:
        with listener:
            for number in itertools.count():
                client, _ = await asyncio.get_running_loop().sock_accept(listener)
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                seed = f"{self._random.random()} {number}"
                connection = _Connection(self, client, Random(seed))
                self.connections.add(connection)
                connection.task.add_done_callback(partial(self._forget, connection))

    def _forget(self, connection: _Connection, task: asyncio.Task[None]) -> None:
        self.connections.discard(connection)


class FaultProxy:
    """Stand between clients and a server, and fail as told.

    Args:
        target: ``HOST:PORT`` of the server; None while there is none.
        link: what happens to bytes on their way.
        seed: of delays and lengths of pieces.

    Note:
        Any thread may call the methods. The event loop runs in a thread of its own until `close`.

    Example:
        >>> with FaultProxy(None) as proxy:
        ...     proxy.address.startswith("127.0.0.1:")
        True
    """

    def __init__(self, target: str | None, *, link: Link | None = None, seed: int = 0) -> None:
        """Listen."""
        self._inner = _Loop(_split(target), link or Link(), seed)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="fault proxy", daemon=True
        )
        self._thread.start()
        self._switch(self._inner.listen)

    @property
    def address(self) -> str:
        """Where clients connect to."""
        return f"127.0.0.1:{self._inner.port}"

    @property
    def connections(self) -> int:
        """Connections that are open."""
        return len(self._inner.connections)

    @property
    def carried_bytes(self) -> int:
        """Bytes that were handed over, or are about to be, both ways."""
        return self._inner.carried_bytes

    def aim(self, target: str | None) -> None:
        """Send new connections elsewhere; with None they are reset."""
        where = _split(target)

        async def aim() -> None:
            self._inner.target = where

        self._switch(aim)

    def set_link(self, link: Link) -> None:
        """Treat what arrives from now on in another way."""

        async def set_link() -> None:
            self._inner.link = link

        self._switch(set_link)

    def cut(self) -> None:
        """Close all connections in order, both sides."""
        self._switch(lambda: self._inner.end_all(hard=False))

    def reset(self) -> None:
        """Reset all connections, both sides."""
        self._switch(lambda: self._inner.end_all(hard=True))

    def black_hole(self) -> None:
        """Swallow everything silently, new connections included, until `heal`."""

        async def swallow() -> None:
            self._inner.swallows = True

        self._switch(swallow)

    def refuse(self) -> None:
        """Refuse new connections until `heal`; open ones stay."""
        self._switch(self._inner.refuse)

    def heal(self) -> None:
        """Carry again; connections of which bytes were swallowed are reset."""
        self._switch(self._inner.heal)

    def close(self) -> None:
        """Reset all connections and free the port; repeated calls do nothing."""
        if self._loop.is_closed():
            return
        self._switch(self._inner.shut)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(SWITCH_S)
        self._loop.close()

    def __enter__(self) -> FaultProxy:
        """Return the proxy."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()

    def _switch(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        return asyncio.run_coroutine_threadsafe(make(), self._loop).result(SWITCH_S)


def _split(target: str | None) -> tuple[str, int] | None:
    if target is None:
        return None
    host, _, port = target.rpartition(":")
    return host, int(port)
