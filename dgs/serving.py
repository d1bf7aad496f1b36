"""Start a parameter server in this process, reachable over gRPC."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dgs.config import ServerConfig
from dgs.server import ParameterServer
from dgs.space import FloatArray

if TYPE_CHECKING:
    from dgs.transport.grpc_server import GrpcServerHandle

__all__ = ["serve"]


def serve(
    address: str,
    *,
    init: Mapping[str, FloatArray] | None = None,
    config: ServerConfig | None = None,
) -> GrpcServerHandle:
    """Serve one shard of a model until the handle is stopped.

    Args:
        address: ``HOST:PORT``; port 0 lets the system choose, and the handle tells which.
        init: the model to start from, by tensor name; without it the first worker gives it.
        config: limits and intervals.

    Returns:
        A handle with `address`, `stop()` and `wait()`; also a context manager.

    Raises:
        AddressInUseError: another process listens there.
        ConfigError: the address is not HOST:PORT.

    Example:
        >>> with serve("127.0.0.1:0") as handle:
        ...     handle.address.startswith("127.0.0.1:")
        True
    """
    from dgs.transport.grpc_server import serve_handler  # the library itself needs no network

    return serve_handler(ParameterServer(config, init=init), address)
