"""Exact top-k in about one pass: a sample bounds the threshold, a radix histogram settles it.

A magnitude's 31 bits, taken as a whole number, order as the magnitudes do. A bound that is surely
a little below the threshold comes from a histogram of a sample; the pass that collects what is at
or above it leaves few candidates, among which three histograms over 11, 10 and 10 bits find the
threshold to the last bit. A sample that misleads costs time, never the result: with too few or too
many candidates the same histograms are taken over the whole tensor.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from dgs.kernels.cpu_lanes import bits_of, jit
from dgs.kernels.cpu_select import accumulate, collect

__all__ = ["accumulate_top_k", "kth", "top_k"]

_ALL: Final = np.uint32(1)  # the bound that lets everything but zeros pass
_SIGN_LESS: Final = 0x7FFFFFFF
_SAMPLE_RUN: Final = 32
_SAMPLE_RUNS: Final = 1024
_SHORTEST_STRIDE: Final = 2039  # a prime, so that no row length falls in step with it
_SAMPLE_BITS: Final = 13
_SAMPLE_SHIFT: Final = 31 - _SAMPLE_BITS
_SPARE: Final = 1024


@jit
def _value(left: Any, right: Any, i: int) -> Any:
    return left[i] if right is None else left[i] - right[i]


@jit
def _sampled_bound(left: Any, right: Any, local: Any, k: int) -> Any:
    """Return bits that some more than `k` entries are likely to reach.

    The entries are those of `left`, of ``left - right``, or of ``left + (right - local)``.
    """
    histogram = np.zeros(1 << _SAMPLE_BITS, np.int32)
    size, taken = left.size, 0
    stride = max(_SHORTEST_STRIDE, size // _SAMPLE_RUNS | 1)
    for start in range(0, size - _SAMPLE_RUN, stride):
        for i in range(start, start + _SAMPLE_RUN):
            value = _value(left, right, i) if local is None else left[i] + (right[i] - local[i])
            histogram[np.intp(bits_of(value)) >> _SAMPLE_SHIFT] += 1
        taken += _SAMPLE_RUN
    share = k * taken / size
    wanted = share + 4.0 * np.sqrt(share) + 8.0
    bucket, above = (1 << _SAMPLE_BITS) - 1, 0
    while bucket > 0:
        above += histogram[bucket]
        if above >= wanted:
            break
        bucket -= 1
    return np.uint32(max(bucket << _SAMPLE_SHIFT, 1))


@jit
def kth(left: Any, right: Any, size: int, k: int) -> Any:
    """Return the bits of the k-th largest magnitude, and how many equal ones are among the k."""
    prefix, known, shift, left_over = 0, 0, 20, k
    histogram = np.empty(1 << 11, np.int32)
    for _ in range(3):
        histogram[:] = 0
        for i in range(size):
            bits = np.intp(bits_of(_value(left, right, i)))
            if (bits & known) == prefix:
                histogram[(bits ^ prefix) >> shift] += 1
        bucket = (1 << 11) - 1
        while bucket > 0 and histogram[bucket] < left_over:
            left_over -= histogram[bucket]
            bucket -= 1
        prefix |= bucket << shift
        known = _SIGN_LESS ^ ((1 << shift) - 1)
        shift = max(shift - 10, 0)
    return prefix, left_over


@jit
def _keep(left: Any, right: Any, k: int, first: int, indices: Any, values: Any) -> int:
    """Write the indices of the k largest entries."""
    size = left.size
    threshold, ties = kth(left, right, size, k)
    if threshold == 0:
        threshold, ties = 1, size  # all that are not zero
    count = 0
    for i in range(size):
        value = _value(left, right, i)
        bits = np.intp(bits_of(value))
        if bits > threshold or (bits == threshold and ties > 0):
            ties -= bits == threshold
            indices[count] = first + i
            values[count] = value
            count += 1
    return count


@jit
def _keep_candidates(found: int, k: int, indices: Any, values: Any) -> int:
    """Move the k largest of the candidates to the front."""
    threshold, ties = kth(values, None, found, k)
    count = 0
    for j in range(found):
        value = values[j]
        bits = np.intp(bits_of(value))
        tie = bits == threshold
        indices[count] = indices[j]  # without a branch: which are kept is hard to predict
        values[count] = value
        count += (bits > threshold) | (tie & (ties > 0))
        ties -= tie
    return count


@jit
def _finish(
    left: Any,
    right: Any,
    found: int,
    bound: Any,
    k: int,
    first: int,
    indices: Any,
    values: Any,
) -> int:
    """Choose from the candidates where they are enough and all there, else from everything."""
    if found <= indices.size:
        if found >= k:
            return _keep_candidates(found, k, indices, values)
        if bound == _ALL:  # fewer than k entries are not zero
            return found
    return _keep(left, right, k, first, indices, values)


@jit
def top_k(left: Any, right: Any, k: int, first: int, indices: Any, values: Any) -> int:
    """Write the indices of the k largest of ``left - right``, or of `left` with no right."""
    bound = _ALL
    if min(indices.size, 2 * k + _SPARE) < left.size:
        bound = _sampled_bound(left, right, None, k)
    found = collect(left, right, bound, first, indices, values)
    return _finish(left, right, found, bound, k, first, indices, values)


@jit
def accumulate_top_k(
    velocity: Any,
    base: Any,
    local: Any,
    k: int,
    first: int,
    indices: Any,
    values: Any,
) -> int:
    """Compute ``velocity += base - local`` and write the indices of the k largest."""
    bound = _ALL
    if min(indices.size, 2 * k + _SPARE) < velocity.size:
        bound = _sampled_bound(velocity, base, local, k)
    found = accumulate(velocity, base, local, bound, first, indices, values)
    return _finish(velocity, None, found, bound, k, first, indices, values)
