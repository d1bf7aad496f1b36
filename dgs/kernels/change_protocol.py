"""What an implementation of the loops over changes offers."""

from __future__ import annotations

from typing import Protocol

from dgs.kernels.changes import BitsArray, Float32Array, Int64Array

__all__ = ["ChangeKernels"]


class ChangeKernels(Protocol):
    """The loops over changes; the definitions stand in `dgs.kernels.changes`."""

    def apply_and_log(
        self,
        model: Float32Array,
        indices: Int64Array,
        values: Float32Array,
        before: Float32Array,
        after: Float32Array,
    ) -> int:
        """Subtract an update from the model and note both sides, or refuse it whole."""
        ...

    def largest(
        self,
        values: Float32Array,
        counts: Int64Array,
        wanted: Int64Array,
        bounds: BitsArray,
        ties: Int64Array,
    ) -> None:
        """Find what the largest entries of each segment reach, for `choose`."""
        ...

    def choose(
        self,
        values: Float32Array,
        counts: Int64Array,
        bounds: BitsArray,
        ties: Int64Array,
        positions: Int64Array,
    ) -> int:
        """Find what is above its segment's bound, and the first of those that equal it."""
        ...

    def retain(
        self,
        indices: Int64Array,
        values: Float32Array,
        counts: Int64Array,
        floors: BitsArray,
        most: Int64Array,
        kept: Int64Array,
        kept_values: Float32Array,
    ) -> int:
        """Keep what is at or above its segment's floor; where that is too much, raise the floor."""
        ...

    def scan_segments(
        self,
        model: Float32Array,
        replica: Float32Array,
        ends: Int64Array,
        bounds: BitsArray,
        most: Int64Array,
        indices: Int64Array,
        values: Float32Array,
        counts: Int64Array,
    ) -> int:
        """Find where a replica lacks much of the model, segment by segment; see `scan`."""
        ...

    def scan_largest(
        self,
        model: Float32Array,
        replica: Float32Array,
        ends: Int64Array,
        wanted: Int64Array,
        indices: Int64Array,
        values: Float32Array,
        counts: Int64Array,
    ) -> int:
        """Find the largest entries of ``model - replica``, segment by segment."""
        ...

    def walk(
        self,
        coordinates: Int64Array,
        now: Float32Array,
        starts: Int64Array,
        then: Float32Array,
        first: int,
        held: Int64Array,
        held_values: Float32Array,
        ends: Int64Array,
        floors: BitsArray,
        bounds: BitsArray,
        indices: Int64Array,
        values: Float32Array,
        counts: Int64Array,
        reached: Int64Array,
    ) -> int:
        """List what differs by its segment's floor or more, of what changed and what was held."""
        ...
