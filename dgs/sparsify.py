"""What of a round is sent: progress joins what is held back, and the largest of it is picked out.

A `Sparsifier` joins a momentum rule and a selector in as few passes over memory as its device
allows. All give the same entries, which `DeviceSparsifier` defines in plain torch operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from dgs.kernels import Kernels
from dgs.momentum import Fold, MomentumRule
from dgs.select import Selector, count_wanted
from dgs.space import FloatArray, Int64Array

__all__ = ["Chosen", "DeviceSparsifier", "HostSparsifier", "Rounds", "Sparsifier"]

Rounds = Callable[[int], tuple[Tensor, Tensor]]
"""Given a tensor's position: where its round started and where it ended, flat, float32."""

SCRATCH = 1024
"""Entries beyond twice the wanted ones that make the exact kernel fast."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """The entries to send; valid until the next ones are chosen."""

    positions: Tensor
    """Flat indices, int64, ascending, where base and velocity live."""
    indices: Int64Array
    """The same on the host."""
    values: FloatArray
    """What is held there."""


class _Arrays(NamedTuple):
    """A `Fold` as numpy arrays."""

    held: FloatArray | None
    left: FloatArray
    right: FloatArray | None

    @classmethod
    def of(cls, fold: Fold) -> Self:
        held, left, right = (None if t is None else t.numpy() for t in fold)
        assert left is not None
        return cls(held, left, right)


_Room = tuple[Int64Array, FloatArray]


class Sparsifier(Protocol):
    """Fold a round's progress in and choose what to send."""

    def collect(self, rule: MomentumRule, rounds: Rounds, density: float) -> Chosen:
        """Advance the rule and the selection by one round.

        Args:
            rule: in place.
            rounds: called once per tensor, in order.
            density: fraction of each tensor wanted, in (0, 1].
        """
        ...


class DeviceSparsifier:
    """Plain torch operations, on whatever device the tensors are; the definition.

    Args:
        selector: chooses per tensor.
        ranges: the tensors' places in the flat index space.
    """

    def __init__(self, selector: Selector, ranges: Sequence[slice]) -> None:
        """Allocate nothing."""
        self._selector = selector
        self._ranges = ranges

    def collect(self, rule: MomentumRule, rounds: Rounds, density: float) -> Chosen:
        """Advance the rule and the selection by one round; see `Sparsifier`."""
        indices, values = [], []
        for unit, part in enumerate(self._ranges):
            candidates = rule.fold(part, *rounds(unit)).finish()
            chosen = self._selector.select(candidates, unit, density)
            values.append(candidates[chosen])
            indices.append(chosen + part.start)
        if not indices:
            nothing = torch.zeros(0, dtype=torch.int64, device="cpu")
            return Chosen(nothing, nothing.numpy(), np.zeros(0, dtype=np.float32))
        positions = torch.cat(indices)
        return Chosen(positions, positions.cpu().numpy(), torch.cat(values).cpu().numpy())


class HostSparsifier:
    """One pass over memory per tensor, by `dgs.kernels`; for tensors on the CPU.

    Args:
        kernels: find and compact entries.
        selector: its thresholds decide.
        ranges: the tensors' places in the flat index space.
        density: fraction for which room is made; more is made when more is asked for.
    """

    def __init__(
        self, kernels: Kernels, selector: Selector, ranges: Sequence[slice], density: float
    ) -> None:
        """Make room for the entries of one round."""
        self._kernels = kernels
        self._selector = selector
        self._ranges = ranges
        self._make_room(density)

    def _make_room(self, density: float) -> None:
        room = SCRATCH
        for unit, part in enumerate(self._ranges):
            size = part.stop - part.start
            dense = self._selector.threshold(unit, size, density) == 0.0
            room += size if dense else min(size, 2 * count_wanted(size, density))
        self._room_density = density
        self._indices = np.empty(room, dtype=np.int64)
        self._values = np.empty(room, dtype=np.float32)

    def collect(self, rule: MomentumRule, rounds: Rounds, density: float) -> Chosen:
        """Advance the rule and the selection by one round; see `Sparsifier`."""
        if density > self._room_density:
            self._make_room(density)
        count = 0
        for unit, part in enumerate(self._ranges):
            fold = rule.fold(part, *rounds(unit))
            room = self._indices[count:], self._values[count:]
            count += self._find(_Arrays.of(fold), unit, part.start, density, room)
        indices, values = self._indices[:count], self._values[:count]
        return Chosen(torch.from_numpy(indices), indices, values)

    def _find(self, fold: _Arrays, unit: int, first: int, density: float, room: _Room) -> int:
        """Make one tensor's addition and write its entries; return how many."""
        size = fold.left.size
        threshold = self._selector.threshold(unit, size, density)
        if threshold is not None:
            count = self._above(fold, threshold, first, room)
            if self._selector.observe(unit, size, density, count):
                return count
        k = count_wanted(size, density)
        count = self._largest(fold, k, first, room, added=threshold is not None)
        smallest = float(np.abs(room[1][:count]).min()) if count else 0.0
        self._selector.observe(unit, size, density, count, smallest)
        return count

    def _above(self, fold: _Arrays, threshold: float, first: int, room: _Room) -> int:
        """Make the addition and write what is at or above the threshold."""
        held, left, right = fold
        if right is None:
            assert held is not None
            return self._kernels.add_and_select(held, left, threshold, *room, first=first)
        if held is None:
            return self._kernels.scan(left, right, threshold, *room, first=first)
        select = self._kernels.accumulate_and_select
        return select(held, left, right, threshold, *room, first=first)

    def _largest(self, fold: _Arrays, k: int, first: int, room: _Room, *, added: bool) -> int:
        """Write the `k` largest; make the addition first, unless a scan has made it."""
        held, left, right = fold
        if held is None:
            assert right is not None
            return self._kernels.scan_top_k(left, right, k, *room, first=first)
        if right is not None and not added:
            top_k = self._kernels.accumulate_and_top_k
            return top_k(held, left, right, k, *room, first=first)
        if not added:
            held += left
        return self._kernels.exact_top_k(held, k, *room, first=first)
