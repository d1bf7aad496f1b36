"""The loops of `dgs.kernels.changes`, compiled for this machine's CPU by numba.

Nothing that runs compiled checks a bound, so the functions here check what sizes tell. Coordinates
are the caller's to vouch for; those of `dgs.codec.decode_body` are good.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from dgs.errors import ConfigError
from dgs.kernels import cpu_walk
from dgs.kernels.changes import BitsArray, Float32Array, Int64Array

__all__ = [
    "apply_and_log",
    "choose",
    "largest",
    "retain",
    "scan_largest",
    "scan_segments",
    "walk",
    "warm_up",
]


def warm_up() -> None:
    """Compile everything, or load it from the cache, by running it once."""
    ramp, at = np.arange(1, 9, dtype=np.float32), np.arange(8)
    one, bounds = np.full(1, 8), np.ones(1, np.uint32)
    pair = np.zeros(16, np.int64), np.zeros(16, np.float32)
    apply_and_log(ramp.copy(), at, ramp, ramp.copy(), ramp.copy())
    counts, ties = one.copy(), one.copy()
    walk(at, ramp, np.array([0, 8]), -ramp, 0, at, ramp, one, bounds, bounds, *pair, counts, ties)
    largest(ramp, one, one, bounds, ties)
    choose(ramp, one, bounds, ties, at.copy())
    retain(at, ramp, counts, bounds, one, *pair)
    scan_segments(ramp, -ramp, one, bounds, one, *pair, counts)
    scan_largest(ramp, -ramp, one, one, *pair, counts)


def apply_and_log(
    model: Float32Array,
    indices: Int64Array,
    values: Float32Array,
    before: Float32Array,
    after: Float32Array,
) -> int:
    """Subtract an update and note both sides; see the reference."""
    _check_sizes(indices, values, before, after)
    return cpu_walk.apply_and_log(model, indices, values, before, after)


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
    """List what differs by its segment's floor or more; see the reference."""
    _check_sizes(coordinates, now)
    _check_sizes(held, held_values)
    _check_sizes(ends, floors, bounds, counts, reached)
    _check_sizes(indices, values)
    _check_room(coordinates.size + held.size, indices)
    if then.size != (ends[-1] if ends.size else 0):
        raise ConfigError(f"the replica has {then.size} coordinates, the segments do not")
    if starts[-1] != coordinates.size:
        raise ConfigError(f"the changes end at {starts[-1]}, their coordinates at {now.size}")
    return cpu_walk.walk(
        coordinates,
        now,
        starts,
        then,
        first,
        held,
        held_values,
        ends,
        floors,
        bounds,
        indices,
        values,
        counts,
        reached,
    )


def largest(
    values: Float32Array,
    counts: Int64Array,
    wanted: Int64Array,
    bounds: BitsArray,
    ties: Int64Array,
) -> None:
    """Find what the largest entries of each segment reach, for `choose`; see the reference."""
    _check_sizes(counts, wanted, bounds, ties)
    cpu_walk.largest(values, counts, wanted, bounds, ties)


def choose(
    values: Float32Array,
    counts: Int64Array,
    bounds: BitsArray,
    ties: Int64Array,
    positions: Int64Array,
) -> int:
    """Find what is above its segment's bound; see the reference."""
    _check_sizes(counts, bounds, ties)
    _check_room(values.size, positions)
    return cpu_walk.choose(values, counts, bounds, ties, positions)


def retain(
    indices: Int64Array,
    values: Float32Array,
    counts: Int64Array,
    floors: BitsArray,
    most: Int64Array,
    kept: Int64Array,
    kept_values: Float32Array,
) -> int:
    """Keep what reaches its segment's floor; see the reference."""
    _check_sizes(indices, values)
    _check_sizes(counts, floors, most)
    _check_sizes(kept, kept_values)
    _check_room(indices.size, kept)
    return cpu_walk.retain(indices, values, counts, floors, most, kept, kept_values)


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
    """Find where a replica lacks much of the model; see the reference."""
    _check_sizes(model, replica)
    _check_sizes(ends, bounds, most, counts)
    _check_sizes(indices, values)
    return cpu_walk.scan_segments(model, replica, ends, bounds, most, indices, values, counts)


def scan_largest(
    model: Float32Array,
    replica: Float32Array,
    ends: Int64Array,
    wanted: Int64Array,
    indices: Int64Array,
    values: Float32Array,
    counts: Int64Array,
) -> int:
    """Find the largest entries of ``model - replica``; see the reference."""
    _check_sizes(model, replica)
    _check_sizes(ends, wanted, counts)
    _check_sizes(indices, values)
    _check_room(int(wanted.sum()), indices)
    return cpu_walk.scan_largest(model, replica, ends, wanted, indices, values, counts)


def _check_sizes(*arrays: npt.NDArray[Any]) -> None:
    size = arrays[0].size
    for array in arrays:
        if array.size != size:
            raise ConfigError(f"arrays of {size} and {array.size} entries do not match")


def _check_room(entries: int, room: npt.NDArray[Any]) -> None:
    if room.size < entries:
        raise ConfigError(f"there is room for {room.size} entries, but {entries} are possible")
