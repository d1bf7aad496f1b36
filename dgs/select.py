"""Which entries of a tensor are sent: exact top-k, or a threshold tracked from step to step.

Selection is per *unit*: a tensor on the worker, a segment on the server. A selector keeps what it
carries between steps per unit, so its decisions depend on nothing but the values it has seen.
Entries that are zero are never sent: sending them would change nothing. NaN counts as larger than
anything, so that it is selected, and found by whoever checks what is sent, instead of waiting for
ever.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from dgs.config import Selection
from dgs.errors import ConfigError

__all__ = [
    "ExactSelector",
    "Selector",
    "TrackedSelector",
    "count_wanted",
    "make_selector",
    "top_k_indices",
]

_LARGEST = 3.4028234663852886e38
_SMALLEST = 2.0**-150
"""What float32 rounds to 0, as everything below it."""


def top_k_indices(values: Tensor, k: int) -> Tensor:
    """Return the indices of the `k` entries of largest magnitude, ascending, zeros left out.

    Args:
        values: shape ``(n,)``, float32; not modified.
        k: number of entries wanted, in ``[0, n]``.

    Returns:
        int64, at most `k` indices; fewer only where fewer entries differ from zero, or where there
        is NaN, which is then among them.

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
    if math.isnan(threshold):
        return magnitude.isnan().nonzero().flatten()[:k]
    chosen = (magnitude <= threshold).logical_not_()
    ties = (magnitude == threshold).nonzero().flatten()
    chosen[ties[: k - int(chosen.sum())]] = True
    return chosen.nonzero().flatten()


@lru_cache(maxsize=1 << 12)
def count_wanted(n: int, density: float) -> int:
    """Return how many of `n` entries a density asks for: ``ceil(density * n)``, at least 1.

    Args:
        n: number of entries.
        density: fraction of them, in (0, 1].

    Example:
        >>> count_wanted(100, 0.07), count_wanted(7, 0.01), count_wanted(0, 0.5)
        (7, 1, 0)
    """
    # ceil of the decimal fraction that was meant: 0.07 * 100 is 7.000000000000001 in binary
    return min(n, max(1, math.ceil(round(density * n, 9))))


def _kth_largest(magnitude: Tensor, k: int) -> float:
    # kthvalue is several times faster than topk on a CPU, and slower on a GPU
    if magnitude.device.type == "cpu":
        return float(torch.kthvalue(magnitude, magnitude.numel() - k + 1).values)
    return float(torch.topk(magnitude, k, sorted=False).values.min())


class Selector(Protocol):
    """Choose the entries of a unit to send; keeps what it carries per unit.

    `select` is the definition. Who finds entries in another way, as compiled kernels do, asks for
    the `threshold`, counts what reaches it, and tells `observe`; where that does not accept, or
    where there is no threshold, the `count_wanted` largest entries are sent, which `observe` is
    told of, too. Both ways come to the same entries and the same state.
    """

    def select(self, values: Tensor, unit: int, density: float) -> Tensor:
        """Return the ascending int64 indices of the entries of `values` to send.

        Args:
            values: the unit's candidates, shape ``(n,)``, float32; not modified.
            unit: number of the unit, the same in every call for the same tensor.
            density: fraction of the entries wanted, in (0, 1]; 1 returns all that are not zero.
        """
        ...

    def threshold(self, unit: int, size: int, density: float) -> float | None:
        """Return what a magnitude must reach, in float32, or None: look for the largest entries.

        At 0.0, everything that is not zero is sent.

        Args:
            unit: number of the unit.
            size: number of its entries.
            density: fraction of the entries wanted, in (0, 1].
        """
        ...

    def observe(
        self, unit: int, size: int, density: float, count: int, smallest: float | None = None
    ) -> bool:
        """Note what was found, and tell whether that is what to send.

        Args:
            unit: number of the unit.
            size: number of its entries.
            density: fraction of the entries wanted, in (0, 1].
            count: entries found at the threshold, or, with `smallest`, by looking for the largest.
            smallest: the smallest magnitude among the largest entries, 0.0 where there are none;
                NaN and infinity are allowed.

        Returns:
            Always True with `smallest`, and at the threshold 0.0.
        """
        ...

    def state(self) -> Tensor:
        """Return what is carried between steps, float64, one row per unit."""
        ...

    def load_state(self, state: Tensor) -> None:
        """Continue from what `state` returned earlier."""
        ...


def _select(selector: Selector, values: Tensor, unit: int, density: float) -> Tensor:
    """Select as a selector says, with torch."""
    n = values.numel()
    threshold = selector.threshold(unit, n, density)
    if threshold is not None:
        if threshold == 0.0:
            chosen = values.nonzero().flatten()
        else:
            chosen = (values.abs() < threshold).logical_not_().nonzero().flatten()
        if selector.observe(unit, n, density, chosen.numel()):
            return chosen
    chosen = top_k_indices(values, count_wanted(n, density))
    smallest = float(values[chosen].abs().min()) if chosen.numel() else 0.0
    selector.observe(unit, n, density, chosen.numel(), smallest)
    return chosen


class ExactSelector:
    """The ceil(density * n) largest entries of each unit, no exceptions; the reference."""

    def __init__(self, num_units: int) -> None:
        """Carry nothing; `num_units` is kept to check what is loaded."""
        self._num_units = num_units

    def select(self, values: Tensor, unit: int, density: float) -> Tensor:
        """Return the ascending indices of the largest entries; see `Selector`."""
        return _select(self, values, unit, density)

    def threshold(self, unit: int, size: int, density: float) -> float | None:
        """Return 0.0 where everything is wanted, otherwise None; see `Selector`."""
        return 0.0 if count_wanted(size, density) == size else None

    def observe(
        self, unit: int, size: int, density: float, count: int, smallest: float | None = None
    ) -> bool:
        """Accept what was found; see `Selector`."""
        return True

    def state(self) -> Tensor:
        """Return one empty row per unit: nothing is carried."""
        return torch.zeros(self._num_units, 0, dtype=torch.float64, device="cpu")

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
        self._thresholds = [0.0] * num_units  # lists: a tensor's entry takes microseconds to reach
        self._excess = [0.0] * num_units
        self._dense_below = dense_below

    def select(self, values: Tensor, unit: int, density: float) -> Tensor:
        """Return the ascending indices at or above the unit's threshold; see `Selector`."""
        return _select(self, values, unit, density)

    def threshold(self, unit: int, size: int, density: float) -> float | None:
        """Return the unit's threshold, or None where there is none yet; see `Selector`."""
        if size < self._dense_below or count_wanted(size, density) == size:
            return 0.0
        threshold = self._thresholds[unit]
        return threshold if threshold > _SMALLEST else None

    def observe(
        self, unit: int, size: int, density: float, count: int, smallest: float | None = None
    ) -> bool:
        """Steer the threshold by what was found, or set it anew; see `Selector`."""
        wanted = count_wanted(size, density)
        if size < self._dense_below or wanted == size:
            return True
        if smallest is not None:
            self._thresholds[unit] = smallest if math.isfinite(smallest) else 0.0
            return True
        if wanted > 4 * count or count > 2 * wanted:
            return False
        excess = min(max(self._excess[unit] + count - wanted, -2 * wanted), 2 * wanted)
        target = min(max(wanted - self.REPAY * excess, wanted / 2), 1.5 * wanted)
        threshold = self._thresholds[unit] * (count / target) ** self.GAIN
        self._thresholds[unit], self._excess[unit] = min(threshold, _LARGEST), excess
        return True

    def state(self) -> Tensor:
        """Return, per unit, the threshold (0 where there is none) and the excess sent so far."""
        columns = torch.tensor([self._thresholds, self._excess], dtype=torch.float64, device="cpu")
        return columns.T.contiguous()

    def load_state(self, state: Tensor) -> None:
        """Continue with what `state` returned earlier."""
        _check_state(state, len(self._thresholds))
        self._thresholds, self._excess = state[:, 0].tolist(), state[:, 1].tolist()


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


def _check_state(state: Tensor, num_units: int) -> None:
    if len(state) != num_units:
        raise ConfigError(
            f"the saved selection state is of {len(state)} tensors, this model has {num_units}"
        )
