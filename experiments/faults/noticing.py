"""How soon a worker notices that its server, or the way to it, is gone; and that it is back."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable

from dgs.config import RetryConfig
from dgs.errors import ServerUnavailableError
from dgs.transport.base import Method, Transport
from dgs.transport.connect import connect
from dgs.transport.grpc_client import GrpcTransport
from dgs.transport.options import KEEPALIVES
from experiments.faults.proxy import FaultProxy
from experiments.faults.report import Figure, Report, as_rows
from experiments.faults.served import Served, scratch

__all__ = ["measure"]

UNDER_WAY_S = 0.5
"""Seconds after which a call that was made is under way for sure."""


def measure(repeats: int = 5, outages_s: tuple[float, ...] = (1.0, 5.0, 20.0)) -> Report:
    """Return seconds until each of three things was noticed, and the figures.

    Args:
        repeats: of what takes seconds only.
        outages_s: how long the server is away before it is back.
    """
    killed = [_killed() for _ in range(repeats)]
    cut = {name: _cut(name) for name in KEEPALIVES}
    back = [(outage_s, _back(outage_s)) for outage_s in outages_s for _ in range(2)]
    return {
        "killed_s": killed,
        "cut_s": cut,
        "back_s": back,
        "figures": as_rows(
            Figure("killed server noticed, slowest", max(killed), 1.0, "s"),
            Figure("silent cut noticed, keepalive 'fast'", cut["fast"], 15.0, "s"),
            Figure(
                "reconnect after the server's return, slowest", max(s for _, s in back), 5.0, "s"
            ),
        ),
    }


def _killed() -> float:
    """Kill a server while a call is under way."""
    with scratch() as folder, Served(folder) as server:
        transport = GrpcTransport(server.address)
        _ask(transport)
        server.signal(signal.SIGSTOP)  # so that the call stays under way
        failed = _in_background(lambda: _fails_at(transport))
        time.sleep(UNDER_WAY_S)
        start_s = time.monotonic()
        server.end(signal.SIGKILL)
        noticed_s = failed() - start_s
        transport.close()
    return noticed_s


def _cut(keepalive: str) -> float:
    """Swallow everything, right after an answer and before the next call: the worst moment."""
    with scratch() as folder, Served(folder) as server, FaultProxy(server.address) as proxy:
        transport = GrpcTransport(proxy.address, keepalive=KEEPALIVES[keepalive])
        _ask(transport)
        proxy.black_hole()
        start_s = time.monotonic()
        noticed_s = _fails_at(transport) - start_s
        transport.close()
    return noticed_s


def _back(outage_s: float) -> float:
    """Kill a server, and start it on the same port after a while."""
    with scratch() as folder, Served(folder) as server:
        (transport,) = connect(server.address, RetryConfig())
        _ask(transport)
        server.end(signal.SIGKILL)
        answered = _in_background(lambda: _ask(transport))
        time.sleep(outage_s)
        server.start()
        returned_s = time.monotonic()
        waited_s = answered() - returned_s
        transport.close()
    return max(0.0, waited_s)


def _ask(transport: Transport) -> float:
    """Make a call that is answered; return when it was."""
    transport.call(Method.STATUS, b"", timeout_s=300.0)
    return time.monotonic()


def _fails_at(transport: Transport) -> float:
    """Make a call that fails; return when it did."""
    try:
        transport.call(Method.STATUS, b"", timeout_s=300.0)
    except ServerUnavailableError:
        return time.monotonic()
    raise AssertionError("the call was answered")


def _in_background(call: Callable[[], float]) -> Callable[[], float]:
    """Start a call in a thread; the function that is returned waits for its result."""
    results: list[float] = []
    thread = threading.Thread(target=lambda: results.append(call()), daemon=True)
    thread.start()

    def result() -> float:
        thread.join(300.0)
        return results[0]

    return result
