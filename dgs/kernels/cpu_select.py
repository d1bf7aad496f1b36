"""One pass over a tensor: accumulate or subtract, compare with a threshold, keep what is above.

The pass goes in blocks that stay in the first-level cache. In each, one loop without branches
makes a mask per 64 entries, and a second one turns the masks into indices. Values are read
again, from the cache, for what was selected only.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from dgs.kernels.cpu_lanes import (
    LANES,
    accumulate_mask,
    add_mask,
    at_least_mask,
    bits_of,
    difference_mask,
    jit,
    ones,
    trailing_zeros,
)

__all__ = [
    "accumulate",
    "accumulate_and_select",
    "add_and_select",
    "apply_update",
    "collect",
    "record",
    "scan",
    "settle",
]

_BLOCK: Final = 512  # longer ones leave the memory idle while indices are written
_BLOCK_WORDS: Final = _BLOCK // LANES
_NONE: Final = np.uint64(0)
_ONE: Final = np.uint64(1)


@jit
def _value(left: Any, right: Any, at: int) -> Any:
    return left[at] if right is None else left[at] - right[at]


@jit
def _write(
    masks: Any,
    words: int,
    start: int,
    first: int,
    left: Any,
    right: Any,
    indices: Any,
    values: Any,
    count: int,
) -> int:
    """Append the masks' ones, with their values; count all, write what there is room for."""
    room = indices.size
    for w in range(words):
        mask = masks[w]
        begin = start + w * LANES
        if count + LANES <= room:
            # two writes that need no branch: at 1 % few masks have more; what is written
            # beyond the count is overwritten by the next mask
            after = count + int(ones(mask))
            for extra in range(2):
                at = begin + (int(trailing_zeros(mask)) & (LANES - 1))
                indices[count + extra] = first + at
                values[count + extra] = _value(left, right, at)
                mask &= mask - _ONE
            count += 2
            while mask != _NONE:
                at = begin + int(trailing_zeros(mask))
                indices[count] = first + at
                values[count] = _value(left, right, at)
                mask &= mask - _ONE
                count += 1
            count = after
        else:
            while mask != _NONE:
                if count < room:
                    at = begin + int(trailing_zeros(mask))
                    indices[count] = first + at
                    values[count] = _value(left, right, at)
                count += 1
                mask &= mask - _ONE
    return count


@jit
def _bits_at(threshold: float) -> Any:
    """Return the bits that a magnitude must reach; those of the smallest one at 0."""
    return max(bits_of(np.float32(threshold)), np.uint32(1))


@jit
def accumulate_and_select(
    velocity: Any, base: Any, local: Any, threshold: float, first: int, indices: Any, values: Any
) -> int:
    """Compute ``velocity += base - local`` and compact what is at or above the threshold."""
    return accumulate(velocity, base, local, _bits_at(threshold), first, indices, values)


@jit
def scan(model: Any, replica: Any, threshold: float, first: int, indices: Any, values: Any) -> int:
    """Compact what is at or above the threshold of ``model - replica``."""
    return collect(model, replica, _bits_at(threshold), first, indices, values)


@jit
def accumulate(
    velocity: Any, base: Any, local: Any, bound: Any, first: int, indices: Any, values: Any
) -> int:
    """Compute ``velocity += base - local`` and compact what is at or above the bound."""
    masks = np.empty(_BLOCK_WORDS, np.uint64)
    size, count = velocity.size, 0
    for start in range(0, size, _BLOCK):
        words = _BLOCK_WORDS
        if start + _BLOCK <= size:
            for w in range(_BLOCK_WORDS):
                masks[w] = accumulate_mask(velocity, base, local, start + w * LANES, bound)
        else:
            words = (size - start + LANES - 1) // LANES
            masks[:] = _NONE
            for i in range(start, size):
                velocity[i] += base[i] - local[i]
                at = i - start
                masks[at // LANES] |= np.uint64(bits_of(velocity[i]) >= bound) << np.uint64(
                    at % LANES
                )
        count = _write(masks, words, start, first, velocity, None, indices, values, count)
    return count


@jit
def add_and_select(
    velocity: Any, progress: Any, threshold: float, first: int, indices: Any, values: Any
) -> int:
    """Compute ``velocity += progress`` and compact what is at or above the threshold."""
    bound = _bits_at(threshold)
    masks = np.empty(_BLOCK_WORDS, np.uint64)
    size, count = velocity.size, 0
    for start in range(0, size, _BLOCK):
        words = _BLOCK_WORDS
        if start + _BLOCK <= size:
            for w in range(_BLOCK_WORDS):
                masks[w] = add_mask(velocity, progress, start + w * LANES, bound)
        else:
            words = (size - start + LANES - 1) // LANES
            masks[:] = _NONE
            for i in range(start, size):
                velocity[i] += progress[i]
                at = i - start
                masks[at // LANES] |= np.uint64(bits_of(velocity[i]) >= bound) << np.uint64(
                    at % LANES
                )
        count = _write(masks, words, start, first, velocity, None, indices, values, count)
    return count


@jit
def collect(left: Any, right: Any, bound: Any, first: int, indices: Any, values: Any) -> int:
    """Compact what is at or above the bound of ``left - right``, or of `left` with no right."""
    masks = np.empty(_BLOCK_WORDS, np.uint64)
    size, count = left.size, 0
    for start in range(0, size, _BLOCK):
        words = _BLOCK_WORDS
        if start + _BLOCK <= size:
            for w in range(_BLOCK_WORDS):
                if right is None:
                    masks[w] = at_least_mask(left, start + w * LANES, bound)
                else:
                    masks[w] = difference_mask(left, right, start + w * LANES, bound)
        else:
            words = (size - start + LANES - 1) // LANES
            masks[:] = _NONE
            for i in range(start, size):
                value = _value(left, right, i)
                at = i - start
                masks[at // LANES] |= np.uint64(bits_of(value) >= bound) << np.uint64(at % LANES)
        count = _write(masks, words, start, first, left, right, indices, values, count)
    return count


@jit
def apply_update(model: Any, indices: Any, values: Any) -> int:
    """Subtract values; return -1, or where the first result is not finite, with nothing changed."""
    for i in range(indices.size):
        if not np.isfinite(model[indices[i]] - values[i]):
            return i
    for i in range(indices.size):
        model[indices[i]] -= values[i]
    return -1


@jit
def settle(velocity: Any, indices: Any, update: Any, momentum: Any) -> None:
    """Compute ``velocity = update * momentum + (velocity - update)`` where something was sent."""
    for i in range(indices.size):
        at = indices[i]
        velocity[at] = update[i] * momentum + (velocity[at] - update[i])


@jit
def record(replica: Any, model: Any, indices: Any, values: Any) -> None:
    """Set entries of the replica to the model's, and write them to `values`."""
    for i in range(indices.size):
        values[i] = model[indices[i]]
        replica[indices[i]] = values[i]
