"""Train one model across machines that only a slow link joins.

Workers and a parameter server exchange sparsified model differences in both directions,
asynchronously. Start with `DistributedOptimizer`; DESIGN.md has the architecture, WIRE.md the
bytes.
"""

from __future__ import annotations

from dgs.config import RetryConfig, ServerConfig, WorkerConfig
from dgs.errors import DgsError
from dgs.optimizer import DistributedOptimizer
from dgs.server import ParameterServer
from dgs.serving import serve

__all__ = [
    "DgsError",
    "DistributedOptimizer",
    "ParameterServer",
    "RetryConfig",
    "ServerConfig",
    "WorkerConfig",
    "serve",
]
