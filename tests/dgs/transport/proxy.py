"""A way to a server that can fall silent without a word, as a link does when it is cut."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable


class SilentProxy:
    """Pass bytes on between clients and a server, until told to swallow them.

    Connections stay open and the system acknowledges what is sent, so only who asks notices.
    """

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._open = threading.Event()
        self._open.set()
        self._sockets = [self._listener]
        self._threads: list[threading.Thread] = []
        self._begin(self._accept)

    def fall_silent(self) -> None:
        self._open.clear()

    def close(self) -> None:
        for one in self._sockets:
            with contextlib.suppress(OSError):  # it may have no peer any more
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        for thread in self._threads:
            thread.join(10.0)
            assert not thread.is_alive()

    def _begin(self, run: Callable[..., None], *args: socket.socket) -> None:
        thread = threading.Thread(target=run, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._target)
            self._sockets += [client, server]
            self._begin(self._pass_on, client, server)
            self._begin(self._pass_on, server, client)

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                if self._open.is_set():
                    sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            return  # the other end has gone
