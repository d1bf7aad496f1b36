"""Start a parameter server in this process, reachable over gRPC."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from dgs._proto import parameter_server_pb2 as pb
from dgs.config import ServerConfig, StorageConfig
from dgs.durable import Durable, Recovery
from dgs.housekeeping import (
    Chore,
    DoorChore,
    Housekeeper,
    LeaseChore,
    Reporting,
    SnapshotChore,
    TroubleChore,
    final_snapshot,
)
from dgs.security import ServerSecurity
from dgs.server import ParameterServer
from dgs.space import FloatArray
from dgs.storage.commit import GroupCommit
from dgs.storage.disk import FolderDisk
from dgs.transport.gate import Gate
from dgs.transport.guard import GuardedHandler, Handler

if TYPE_CHECKING:
    from dgs.transport.grpc_server import GrpcServerHandle

__all__ = ["ServerHandle", "serve"]

logger = logging.getLogger("dgs.server")

_ROUND_S = 0.25
"""Seconds between two looks at what is due; a state that cannot be kept is noticed as soon."""


class ServerHandle:
    """A running server; leave its `with` block, or call `stop`, to end it."""

    def __init__(
        self, grpc_handle: GrpcServerHandle, durable: Durable | None, cleanup: ExitStack
    ) -> None:
        """Take over a started server; `serve` does this."""
        self._grpc = grpc_handle
        self._durable = durable
        self._cleanup = cleanup
        self._stopping = threading.Lock()

    @property
    def address(self) -> str:
        """Return the bound ``HOST:PORT``."""
        return self._grpc.address

    @property
    def recovery(self) -> Recovery | None:
        """Return what the state directory held; None without one."""
        return self._durable.recovery if self._durable else None

    @property
    def trouble(self) -> str:
        """Return why nothing is acknowledged until the server is started again; mostly empty."""
        return self._durable.trouble if self._durable else ""

    def stop(self, grace_s: float = 5.0) -> None:
        """Refuse new calls, let those in progress end, save the state, free the port.

        With a state directory, a last snapshot is made, so that the next start is immediate.
        Repeated calls do nothing.

        Args:
            grace_s: seconds that calls in progress may take; then they are cancelled.
        """
        with self._stopping:
            self._grpc.stop(grace_s)
            self._cleanup.close()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until the server has stopped.

        Args:
            timeout_s: seconds to wait at most; None for as long as it takes.

        Returns:
            Whether the server has stopped.
        """
        return self._grpc.wait(timeout_s)

    def __enter__(self) -> ServerHandle:
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

    def report(self, status: pb.StatusReply) -> None:
        """Add how much is in flight to a reply."""
        in_flight = self._grpc.in_flight
        status.limits.max_in_flight_bytes = in_flight.limit_bytes
        status.limits.in_flight_bytes = in_flight.held_bytes
        status.limits.put_off = in_flight.put_off


def serve(
    address: str,
    *,
    init: Mapping[str, FloatArray] | None = None,
    config: ServerConfig | None = None,
    state_dir: str | Path | None = None,
    storage: StorageConfig | None = None,
    security: ServerSecurity | None = None,
    wrap: Callable[[Handler], Handler] = lambda handler: handler,
    on_trouble: Callable[[str], object] = lambda trouble: None,
) -> ServerHandle:
    """Serve one shard of a model until the handle is stopped.

    Args:
        address: ``HOST:PORT``; port 0 lets the system choose, and the handle tells which.
        init: the model to start from, by tensor name; without it the first worker gives it. A state
            directory that holds a model goes before it.
        config: limits and intervals.
        state_dir: folder that the state is kept in. What was acknowledged survives `kill -9` and
            power loss; a server that is started on it again goes on where it was. Without it the
            state is in memory only.
        storage: how the state directory is kept.
        security: whom to let in, by certificates and tokens; None for everyone, in plaintext, which
            only loopback allows.
        wrap: puts something around what answers the requests, such as a log of who joins.
        on_trouble: called once, from another thread, if the state cannot be kept any more: then
            nothing is acknowledged until the server is started again.

    Returns:
        A handle with `address`, `stop()` and `wait()`; also a context manager.

    Raises:
        AddressInUseError: another process listens there.
        ConfigError: the address is not HOST:PORT; other machines could reach it, and `security`
            neither authenticates them nor says that this is meant; or a file of it is wrong.
        StateError: the state directory is in use, damaged, or not to be written; says what to do.

    Example:
        >>> with serve("127.0.0.1:0") as handle:
        ...     handle.address.startswith("127.0.0.1:")
        True
    """
    from dgs.transport.grpc_server import serve_handler  # the library itself needs no network

    config = config or ServerConfig()
    with ExitStack() as stack:
        durable = None
        if state_dir is not None:
            disk = stack.enter_context(FolderDisk(Path(state_dir)))
            durable = _recover(disk, config, init)
            stack.callback(durable.close)
        core = durable.core if durable else ParameterServer(config, init=init)
        reports: list[Callable[[pb.StatusReply], None]] = []
        handler = wrap(Reporting(durable or core, reports))
        guard = GuardedHandler(handler, GroupCommit(durable) if durable else None)
        grpc_handle = serve_handler(
            guard,
            address,
            max_in_flight_bytes=config.max_in_flight_bytes,
            security=security,
            gate=Gate(lambda run, number: core.state.worker_of(run, number)),
        )
        stack.callback(grpc_handle.stop, 0.0)

        def tell(trouble: str) -> None:
            grpc_handle.set_serving(False)
            on_trouble(trouble)

        chores: list[Chore] = [LeaseChore(guard, core), DoorChore(grpc_handle.door)]
        if durable is not None:
            stack.callback(final_snapshot, durable)
            chores.append(SnapshotChore(guard, durable, storage or StorageConfig()))
            chores.append(TroubleChore(durable, tell))
        reports += [chore.report for chore in chores]
        stack.callback(Housekeeper(chores, _ROUND_S).close)
        handle = ServerHandle(grpc_handle, durable, stack.pop_all())
        reports.append(handle.report)
        return handle


def _recover(
    disk: FolderDisk, config: ServerConfig, init: Mapping[str, FloatArray] | None
) -> Durable:
    """Open a state directory, and say what was in it."""
    began = time.monotonic()
    durable = Durable.open(disk, config, init=init)
    found, took_s = durable.recovery, time.monotonic() - began
    if not found.is_new:
        logger.warning(
            "%s: recovered version %d in %.2f s (snapshot %d, %d requests replayed)%s",
            disk.label,
            durable.core.version,
            took_s,
            found.snapshot,
            found.replayed,
            f"; cut off, never acknowledged: {found.torn}" if found.torn else "",
        )
    return durable
