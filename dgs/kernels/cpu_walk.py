"""Loops over what has changed: the log's entries and a session's candidates, not the model.

Their cost is that of reading scattered memory: one line of cache per coordinate. So a walk reads
nothing scattered but the replica. It goes through all changes side by side, block by block of the
model, so that marks and differences of a block stay in the caches and come out sorted.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numba import types
from numba.core.cgutils import ir

from dgs.kernels.cpu_lanes import Signature, bits_of, intrinsic, jit, trailing_zeros
from dgs.kernels.cpu_select import collect
from dgs.kernels.cpu_topk import kth, top_k

__all__ = [
    "apply_and_log",
    "choose",
    "largest",
    "retain",
    "scan_largest",
    "scan_segments",
    "walk",
]

_ONE: Final = np.uint64(1)
_NONE: Final = np.uint64(0)
_BLOCKS: Final = 512  # enough that a block's marks fit the caches; each costs half a microsecond
_LEAST_BLOCK: Final = 1 << 12
_AHEAD: Final = 24  # entries for whose lines of cache the memory is asked in advance


@intrinsic
def _fetch(typing: Any, array: Any, at: Any) -> Signature:
    """Ask for the line of cache with an entry, which is not used yet."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        start = context.make_array(signature.args[0])(context, builder, args[0]).data
        place = builder.bitcast(builder.gep(start, [args[1]]), byte)
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        name = "llvm.prefetch.p0i8"
        fetch = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        builder.call(fetch, [place, word(0), word(3), word(1)])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@jit
def apply_and_log(model: Any, indices: Any, values: Any, before: Any, after: Any) -> int:
    """Subtract values and note both sides; return -1, or where the first result is not finite."""
    last = indices.size - 1
    for i in range(indices.size):
        _fetch(model, indices[min(i + _AHEAD, last)])
        at = indices[i]
        before[i] = model[at]
        after[i] = before[i] - values[i]
        if not np.isfinite(after[i]):
            for j in range(i):  # each was written once, so that this is as if none had been
                model[indices[j]] = before[j]
            return i
        model[at] = after[i]
    return -1


@jit
def _count_below(coordinates: Any, value: int) -> int:
    """Return how many coordinates, which are sorted, are below a value."""
    low, high = 0, coordinates.size
    while low < high:
        middle = (low + high) >> 1
        if coordinates[middle] < value:
            low = middle + 1
        else:
            high = middle
    return low


@jit
def walk(
    coordinates: Any,
    now: Any,
    starts: Any,
    then: Any,
    first: int,
    held: Any,
    held_values: Any,
    ends: Any,
    floors: Any,
    bounds: Any,
    indices: Any,
    values: Any,
    counts: Any,
    reached: Any,
) -> int:
    """Merge what was held and what changed, the first change of a coordinate counting."""
    size, changes = then.size, starts.size - 1
    at, stop = np.empty(changes, np.int64), np.empty(changes, np.int64)
    for c in range(changes):
        mine = coordinates[starts[c] : starts[c + 1]]
        at[c] = starts[c] + _count_below(mine, first)
        stop[c] = starts[c] + _count_below(mine, first + size)
    length = _LEAST_BLOCK
    while length * _BLOCKS < size:
        length *= 2
    seen, passing = np.zeros(length // 64, np.uint64), np.zeros(length // 64, np.uint64)
    summary = np.zeros(length // 4096, np.uint64)
    differences = np.empty(length + 1, np.float32)
    counts[:] = 0
    reached[:] = 0
    count, segment, next_held = 0, 0, 0
    for block in range(0, size, length):
        while block >= ends[segment]:
            segment += 1
        _walk_block(
            coordinates, now, at, stop, then, first, block, ends, floors, segment,
            seen, passing, summary, differences,
        )  # fmt: skip
        while next_held < held.size and held[next_held] < block + length:
            here = held[next_held] - block
            word, bit = here >> 6, _ONE << np.uint64(here & 63)
            if (seen[word] & bit) == _NONE:
                passing[word] |= bit
                summary[word >> 6] |= _ONE << np.uint64(word & 63)
                differences[here] = held_values[next_held]
            next_held += 1
        seen[:] = _NONE
        for s in range(summary.size):
            words = summary[s]
            summary[s] = _NONE
            while words != _NONE:
                word = (s << 6) + int(trailing_zeros(words))
                words &= words - _ONE
                bits = passing[word]
                passing[word] = _NONE
                while bits != _NONE:
                    here = (word << 6) + int(trailing_zeros(bits))
                    bits &= bits - _ONE
                    while block + here >= ends[segment]:
                        segment += 1
                    value = differences[here]
                    indices[count], values[count] = block + here, value
                    counts[segment] += 1
                    reached[segment] += bits_of(value) >= bounds[segment]
                    count += 1
    return count


@jit
def _walk_block(
    coordinates: Any,
    now: Any,
    at: Any,
    stop: Any,
    then: Any,
    first: int,
    block: int,
    ends: Any,
    floors: Any,
    first_segment: int,
    seen: Any,
    passing: Any,
    summary: Any,
    differences: Any,
) -> None:
    """Mark what changed in a block, and move on to where the next block begins."""
    spare = differences.size - 1
    for c in range(at.size):
        j, behind = at[c], stop[c]
        segment = first_segment
        end, floor = ends[segment], floors[segment]
        while j < behind:
            i = coordinates[j] - first
            if i >= block + spare:
                break
            _fetch(then, coordinates[min(j + _AHEAD, behind - 1)] - first)
            while i >= end:
                segment += 1
                end, floor = ends[segment], floors[segment]
            here = i - block
            word, place = here >> 6, np.uint64(here & 63)
            difference = now[j] - then[i]
            old = seen[word]
            seen[word] = old | (_ONE << place)
            fresh = (old >> place) & _ONE == _NONE
            passes = fresh & (bits_of(difference) >= floor)
            differences[here if passes else spare] = difference  # without a branch
            passing[word] |= np.uint64(passes) << place
            summary[word >> 6] |= np.uint64(passes) << np.uint64(word & 63)
            j += 1
        at[c] = j


@jit
def largest(values: Any, counts: Any, wanted: Any, bounds: Any, ties: Any) -> None:
    """Find the bound of each segment's largest, where some are wanted."""
    start = 0
    for segment in range(counts.size):
        stop, k = start + counts[segment], wanted[segment]
        if k > 0 and counts[segment] > k:
            bound, equal = kth(values[start:stop], None, counts[segment], k)
            bounds[segment], ties[segment] = np.uint32(bound), equal
        elif k > 0:
            bound = np.uint32(0x7FFFFFFF) if counts[segment] else np.uint32(0)
            for i in range(start, stop):
                bound = min(bound, bits_of(values[i]))
            bounds[segment], ties[segment] = bound, counts[segment]
        start = stop


@jit
def choose(values: Any, counts: Any, bounds: Any, ties: Any, positions: Any) -> int:
    """Write the positions of what is above its segment's bound, and of the first that equal it."""
    start, count = 0, 0
    for segment in range(counts.size):
        bound, left = bounds[segment], ties[segment]
        stop = start + counts[segment]
        for i in range(start, stop):
            bits = bits_of(values[i])
            tie = bits == bound
            positions[count] = i
            count += (bits > bound) | (tie & (left > 0))
            left -= tie
        start = stop
    return count


@jit
def retain(
    indices: Any,
    values: Any,
    counts: Any,
    floors: Any,
    most: Any,
    kept: Any,
    kept_values: Any,
) -> int:
    """Keep what is at or above its segment's floor; where that is too much, raise the floor."""
    start, count = 0, 0
    for segment in range(counts.size):
        stop, began = start + counts[segment], count
        floor = floors[segment]
        for i in range(start, stop):
            kept[count] = indices[i]
            kept_values[count] = values[i]
            count += bits_of(values[i]) >= floor
        if count - began > most[segment]:
            found, k = count - began, (most[segment] + 1) // 2
            floor = np.uint32(0x80000000)
            if k > 0:
                bound, _ = kth(kept_values[began:count], None, found, k)
                above = 0
                for i in range(began, count):
                    above += bits_of(kept_values[i]) >= np.uint32(bound)
                floor = np.uint32(bound + (above > most[segment]))
            last, count = count, began
            for i in range(began, last):
                kept[count], kept_values[count] = kept[i], kept_values[i]
                count += bits_of(kept_values[i]) >= floor
            floors[segment] = floor
        counts[segment] = count - began
        start = stop
    return count


@jit
def scan_segments(
    model: Any,
    replica: Any,
    ends: Any,
    bounds: Any,
    most: Any,
    indices: Any,
    values: Any,
    counts: Any,
) -> int:
    """Scan each segment at its bound; write nothing of those with more entries than wanted."""
    start, count = 0, 0
    for segment in range(ends.size):
        stop = ends[segment]
        counts[segment] = 0
        if most[segment] > 0 and stop > start:
            room = min(count + most[segment], indices.size)
            counts[segment] = collect(
                model[start:stop],
                replica[start:stop],
                bounds[segment],
                start,
                indices[count:room],
                values[count:room],
            )
            if counts[segment] <= most[segment]:
                count += counts[segment]
        start = stop
    return count


@jit
def scan_largest(
    model: Any, replica: Any, ends: Any, wanted: Any, indices: Any, values: Any, counts: Any
) -> int:
    """Write the largest entries of each segment."""
    start, count = 0, 0
    for segment in range(ends.size):
        stop = ends[segment]
        k = min(wanted[segment], stop - start)
        counts[segment] = 0
        if k > 0:
            # what lies behind the k entries is scratch: with more of it, a sample may mislead more
            counts[segment] = top_k(
                model[start:stop],
                replica[start:stop],
                k,
                start,
                indices[count : count + 4 * k + 4096],
                values[count : count + 4 * k + 4096],
            )
            count += counts[segment]
        start = stop
    return count
