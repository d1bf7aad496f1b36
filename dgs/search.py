"""Selection from ``model - replica``, segment by segment, by compiled kernels.

What is chosen is what `dgs.select.Selector.select` would choose from the difference of each
segment, and the selector is steered alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from dgs.changes import Change
from dgs.kernels import change_kernels, kernels
from dgs.kernels.changes import ALL_TIES, NO_BOUND, magnitude_bits, scratch_for
from dgs.select import Selector, count_wanted
from dgs.space import FloatArray, Int64Array
from dgs.view import Part

__all__ = ["Entries", "Search", "Window"]

_Bits = npt.NDArray[np.uint32]

_LOOKED_FOR: Final = 3
"""Entries looked for, per entry wanted, where a segment is compared in order to know candidates.
More than 2: a selector accepts no more, so a threshold with more entries than are known is none."""


class Window:
    """A session's part of the model.

    Args:
        model: the shard's model.
        part: what of it the session exchanges.

    Attributes:
        first: the coordinate in the shard of index 0, where the part is contiguous; otherwise 0.
    """

    def __init__(self, model: FloatArray, part: Part) -> None:
        """Take the part as a view where it is contiguous; otherwise, copy what is asked for."""
        where = part.coordinates
        self.first = 0
        self._positions: Int64Array | None = None
        if isinstance(where, slice):
            self.first, self._model = int(where.start), model[where]
        else:
            self._positions, self._model = where, model

    def range(self, start: int, stop: int) -> FloatArray:
        """Return the values at some consecutive indices."""
        if self._positions is None:
            return self._model[start:stop]
        return self._model[self._positions[start:stop]]

    def at(self, indices: Int64Array) -> FloatArray:
        """Return the values at some indices, as a new array."""
        return self._model[indices if self._positions is None else self._positions[indices]]

    def copy_to(self, replica: FloatArray, indices: Int64Array) -> FloatArray:
        """Set a replica to the model at some indices, in place; return the values there."""
        if self._positions is not None:
            values = self.at(indices)
            replica[indices] = values
            return values
        values = np.empty(indices.size, np.float32)
        kernels(replica.size).record(replica, self._model, indices, values)
        return values

    def localise(self, change: Change) -> tuple[Int64Array, FloatArray]:
        """Return the indices that a change falls on, plus `first`, and the values after it."""
        if self._positions is None:
            return change.indices, change.after
        local = np.searchsorted(self._positions, change.indices)
        held = local < self._positions.size
        held[held] = self._positions[local[held]] == change.indices[held]
        return local[held], change.after[held]


class Entries(NamedTuple):
    """Entries of the difference, sorted by index, and how many of them each segment has."""

    indices: Int64Array
    values: FloatArray
    counts: Int64Array

    @classmethod
    def empty(cls, room: int, segments: int) -> Self:
        """Make room for entries, which are not written yet."""
        room_for_values = np.empty(room, np.float32)
        return cls(np.empty(room, np.int64), room_for_values, np.zeros(segments, np.int64))

    def first(self, total: int) -> Self:
        """Leave out the room behind some entries."""
        return self._replace(indices=self.indices[:total], values=self.values[:total])


class Search:
    """One exchange's selection.

    Args:
        sizes: coordinates per segment.
        window: the session's part of the model.
        replica: what the session's worker has of it.
        selector: steered by what is found.
        density: fraction of each segment that is wanted.

    Attributes:
        window: as given.
        replica: as given.
        density: as given.
        bounds: bits that an entry's magnitude must reach, per segment; `NO_BOUND` where the largest
            entries are wanted instead.
        compared: coordinates compared so far.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        window: Window,
        replica: FloatArray,
        selector: Selector,
        density: float,
    ) -> None:
        """Ask the selector for the thresholds."""
        self.window, self.replica, self.density = window, replica, density
        self._sizes, self._selector = sizes, selector
        self._ends = np.cumsum(np.array(sizes, np.int64))
        self._thresholds = [selector.threshold(u, n, density) for u, n in enumerate(sizes)]
        given = [math.nan if t is None else t for t in self._thresholds]
        thresholds = np.array(given, np.float32)
        bits = np.maximum(thresholds.view(np.uint32), 1)
        self.bounds: _Bits = np.where(np.isnan(thresholds), np.uint32(NO_BOUND), bits)
        self.compared = 0

    def count_whole(self, floors: _Bits) -> int:
        """Count the coordinates of which all that differ are sent, where these are not known."""
        known = floors <= 1
        return sum(
            n
            for n, threshold, good in zip(self._sizes, self._thresholds, known, strict=True)
            if threshold == 0.0 and not good
        )

    def scan(self, floors: _Bits) -> Entries:
        """Choose by comparing everything.

        Args:
            floors: written: bits that no entry left out reaches, per segment.
        """
        most = np.array([self._room(unit) for unit in range(len(self._sizes))], np.int64)
        entries = Entries.empty(int(most.sum()), len(self._sizes))
        now = self.window.range(0, self.replica.size)
        loops = change_kernels(now.size)
        total = loops.scan_segments(now, self.replica, self._ends, self.bounds, most, *entries)
        self.compared += now.size
        floors[:] = self.bounds
        counts = entries.counts.tolist()
        entries.counts[entries.counts > most] = 0  # and nothing was written
        entries = entries.first(total)
        wanted = {
            unit: count_wanted(n, self.density)
            for unit, (n, count) in enumerate(zip(self._sizes, counts, strict=True))
            if not self._accepts(unit, count)
        }
        exact = self._largest(now, wanted, floors)
        for unit, found in exact.items():
            smallest = float(np.abs(found.values).min()) if found.values.size else 0.0
            self._observe(unit, found.indices.size, smallest)
        return _spliced(entries, exact)

    def choose(
        self, entries: Entries, reached: Int64Array, floors: _Bits
    ) -> tuple[Entries, Int64Array]:
        """Choose from candidates; compare the segments in which these are not enough.

        Args:
            entries: all that reach the floors.
            reached: how many of them reach `bounds`, per segment.
            floors: raised or lowered where a segment was compared.

        Returns:
            All candidates, and the positions of what is chosen.
        """
        known, counts, above = floors.tolist(), entries.counts.tolist(), reached.tolist()
        bounds = self.bounds.tolist()
        wanted = [0] * len(self._sizes)
        compared: dict[int, Entries] = {}
        for unit, n in enumerate(self._sizes):
            if self._thresholds[unit] is not None:
                if bounds[unit] < known[unit]:
                    compared[unit] = found = self._compare(unit, floors)
                    counts[unit], known[unit] = found.indices.size, 0
                    above[unit] = int((magnitude_bits(found.values) >= bounds[unit]).sum())
                if self._accepts(unit, above[unit]):
                    continue
            wanted[unit] = count_wanted(n, self.density)
            if counts[unit] < wanted[unit] and known[unit] > 1:
                compared[unit] = self._compare(unit, floors)
        if compared:
            entries = _spliced(entries, compared)
        return entries, self._take(entries, np.array(wanted, np.int64))

    def _take(self, entries: Entries, wanted: Int64Array) -> Int64Array:
        """Return the positions of what reaches the bounds, or of the largest where wanted."""
        loops = change_kernels(self.replica.size)
        ties = np.full(len(self._sizes), ALL_TIES)
        if wanted.any():
            loops.largest(entries.values, entries.counts, wanted, self.bounds, ties)
            found = np.minimum(entries.counts, wanted).tolist()
            smallest = self.bounds.view(np.float32).tolist()
            for unit in np.flatnonzero(wanted).tolist():
                self._observe(unit, found[unit], smallest[unit])
        positions = np.empty(entries.indices.size, np.int64)
        total = loops.choose(entries.values, entries.counts, self.bounds, ties, positions)
        return positions[:total]

    def _room(self, unit: int) -> int:
        """Return how many entries a segment can have of which the selector may accept all."""
        threshold, n = self._thresholds[unit], self._sizes[unit]
        if threshold is None:
            return 0
        return n if threshold == 0.0 else min(n, 2 * count_wanted(n, self.density))

    def _accepts(self, unit: int, count: int) -> bool:
        if self._thresholds[unit] is None:
            return False
        return self._observe(unit, count)

    def _observe(self, unit: int, count: int, smallest: float | None = None) -> bool:
        return self._selector.observe(unit, self._sizes[unit], self.density, count, smallest)

    def _compare(self, unit: int, floors: _Bits) -> Entries:
        """Find what is wanted of a segment and some more, so that the next walk may do."""
        n = self._sizes[unit]
        self.compared += n
        everything = self._thresholds[unit] == 0.0
        k = n if everything else min(n, _LOOKED_FOR * count_wanted(n, self.density))
        stop = int(self._ends[unit])
        now, then = self.window.range(stop - n, stop), self.replica[stop - n : stop]
        found = Entries.empty(scratch_for(k), 1)
        count = kernels(self.replica.size).scan_top_k(now, then, k, *found[:2], first=stop - n)
        values = found.values[:count]
        floors[unit] = _floor_of(values, k, n)
        return Entries(found.indices[:count], values, np.array([count], np.int64))

    def _largest(
        self, now: FloatArray, wanted: Mapping[int, int], floors: _Bits
    ) -> dict[int, Entries]:
        """Find the largest entries of some segments, and what no other one reaches."""
        if not wanted:
            return {}
        room = np.zeros(len(self._sizes), np.int64)
        for unit, k in wanted.items():
            room[unit] = k
        found = Entries.empty(scratch_for(int(room.sum())), len(self._sizes))
        change_kernels(now.size).scan_largest(now, self.replica, self._ends, room, *found)
        pieces: dict[int, Entries] = {}
        start = 0
        for unit, k in wanted.items():
            count = int(found.counts[unit])
            mine, start = slice(start, start + count), start + count
            pieces[unit] = Entries(found.indices[mine], found.values[mine], found.counts[[unit]])
            floors[unit] = _floor_of(pieces[unit].values, k, self._sizes[unit])
        return pieces


def _floor_of(largest: FloatArray, k: int, size: int) -> int:
    """Return what no entry reaches but the `k` largest of `size`."""
    if largest.size < k or k == size:
        return 1  # all others are zero
    return int(magnitude_bits(largest).min()) + 1  # some may be as large as the smallest


def _spliced(entries: Entries, replaced: Mapping[int, Entries]) -> Entries:
    """Put other entries in the place of those of some segments."""
    if not replaced:
        return entries
    counts = entries.counts.tolist()
    indices: list[Int64Array] = []
    values: list[FloatArray] = []
    start = 0
    for unit, count in enumerate(counts):
        stop, mine = start + count, replaced.get(unit)
        indices.append(entries.indices[start:stop] if mine is None else mine.indices)
        values.append(entries.values[start:stop] if mine is None else mine.values)
        start = stop
    new_counts = np.array([part.size for part in indices], np.int64)
    return Entries(np.concatenate(indices), np.concatenate(values), new_counts)
