"""A server's core, served over gRPC.

Every error leaves as a status code, a text and the trailing metadata `dgs-reason`; nothing else
about the server does. Requests are put together by threads within the core's limit, a time limit,
and a limit on the bytes of all of them; the core itself is called by one thread at a time.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import grpc

from dgs.errors import ConfigError, DgsError
from dgs.security import ServerSecurity
from dgs.transport.address import check_listenable, join_address, split_address
from dgs.transport.admission import InFlight
from dgs.transport.gate import Gate
from dgs.transport.grpc_door import Door, check_exposure
from dgs.transport.grpc_health import HealthService
from dgs.transport.grpc_shell import SERVICE, Shell
from dgs.transport.guard import GuardedHandler, Handler
from dgs.transport.options import server_options
from dgs.transport.stalls import StallGuard

__all__ = ["GrpcServerHandle", "Handler", "serve_handler"]

_IN_FLIGHT_BYTES = 1 << 30


@dataclass(frozen=True)
class _Parts:
    """What runs beside the gRPC server and ends after it."""

    guard: GuardedHandler
    stalls: StallGuard
    in_flight: InFlight
    door: Door
    health: HealthService
    pools: tuple[ThreadPoolExecutor, ...]

    def end_threads(self) -> None:
        self.stalls.stop()
        self.health.close()
        for pool in self.pools:
            pool.shutdown(wait=False, cancel_futures=True)


class GrpcServerHandle:
    """A running server; leave its `with` block, or call `stop`, to end it."""

    def __init__(self, address: str, server: grpc.Server, parts: _Parts) -> None:
        """Take over a started server; `serve_handler` does this."""
        self._address = address
        self._server = server
        self._parts = parts

    @property
    def address(self) -> str:
        """Return the bound ``HOST:PORT``."""
        return self._address

    @property
    def in_flight(self) -> InFlight:
        """Return the count of the bytes of requests that are arriving or waiting."""
        return self._parts.in_flight

    @property
    def door(self) -> Door:
        """Return what lets callers in."""
        return self._parts.door

    def set_serving(self, serving: bool) -> None:
        """Tell the probes of `grpc.health.v1.Health` whether to send work here; it begins as true.

        Calls are answered either way. After `stop` has begun, probes are told that it is not.
        """
        self._parts.health.set_serving(serving)

    def stop(self, grace_s: float = 5.0) -> None:
        """Refuse new calls, let those in progress end, free the port; repeated calls do nothing.

        Those who watch the server's health are told first.

        When this returns, the handler is not being called and never will be again.

        Args:
            grace_s: seconds that calls in progress may take; then they are cancelled.
        """
        self._parts.health.drain()
        self._server.stop(grace_s).wait()
        self._parts.guard.close()
        self._parts.end_threads()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until the server has stopped.

        Args:
            timeout_s: seconds to wait at most; None for as long as it takes.

        Returns:
            Whether the server has stopped.
        """
        return not self._server.wait_for_termination(timeout_s)

    def __enter__(self) -> GrpcServerHandle:
        """Return the handle."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the server."""
        self.stop()


def serve_handler(
    handler: Handler | GuardedHandler,
    address: str,
    *,
    max_workers_threads: int = 32,
    max_concurrent_calls: int = 256,
    upload_limit_s: float = 3600.0,
    stall_limit_s: float = 60.0,
    max_in_flight_bytes: int = _IN_FLIGHT_BYTES,
    security: ServerSecurity | None = None,
    gate: Gate | None = None,
) -> GrpcServerHandle:
    """Answer calls at an address until the returned handle is stopped.

    Args:
        handler: the server's core; only one thread at a time calls it. Give a `GuardedHandler` if
            local transports reach the same core.
        address: ``HOST:PORT`` to listen on; port 0 lets the system choose.
        max_workers_threads: streamed requests that can arrive at the same time. A slow upload holds
            one thread, so this is more than the number of cores.
        max_concurrent_calls: calls beyond this many are told at once to try again later; Join,
            Leave and Status are counted by themselves.
        upload_limit_s: seconds within which a request must have arrived whole.
        stall_limit_s: seconds from one piece of a request or a reply to the next, each of at most
            1 MiB, after which the call is cut.
        max_in_flight_bytes: bytes of streamed requests that may be arriving or waiting at a time;
            more are told to try again later. One request alone may exceed it.
        security: whom to let in; None for everyone, which loopback allows.
        gate: says who may do what, where callers are authenticated.

    Raises:
        ConfigError: the address is malformed, or is not one of this machine's; `security` lets
            everyone in from other machines without saying so, or a file of it is missing or wrong.
        AddressInUseError: another process listens there.
    """
    host, port = split_address(address, port_zero=True)
    security = security or ServerSecurity()
    check_listenable(host, port)
    check_exposure(host, port, security)
    door = Door(security, gate)
    in_flight = InFlight(max_in_flight_bytes)
    guard = handler if isinstance(handler, GuardedHandler) else GuardedHandler(handler)
    stalls = StallGuard(min(stall_limit_s, upload_limit_s))
    shell = Shell(
        guard,
        stalls,
        in_flight,
        door,
        threads=max_workers_threads,
        most_calls=max_concurrent_calls,
        upload_limit_s=upload_limit_s,
    )
    health = HealthService(SERVICE, stalls=stalls)
    parts = _Parts(guard, stalls, in_flight, door, health, shell.pools)
    server = grpc.server(shell.pools[0], options=server_options())
    try:
        bound = _bind(server, host, port, door)
    except DgsError:
        parts.end_threads()
        raise
    server.add_generic_rpc_handlers((shell, health.handlers()))
    server.start()
    return GrpcServerHandle(join_address(host, bound), server, parts)


def _bind(server: grpc.Server, host: str, port: int, door: Door) -> int:
    """Let a server listen; return the port."""
    credentials = door.credentials()
    try:
        if credentials is not None:
            return int(server.add_secure_port(join_address(host, port), credentials))
        return int(server.add_insecure_port(join_address(host, port)))
    except RuntimeError as error:
        check_listenable(host, port)
        raise ConfigError(f"cannot listen on {join_address(host, port)}: {error}") from error
