"""What a worker remembers of what it did not send: four rules behind one protocol.

The *progress* of a round (base - local; lr * gradient for plain SGD) enters by `accumulate`, the
sent part leaves by `settle`. All rules work in place on flat float32 tensors, part by part, and
keep the rounding error of quantised values, so nothing is ever lost.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dgs.config import Rule
from dgs.errors import ConfigError

__all__ = [
    "DGC",
    "MomentumRule",
    "NoMemory",
    "Residual",
    "SAMomentum",
    "has_momentum",
    "make_rule",
]


class MomentumRule(Protocol):
    """Hold back what is not sent, and decide what becomes of what is."""

    def accumulate(self, part: slice, progress: Tensor) -> Tensor:
        """Add one tensor's progress and return the candidates to select from.

        Args:
            part: the tensor's range in the flat index space.
            progress: shape ``(part.stop - part.start,)``, float32; not modified.

        Returns:
            The candidates, same shape; to be read before the next call, not to be modified.
        """
        ...

    def settle(self, indices: Tensor, update: Tensor) -> None:
        """Account for what was sent.

        Args:
            indices: flat indices that were sent, int64, unique.
            update: the values as the server decodes them, float32, same length.
        """
        ...

    def waiting(self, part: slice) -> Tensor | None:
        """Return one tensor's progress that was not sent yet, or None if nothing ever waits."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that the rule carries, by name; the live ones, not copies."""
        ...


class NoMemory:
    """Remember nothing: everything is sent. With it, an exchange is asynchronous SGD (ASGD)."""

    def accumulate(self, part: slice, progress: Tensor) -> Tensor:
        """Return the progress itself; see `MomentumRule`."""
        return progress

    def settle(self, indices: Tensor, update: Tensor) -> None:
        """Do nothing: nothing was kept."""

    def waiting(self, part: slice) -> Tensor | None:
        """Return None: nothing waits."""
        return None

    def state(self) -> dict[str, Tensor]:
        """Return nothing: the rule carries nothing."""
        return {}


class SAMomentum:
    """Sparsification-aware momentum: decay a coordinate only when it is sent.

    ``velocity += progress`` everywhere; where ``update`` was sent,
    ``velocity <- m * update + (velocity - update)``. A coordinate that waits T steps and is then
    sent carries ``m * u + sum of T gradients``: momentum SGD with a batch enlarged T times, for
    that coordinate. At m = 0 this is gradient dropping, at density 1 heavy-ball momentum.

    Args:
        size: coordinates of the flat index space.
        momentum: m, in [0, 1).
        device: where the velocity lives.

    References:
        Yan et al., ICPP 2020, eq. 14-16 and Algorithm 3. The paper divides unsent coordinates by m
        and multiplies all of them by m in the next step; leaving the unsent alone is the same, is
        O(sent) and defined at m = 0.
    """

    def __init__(self, size: int, momentum: float, device: torch.device | None = None) -> None:
        """Start with zero velocity."""
        self._velocity = torch.zeros(size, dtype=torch.float32, device=device)
        self._momentum = momentum

    def accumulate(self, part: slice, progress: Tensor) -> Tensor:
        """Add progress to the velocity and return it; see `MomentumRule`."""
        return self._velocity[part].add_(progress)

    def settle(self, indices: Tensor, update: Tensor) -> None:
        """Decay what was sent, keep what was rounded away; see `MomentumRule`."""
        rest = self._velocity[indices] - update
        self._velocity[indices] = update * self._momentum + rest

    def waiting(self, part: slice) -> Tensor | None:
        """Return the velocity, which is also what was not sent."""
        return self._velocity[part]

    def state(self) -> dict[str, Tensor]:
        """Return the velocity."""
        return {"velocity": self._velocity}


class Residual(SAMomentum):
    """Gradient dropping with error feedback (GD-async): SAMomentum at m = 0.

    References:
        Aji and Heafield, EMNLP 2017; Algorithm 1 of Yan et al., ICPP 2020 (whose lines 11 and 12
        must be swapped).
    """

    def __init__(self, size: int, device: torch.device | None = None) -> None:
        """Start with nothing held back."""
        super().__init__(size, 0.0, device)


class DGC:
    """Momentum correction with factor masking (DGC-async).

    ``velocity <- m * velocity + progress; residual += velocity``; where ``update`` was sent,
    ``residual -= update`` and ``velocity <- 0``.

    Args:
        size: coordinates of the flat index space.
        momentum: m, in [0, 1).
        device: where both live.

    References:
        Lin et al., ICLR 2018, sections 3.2 and 3.3. Deviation: what rounding took from the update
        stays in the residual instead of being masked with it.
    """

    def __init__(self, size: int, momentum: float, device: torch.device | None = None) -> None:
        """Start with zero velocity and nothing held back."""
        self._velocity = torch.zeros(size, dtype=torch.float32, device=device)
        self._residual = torch.zeros(size, dtype=torch.float32, device=device)
        self._momentum = momentum

    def accumulate(self, part: slice, progress: Tensor) -> Tensor:
        """Advance the velocity, add it to the residual and return that; see `MomentumRule`."""
        velocity = self._velocity[part].mul_(self._momentum).add_(progress)
        return self._residual[part].add_(velocity)

    def settle(self, indices: Tensor, update: Tensor) -> None:
        """Take what was sent from the residual and mask its velocity; see `MomentumRule`."""
        self._residual[indices] -= update
        self._velocity[indices] = 0.0

    def waiting(self, part: slice) -> Tensor | None:
        """Return the residual."""
        return self._residual[part]

    def state(self) -> dict[str, Tensor]:
        """Return the velocity and the residual."""
        return {"velocity": self._velocity, "residual": self._residual}


def has_momentum(rule: Rule) -> bool:
    """Tell whether a rule applies momentum of its own."""
    return rule in ("samomentum", "dgc")


def make_rule(
    rule: Rule, size: int, momentum: float, device: torch.device | None = None
) -> MomentumRule:
    """Build the rule that a configuration names.

    Args:
        rule: its name.
        size: coordinates of the flat index space.
        momentum: m, in [0, 1); rules without momentum do not use it.
        device: where the state lives.

    Raises:
        ConfigError: `rule` is unknown.
    """
    match rule:
        case "samomentum":
            return SAMomentum(size, momentum, device)
        case "residual":
            return Residual(size, device)
        case "dgc":
            return DGC(size, momentum, device)
        case "none":
            return NoMemory()
        case _:
            raise ConfigError(f"rule={rule!r} is not valid: see WorkerConfig.rule")
