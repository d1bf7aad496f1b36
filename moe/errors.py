"""Every error that the package raises on purpose."""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "CollectiveError",
    "LayoutError",
    "MoeError",
    "RoutingError",
    "UpcycleError",
]


class MoeError(Exception):
    """Root of the package's errors."""


class LayoutError(MoeError, ValueError):
    """A mapping is not legal, or does not fit the model or the world; nothing was started."""


class RoutingError(MoeError, ValueError):
    """A router's input, output or setting makes no sense; no token was sent."""


class CollectiveError(MoeError, RuntimeError):
    """Ranks do not agree with each other, or one of them failed and the others stopped with it."""


class CheckpointError(MoeError, ValueError):
    """A checkpoint is missing, damaged, or contradicts its own configuration; none was written."""


class UpcycleError(MoeError, ValueError):
    """A dense model cannot be made into the wanted mixture of experts; nothing was written."""
