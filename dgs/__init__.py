"""Train one model across machines that only a slow link joins.

Workers and a parameter server exchange sparsified model differences in both directions,
asynchronously. Start with `DistributedOptimizer`; DESIGN.md has the architecture, WIRE.md the
bytes.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from dgs.config import RetryConfig, ServerConfig, StorageConfig, WorkerConfig
from dgs.errors import DgsError
from dgs.security import ClientSecurity, ServerSecurity

if TYPE_CHECKING:
    from dgs.optimizer import DistributedOptimizer
    from dgs.server import ParameterServer
    from dgs.serving import serve

__all__ = [
    "ClientSecurity",
    "DgsError",
    "DistributedOptimizer",
    "ParameterServer",
    "RetryConfig",
    "ServerConfig",
    "ServerSecurity",
    "StorageConfig",
    "WorkerConfig",
    "serve",
]

_LOADED_WHEN_USED = {
    "DistributedOptimizer": "dgs.optimizer",
    "ParameterServer": "dgs.server",
    "serve": "dgs.serving",
}
"""What needs torch, which takes seconds to import: the program ``dgs`` must be able to take Ctrl-C
before it."""

if not TYPE_CHECKING:  # else every misspelt name would pass for one of these

    def __getattr__(name: str) -> object:
        module = _LOADED_WHEN_USED.get(name)
        if module is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(module), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
