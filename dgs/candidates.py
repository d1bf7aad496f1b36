"""Which entries of ``model - replica`` are sent: found in what changed, or by comparing all.

For each segment, `Candidates` knows a *floor* and holds some coordinates with their differences,
such that every other coordinate of the segment differs by less than the floor. An exchange walks
through what changed since the last one: whatever now differs by the floor or more becomes a
candidate. A selection with a threshold that is not below the floor, or of no more entries than
reach the floor, chooses from the candidates alone. Otherwise the segment is compared whole, which
lowers its floor; the floor rises where there are more candidates than are worth keeping.

Both ways choose the same entries, bit for bit. Which one is taken depends on counted coordinates,
and on nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from dgs.changes import Change
from dgs.kernels import change_kernels
from dgs.kernels.changes import NO_BOUND
from dgs.search import Entries, Search
from dgs.select import count_wanted
from dgs.shard import Scratch
from dgs.space import Int64Array
from dgs.view import Part

__all__ = ["CANDIDATE_BYTES", "WALK_COST", "Candidates"]

WALK_COST: Final = 64
"""Coordinates that are compared, one after the other, in the time that one takes that changed."""

CANDIDATE_BYTES: Final = 3 << 18
"""Most that the candidates of one session take: 768 KiB."""

_KEPT: Final = 2  # candidates per entry that is wanted; the larger half stays of more than that
_LEAST_KEPT: Final = 32
_REST: Final = 16  # exchanges without a walk, where walks keep ending in comparisons
_CALM: Final = 4


class Candidates:
    """Choose what a reply holds, and remember what the next one may need.

    Args:
        part: what the session exchanges; its replica equals the model.

    Attributes:
        walked: changed coordinates looked at so far.
        compared: coordinates compared so far.
    """

    def __init__(self, part: Part) -> None:
        """Know that nothing differs."""
        self._sizes: list[int] = part.segment_sizes.tolist()
        self._ends = np.cumsum(part.segment_sizes)
        self._size = part.size
        self._width = np.uint32 if part.size <= 1 << 32 else np.int64
        self.walked, self.compared = 0, 0
        self.clear()

    def clear(self) -> None:
        """Start anew, with a replica that equals the model."""
        self._floors = np.ones(len(self._sizes), np.uint32)
        self._held: npt.NDArray[np.uint32 | np.int64] = np.empty(0, self._width)
        self._held_values = np.empty(0, np.float32)
        self._rest, self._calm = 0, _CALM

    def forget(self) -> None:
        """Start anew, with a replica of which nothing is known."""
        self.clear()
        self._floors[:] = NO_BOUND

    @property
    def nbytes(self) -> int:
        """Bytes held from exchange to exchange."""
        return self._held.nbytes + self._held_values.nbytes + self._floors.nbytes

    def find(
        self,
        search: Search,
        changes: Sequence[Change] | None,
        scratch: Scratch,
    ) -> tuple[Entries, Int64Array | slice]:
        """Choose entries of ``model - replica``; `keep` must follow.

        Args:
            search: of this exchange.
            changes: since the last call, the oldest first; None where they are not known.
            scratch: for the entries, which are valid until it is next used.

        Returns:
            Entries, and the positions among them of what is chosen: often all.
        """
        if changes is not None and self._is_worth_walking(search, changes):
            entries, reached = self._walk(search, changes, scratch)
            entries, positions = search.choose(entries, reached, self._floors)
            self._note(search.compared)
            self.compared += search.compared
            return entries, positions
        entries = search.scan(self._floors)
        self.compared += search.compared
        return entries, slice(None)

    def keep(self, entries: Entries, density: float) -> None:
        """Remember, of the entries found, what may be chosen next.

        Args:
            entries: what `find` returned; the values of what was chosen are what is left there.
            density: fraction of each segment that was wanted.
        """
        room = np.empty_like(entries.indices), np.empty_like(entries.values)
        limits = self._limits(density)
        total = change_kernels(self._size).retain(
            entries.indices, entries.values, entries.counts, self._floors, limits, *room
        )
        self._held = room[0][:total].astype(self._width)
        self._held_values = room[1][:total].copy()

    def _is_worth_walking(self, search: Search, changes: Sequence[Change]) -> bool:
        touched = sum(c.indices.size for c in changes)
        if self._size == 0 or WALK_COST * touched + search.count_whole(self._floors) > self._size:
            return False
        self._rest = max(0, self._rest - 1)
        return self._rest == 0

    def _note(self, compared: int) -> None:
        """Pause walking if it ends, time after time, in comparing much of the model."""
        if 4 * compared <= self._size:
            self._calm += 1
            return
        if self._calm < _CALM:
            self._rest = _REST
        self._calm = 0

    def _walk(
        self, search: Search, changes: Sequence[Change], scratch: Scratch
    ) -> tuple[Entries, Int64Array]:
        """Return all entries that reach the floors, and how many reach the bounds."""
        window = search.window
        local = [window.localise(change) for change in reversed(changes)]
        starts = np.cumsum([0, *(at.size for at, _ in local)])
        count = int(starts[-1])
        coordinates, now = scratch.integers("coordinates", count), scratch.floats("now", count)
        for (at, after), start in zip(local, starts.tolist(), strict=False):
            coordinates[start : start + at.size], now[start : start + at.size] = at, after
        self.walked += count
        room = count + self._held.size
        entries = Entries(
            scratch.integers("indices", room),
            scratch.floats("values", room),
            np.zeros(len(self._sizes), np.int64),
        )
        reached = np.zeros_like(entries.counts)
        total = change_kernels(self._size).walk(
            coordinates,
            now,
            starts,
            search.replica,
            window.first,
            self._held.astype(np.int64),
            self._held_values,
            self._ends,
            self._floors,
            search.bounds,
            *entries,
            reached,
        )
        return entries.first(total), reached

    def _limits(self, density: float) -> Int64Array:
        """Return how many candidates each segment may keep."""
        wanted = np.array([count_wanted(n, density) for n in self._sizes], np.int64)
        limits = np.maximum(_KEPT * wanted, _LEAST_KEPT)
        most = CANDIDATE_BYTES // (self._held.itemsize + 4)
        total = int(limits.sum())
        return limits if total <= most else limits * most // total
