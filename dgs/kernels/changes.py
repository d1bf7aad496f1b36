"""What the loops over changes compute, in plain numpy: the definition that fast ones are held to.

They find the difference of a model and a replica from what has changed, instead of by comparing
everything. Lists of entries are sorted by coordinate and cut into *segments*: `ends` are the
coordinates behind each, `counts` the entries of each. *Bounds* and *floors* are the bits of a
magnitude, uint32, one per segment: they compare as magnitudes do, and 2**31 is above all of them.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from dgs.select import top_k_indices

__all__ = [
    "ALL_TIES",
    "NO_BOUND",
    "apply_and_log",
    "choose",
    "largest",
    "magnitude_bits",
    "retain",
    "scan_largest",
    "scan_segments",
    "scratch_for",
    "walk",
]

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]
BitsArray = npt.NDArray[np.uint32]

NO_BOUND: Final = 1 << 31
"""A bound that nothing reaches."""

ALL_TIES: Final = 1 << 62
"""As many entries that equal a bound as there may be."""

_SIGN_LESS: Final = np.uint32(0x7FFFFFFF)


def magnitude_bits(values: Float32Array) -> BitsArray:
    """Return the bits of magnitudes, which compare as the magnitudes do; NaN is the largest.

    Example:
        >>> magnitude_bits(np.array([0.0, -1.0, 1.0], np.float32)).tolist()
        [0, 1065353216, 1065353216]
    """
    return values.view(np.uint32) & _SIGN_LESS


def scratch_for(wanted: int) -> int:
    """Return how long arrays should be in which the largest entries are looked for.

    Args:
        wanted: how many of them.
    """
    return 4 * wanted + 4096


def apply_and_log(
    model: Float32Array,
    indices: Int64Array,
    values: Float32Array,
    before: Float32Array,
    after: Float32Array,
) -> int:
    """Subtract an update from the model and note both sides, or refuse it whole.

    Args:
        model: shape ``(n,)``; changed in place where the update is accepted.
        indices: unique, in ``[0, n)``.
        values: one per index.
        before: written: the model at the indices before it.
        after: written: the model at the indices after it.

    Returns:
        -1, or the position in the update of the first entry that would leave NaN or infinity in
        the model, which is then unchanged.
    """
    before[:] = model[indices]
    with np.errstate(over="ignore", invalid="ignore"):
        np.subtract(before, values, out=after)
    finite = np.isfinite(after)
    if not finite.all():
        return int(np.argmin(finite))
    model[indices] = after
    return -1


def walk(
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
    """List what differs by its segment's floor or more, of what changed and what was held.

    Args:
        coordinates: of several changes, one after the other, each strictly increasing. Of one that
            occurs in several, the first counts. Those outside ``[first, first + then.size)`` are
            left out.
        now: one value per coordinate, of which ``then[coordinate - first]`` is subtracted.
        starts: where each change begins in `coordinates`, and its size.
        then: shape ``(ends[-1],)``; not modified.
        first: what to subtract from the coordinates.
        held: other entries, strictly increasing, in ``[0, then.size)``; those that are among the
            coordinates, less `first`, are left out.
        held_values: their differences, at or above the floors.
        ends: of the segments.
        floors: of the segments.
        bounds: of the segments.
        indices: written, strictly increasing; has room for all coordinates and all that is held.
        values: written: the differences.
        counts: written: entries per segment.
        reached: written: entries per segment that reach its bound.

    Returns:
        How many entries were written.
    """
    at = coordinates - first
    inside = (at >= 0) & (at < then.size)
    at, where = np.unique(at[inside], return_index=True)
    with np.errstate(over="ignore"):  # an infinite difference is still found
        differences = now[inside][where] - then[at]
    passing = magnitude_bits(differences) >= floors[np.searchsorted(ends, at, side="right")]
    stays = np.isin(held, at, invert=True)
    both = np.concatenate((at[passing], held[stays]))
    order = np.argsort(both)
    total = both.size
    indices[:total] = both[order]
    values[:total] = np.concatenate((differences[passing], held_values[stays]))[order]
    segment = np.searchsorted(ends, indices[:total], side="right")
    counts[:] = np.bincount(segment, minlength=ends.size)
    large = magnitude_bits(values[:total]) >= bounds[segment]
    reached[:] = np.bincount(segment[large], minlength=ends.size)
    return total


def largest(
    values: Float32Array,
    counts: Int64Array,
    wanted: Int64Array,
    bounds: BitsArray,
    ties: Int64Array,
) -> None:
    """Find what the largest entries of each segment reach, for `choose`.

    Args:
        values: of the entries, none of which is zero.
        counts: entries per segment.
        wanted: entries wanted per segment; where 0, nothing is written.
        bounds: written: the smallest of the wanted magnitudes; 0 without entries.
        ties: written: how many of the wanted entries equal it, or more where all are wanted.
    """
    start = 0
    for segment, (count, k) in enumerate(zip(counts.tolist(), wanted.tolist(), strict=True)):
        bits = magnitude_bits(values[start : start + count])
        start += count
        if k <= 0:
            continue
        bounds[segment], ties[segment] = 0, count
        if count > k:
            bounds[segment] = np.partition(bits, count - k)[count - k]
            ties[segment] = k - int((bits > bounds[segment]).sum())
        elif count > 0:
            bounds[segment] = bits.min()


def choose(
    values: Float32Array,
    counts: Int64Array,
    bounds: BitsArray,
    ties: Int64Array,
    positions: Int64Array,
) -> int:
    """Find what is above its segment's bound, and the first of those that equal it.

    Args:
        values: of the entries.
        counts: entries per segment.
        bounds: of the segments.
        ties: how many of those that equal the bound to take, per segment.
        positions: written: the positions of these entries, ascending; has room for all.

    Returns:
        How many there are.
    """
    bits = magnitude_bits(values)
    bound = np.repeat(bounds, counts)
    tie = bits == bound
    rank = np.cumsum(tie)  # of each tie among all; then among those of its segment
    starts = np.cumsum(counts) - counts
    rank -= np.repeat(np.concatenate(([0], rank))[starts], counts)
    found = np.flatnonzero((bits > bound) | (tie & (rank <= np.repeat(ties, counts))))
    positions[: found.size] = found
    return found.size


def retain(
    indices: Int64Array,
    values: Float32Array,
    counts: Int64Array,
    floors: BitsArray,
    most: Int64Array,
    kept: Int64Array,
    kept_values: Float32Array,
) -> int:
    """Keep what is at or above its segment's floor; where that is too much, raise the floor.

    A floor that is raised lets the larger half of `most` pass, or less where ties forbid it.

    Args:
        indices: of the entries.
        values: of the entries.
        counts: entries per segment; then, entries kept.
        floors: of the segments; changed in place.
        most: how many to keep, at most, per segment.
        kept: written: indices of what is kept; has room for all.
        kept_values: written, along with them.

    Returns:
        How many are kept.
    """
    bits = magnitude_bits(values)
    start, total = 0, 0
    for segment, (count, limit) in enumerate(zip(counts.tolist(), most.tolist(), strict=True)):
        mine = slice(start, start + count)
        start += count
        stays = np.flatnonzero(bits[mine] >= floors[segment])
        if stays.size > limit:
            k = (limit + 1) // 2
            found = np.sort(bits[mine][stays])
            floor = int(found[stays.size - k]) if k else NO_BOUND
            floors[segment] = floor + (int((found >= floor).sum()) > limit)
            stays = np.flatnonzero(bits[mine] >= floors[segment])
        stop = total + stays.size
        kept[total:stop], kept_values[total:stop] = indices[mine][stays], values[mine][stays]
        counts[segment], total = stays.size, stop
    return total


def scan_segments(
    model: Float32Array,
    replica: Float32Array,
    ends: Int64Array,
    bounds: BitsArray,
    most: Int64Array,
    indices: Int64Array,
    values: Float32Array,
    counts: Int64Array,
) -> int:
    """Find where a replica lacks much of the model, segment by segment; see `scan`.

    Args:
        model: shape ``(ends[-1],)``; not modified.
        replica: same shape; not modified.
        ends: of the segments.
        bounds: of the segments, at least 1.
        most: entries wanted at most per segment; where 0, it is not looked at.
        indices: written; has room for `most`, summed.
        values: written: ``model - replica`` there.
        counts: written: how many entries reach the bound; where these are more than wanted, none
            is written.

    Returns:
        How many entries were written.
    """
    counts[:] = 0
    start, total = 0, 0
    for segment, (stop, limit) in enumerate(zip(ends.tolist(), most.tolist(), strict=True)):
        mine, start = slice(start, stop), stop
        if limit <= 0:
            continue
        with np.errstate(over="ignore"):
            difference = model[mine] - replica[mine]
        found = np.flatnonzero(magnitude_bits(difference) >= bounds[segment])
        counts[segment] = found.size
        if found.size <= limit:
            indices[total : total + found.size] = found + mine.start
            values[total : total + found.size] = difference[found]
            total += found.size
    return total


def scan_largest(
    model: Float32Array,
    replica: Float32Array,
    ends: Int64Array,
    wanted: Int64Array,
    indices: Int64Array,
    values: Float32Array,
    counts: Int64Array,
) -> int:
    """Find the largest entries of ``model - replica``, segment by segment.

    Args:
        model: shape ``(ends[-1],)``; not modified.
        replica: same shape; not modified.
        ends: of the segments.
        wanted: entries wanted per segment; where 0, it is not looked at.
        indices: written; has room for those wanted, and is scratch behind them: with `scratch_for`
            them, compiled loops are faster.
        values: written: ``model - replica`` there.
        counts: written: how many entries were found; fewer than wanted only where no more differ.

    Returns:
        How many entries were written.
    """
    counts[:] = 0
    start, total = 0, 0
    for segment, (stop, k) in enumerate(zip(ends.tolist(), wanted.tolist(), strict=True)):
        mine, start = slice(start, stop), stop
        if k <= 0:
            continue
        with np.errstate(over="ignore"):
            difference = model[mine] - replica[mine]
        found = top_k_indices(torch.from_numpy(difference), k).numpy()
        counts[segment] = found.size
        indices[total : total + found.size] = found + mine.start
        values[total : total + found.size] = difference[found]
        total += found.size
    return total
