"""Which entries of a tensor are sent: exact top-k, or a threshold tracked from step to step.

Selection is per *unit*: a tensor on the worker, a segment on the server. A selector keeps what it
carries between steps per unit, so its decisions depend on nothing but the values it has seen.
Entries that are zero are never sent: sending them would change nothing.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from dgs.config import Selection
from dgs.errors import ConfigError

__all__ = ["ExactSelector", "Selector", "TrackedSelector", "make_selector", "top_k_indices"]


def top_k_indices(values: Tensor, k: int) -> Tensor:
    """Return the indices of the `k` entries of largest magnitude, ascending, zeros left out.

    Args:
        values: shape ``(n,)``, float32, finite; not modified.
        k: number of entries wanted, in ``[0, n]``.

    Returns:
        int64, at most `k` indices; fewer only where fewer entries differ from zero.

    Note:
        Deterministic: ties at the threshold are resolved towards the lower index.

    Example:
        >>> top_k_indices(torch.tensor([1.0, -3.0, 2.0, -2.0]), 2).tolist()
        [1, 2]
    """
    n = values.numel()
    if k >= n:
        return values.nonzero().flatten()
    if k <= 0:
        return torch.zeros(0, dtype=torch.int64, device=values.device)
    magnitude = values.abs()
    threshold = _kth_largest(magnitude, k)
    if threshold == 0.0:
        return values.nonzero().flatten()
    chosen = magnitude > threshold
    ties = (magnitude == threshold).nonzero().flatten()
    chosen[ties[: k - int(chosen.sum())]] = True
    return chosen.nonzero().flatten()


def _kth_largest(magnitude: Tensor, k: int) -> float:
    # kthvalue is several times faster than topk on a CPU, and slower on a GPU
    if magnitude.device.type == "cpu":
        return float(torch.kthvalue(magnitude, magnitude.numel() - k + 1).values)
    return float(torch.topk(magnitude, k, sorted=False).values.min())


class Selector(Protocol):
    """Choose the entries of a unit to send; keeps what it carries per unit."""

    def select(self, values: Tensor, unit: int, density: float) -> Tensor:
        """Return the ascending int64 indices of the entries of `values` to send.

        Args:
            values: the unit's candidates, shape ``(n,)``, float32, finite; not modified.
            unit: number of the unit, the same in every call for the same tensor.
            density: fraction of the entries wanted, in (0, 1]; 1 returns all that are not zero.
        """
        ...

    def state(self) -> Tensor:
        """Return what is carried between steps, float64, one row per unit."""
        ...

    def load_state(self, state: Tensor) -> None:
        """Continue from what `state` returned earlier."""
        ...


class ExactSelector:
    """The ceil(density * n) largest entries of each unit, no exceptions; the reference."""

    def __init__(self, num_units: int) -> None:
        """Carry nothing; `num_units` is kept to check what is loaded."""
        self._num_units = num_units

    def select(self, values: Tensor, unit: int, density: float) -> Tensor:
        """Return the ascending indices of the largest entries; see `Selector`."""
        return top_k_indices(values, _wanted(values.numel(), density))

    def state(self) -> Tensor:
        """Return one empty row per unit: nothing is carried."""
        return torch.zeros(self._num_units, 0, dtype=torch.float64)

    def load_state(self, state: Tensor) -> None:
        """Check the number of units; there is nothing to load."""
        _check_state(state, self._num_units)


class TrackedSelector:
    """All entries at or above a threshold that is steered, per unit, toward the density.

    One comparison per entry instead of a selection: the threshold of the last step is nearly right
    for the next. With c entries at or above it and k wanted, the next threshold is
    ``threshold * (c / target) ** GAIN``, where the target is k less a part of what was sent too
    much so far. Where c is above ``2 * k`` or below ``k / 4`` (the first step, or a jump of the
    gradient's scale) the step falls back to the exact selection, which also sets the threshold
    anew; so no step sends more than twice the density.

    Args:
        num_units: number of units that will be selected from.
        dense_below: units with fewer entries than this are sent whole.
    """

    GAIN = 0.08
    """Exponent of the correction. The share of entries above a threshold t falls like t**-7 in the
    tail of a Gaussian (at 1 %), so larger gains overshoot; like t**-2 in heavy tails, where this
    one needs some five steps."""

    REPAY = 0.2
    """Share of what was sent too much, or too little, that the next target makes up for."""

    def __init__(self, num_units: int, dense_below: int) -> None:
        """Start without thresholds: the first step of each unit is exact."""
        self._state = torch.zeros(num_units, 2, dtype=torch.float64)
        self._dense_below = dense_below

    def select(self, values: Tensor, unit: int, density: float) -> Tensor:
        """Return the ascending indices at or above the unit's threshold; see `Selector`."""
        n = values.numel()
        wanted = _wanted(n, density)
        if n < self._dense_below or wanted == n:
            return values.nonzero().flatten()
        threshold, excess = self._state[unit].tolist()
        if threshold > 0.0:
            chosen = (values.abs() >= threshold).nonzero().flatten()
            count = chosen.numel()
            if wanted <= 4 * count and count <= 2 * wanted:
                excess = min(max(excess + count - wanted, -2 * wanted), 2 * wanted)
                target = min(max(wanted - self.REPAY * excess, wanted / 2), 1.5 * wanted)
                threshold *= (count / target) ** self.GAIN
                self._state[unit] = torch.tensor([threshold, excess], dtype=torch.float64)
                return chosen
        chosen = top_k_indices(values, wanted)
        smallest = float(values[chosen].abs().min()) if chosen.numel() else 0.0
        self._state[unit, 0] = smallest
        return chosen

    def state(self) -> Tensor:
        """Return, per unit, the threshold (0 where there is none) and the excess sent so far."""
        return self._state.clone()

    def load_state(self, state: Tensor) -> None:
        """Continue with what `state` returned earlier."""
        _check_state(state, len(self._state))
        self._state.copy_(state)


def make_selector(selection: Selection, num_units: int, dense_below: int) -> Selector:
    """Build the selector that a configuration names.

    Raises:
        ConfigError: `selection` is unknown.
    """
    if selection == "exact":
        return ExactSelector(num_units)
    if selection == "tracked":
        return TrackedSelector(num_units, dense_below)
    raise ConfigError(f"selection={selection!r} is not valid: choose one of 'tracked', 'exact'")


def _wanted(n: int, density: float) -> int:
    # ceil of the decimal fraction that was meant: 0.07 * 100 is 7.000000000000001 in binary
    return min(n, max(1, math.ceil(round(density * n, 9))))


def _check_state(state: Tensor, num_units: int) -> None:
    if len(state) != num_units:
        raise ConfigError(
            f"the saved selection state is of {len(state)} tensors, this model has {num_units}"
        )
