"""Mixture-of-Experts layers with parallel mappings of their own: MoE Parallel Folding."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moe.errors import (
    CheckpointError,
    CollectiveError,
    LayoutError,
    MoeError,
    RoutingError,
    UpcycleError,
)
from moe.parallel.dims import ParallelDims

if TYPE_CHECKING:
    from moe.config import CapacityConfig, ExpertConfig, LossConfig, MoeConfig, RouterConfig
    from moe.layer import Execution, LayerOutput, MoeLayer
    from moe.parallel.grads import (
        Family,
        GradientRegistry,
        clip_grad_norm_,
        grad_norm,
        reduce_gradients,
    )
    from moe.parallel.groups import ProcessGroups, build_groups

__all__ = [
    "CapacityConfig",
    "CheckpointError",
    "CollectiveError",
    "Execution",
    "ExpertConfig",
    "Family",
    "GradientRegistry",
    "LayerOutput",
    "LayoutError",
    "LossConfig",
    "MoeConfig",
    "MoeError",
    "MoeLayer",
    "ParallelDims",
    "ProcessGroups",
    "RouterConfig",
    "RoutingError",
    "UpcycleError",
    "build_groups",
    "clip_grad_norm_",
    "grad_norm",
    "reduce_gradients",
]

LAZY = ("moe.config", "moe.parallel.groups", "moe.parallel.grads", "moe.layer")


def __getattr__(name: str) -> Any:
    """Load what needs torch when it is asked for, so that layouts are looked at without it."""
    if name in __all__:
        for module in LAZY:
            found = import_module(module)
            if name in found.__all__:
                return getattr(found, name)
    raise AttributeError(f"module 'moe' has no attribute {name!r}")
