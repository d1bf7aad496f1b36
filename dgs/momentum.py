"""What a worker remembers of what it did not send: four rules behind one protocol.

The *progress* of a round (start - end; lr * gradient for plain SGD) enters by `fold`, the sent part
leaves by `settle`. All rules work in place on flat float32 tensors, part by part, and
keep the rounding error of quantised values, so nothing is ever lost.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dgs.config import Rule
from dgs.errors import ConfigError
from dgs.kernels import kernels

__all__ = [
    "DGC",
    "Fold",
    "MomentumRule",
    "NoMemory",
    "Residual",
    "SAMomentum",
    "has_momentum",
    "make_rule",
]


class Fold(NamedTuple):
    """An addition that is still to be made: ``held += left - right``.

    Attributes:
        held: changed in place, the candidates to select from once that is done; None where nothing
            is kept and ``left - right`` are the candidates.
        left: float32, not to be modified.
        right: likewise; None stands for zeros.
    """

    held: Tensor | None
    left: Tensor
    right: Tensor | None

    def finish(self) -> Tensor:
        """Make the addition and return the candidates; to be read only, and before the next one."""
        addend = self.left if self.right is None else self.left - self.right
        return addend if self.held is None else self.held.add_(addend)


class MomentumRule(Protocol):
    """Hold back what is not sent, and decide what becomes of what is."""

    def fold(self, part: slice, start: Tensor, end: Tensor) -> Fold:
        """Take in one tensor's progress, ``start - end``, all but the last addition.

        That one is left to whoever selects, who can do both in one pass over memory.

        Args:
            part: the tensor's range in the flat index space.
            start: where the round began, shape ``(part.stop - part.start,)``, float32; not
                modified.
            end: where it ended, likewise.
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

    def fold(self, part: slice, start: Tensor, end: Tensor) -> Fold:
        """Return the progress itself; see `MomentumRule`."""
        return Fold(None, start, end)

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
        device: where the velocity lives; None is the CPU, whatever torch's default device is.

    References:
        Yan et al., ICPP 2020, eq. 14-16 and Algorithm 3. The paper divides unsent coordinates by m
        and multiplies all of them by m in the next step; leaving the unsent alone is the same, is
        O(sent) and defined at m = 0.
    """

    def __init__(self, size: int, momentum: float, device: torch.device | None = None) -> None:
        """Start with zero velocity."""
        self._velocity = _zeros(size, device)
        self._momentum = momentum

    def fold(self, part: slice, start: Tensor, end: Tensor) -> Fold:
        """Add progress to the velocity; see `MomentumRule`."""
        return Fold(self._velocity[part], start, end)

    def settle(self, indices: Tensor, update: Tensor) -> None:
        """Decay what was sent, keep what was rounded away; see `MomentumRule`."""
        if self._velocity.device.type == "cpu":
            settle = kernels(self._velocity.numel()).settle
            settle(self._velocity.numpy(), indices.numpy(), update.numpy(), self._momentum)
            return
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
        device: where both live; None is the CPU.

    References:
        Lin et al., ICLR 2018, sections 3.2 and 3.3. Deviation: what rounding took from the update
        stays in the residual instead of being masked with it.
    """

    def __init__(self, size: int, momentum: float, device: torch.device | None = None) -> None:
        """Start with zero velocity and nothing held back."""
        self._velocity = _zeros(size, device)
        self._residual = _zeros(size, device)
        self._momentum = momentum

    def fold(self, part: slice, start: Tensor, end: Tensor) -> Fold:
        """Advance the velocity and add it to the residual; see `MomentumRule`."""
        velocity = self._velocity[part].mul_(self._momentum).add_(start - end)
        return Fold(self._residual[part], velocity, None)

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
        device: where the state lives; None is the CPU.

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


def _zeros(size: int, device: torch.device | None) -> Tensor:
    return torch.zeros(size, dtype=torch.float32, device=device or "cpu")
