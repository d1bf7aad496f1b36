"""The kernels of `dgs.kernels.reference`, compiled for this machine's CPU by numba.

Nothing that runs compiled checks a bound, so each function here checks the arrays' types and sizes
first. Indices are the caller's to vouch for; those of `dgs.codec.decode_body` are good.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import numpy.typing as npt

from dgs.config import Values
from dgs.errors import ConfigError
from dgs.kernels import cpu_changes, cpu_select, cpu_topk
from dgs.kernels.cpu_codec import decode_body, encode_body

__all__ = [
    "NAME",
    "accumulate_and_select",
    "accumulate_and_top_k",
    "add_and_select",
    "apply_update",
    "decode_body",
    "encode_body",
    "exact_top_k",
    "record",
    "scan",
    "scan_top_k",
    "settle",
    "warm_up",
]

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]

if sys.byteorder != "little":
    raise ImportError("the codec kernels read words as little-endian processors do")

NAME = "cpu"
"""What this implementation is called in messages."""

_FLOAT32 = np.dtype(np.float32)
_INT64 = np.dtype(np.int64)
_KINDS: tuple[Values, ...] = ("float32", "bfloat16", "int8", "int4", "int2", "sign")


def warm_up() -> float:
    """Compile everything, or load it from the cache, by running it once.

    Returns:
        Seconds that this took.
    """
    began = time.perf_counter()
    ramp = np.arange(1, 65, dtype=np.float32)
    indices, values = np.zeros(64, np.int64), np.zeros(64, np.float32)
    accumulate_and_select(ramp.copy(), ramp, ramp, 9.0, indices, values)
    add_and_select(ramp.copy(), ramp, 9.0, indices, values)
    scan(ramp, -ramp, 0.0, indices, values)
    exact_top_k(ramp, 8, indices, values)
    accumulate_and_top_k(ramp.copy(), ramp, ramp, 8, indices, values)
    count = scan_top_k(ramp, -ramp, 8, indices, values)
    apply_update(ramp.copy(), indices[:count], values[:count])
    settle(ramp.copy(), indices[:count], values[:count], 0.5)
    record(ramp.copy(), ramp, indices[:count], values[:count])
    for kind in _KINDS:
        body = encode_body(indices[:count], values[:count], [1000, 0], kind).body
        decode_body(body, [1000, 0], kind, count)
    cpu_changes.warm_up()
    return time.perf_counter() - began


def accumulate_and_select(
    velocity: Float32Array,
    base: Float32Array,
    local: Float32Array,
    threshold: float,
    indices: Int64Array,
    values: Float32Array,
    *,
    first: int = 0,
) -> int:
    """Compute ``velocity += base - local`` and find what is large; see the reference."""
    _check(velocity, base, local)
    _check_room(indices, values)
    return cpu_select.accumulate_and_select(
        velocity, base, local, _checked(threshold), first, indices, values
    )


def add_and_select(
    velocity: Float32Array,
    progress: Float32Array,
    threshold: float,
    indices: Int64Array,
    values: Float32Array,
    *,
    first: int = 0,
) -> int:
    """Compute ``velocity += progress`` and find what is large; see the reference."""
    _check(velocity, progress)
    _check_room(indices, values)
    threshold = _checked(threshold)
    return cpu_select.add_and_select(velocity, progress, threshold, first, indices, values)


def exact_top_k(
    candidates: Float32Array,
    k: int,
    indices: Int64Array,
    values: Float32Array,
    *,
    first: int = 0,
) -> int:
    """Find the entries of largest magnitude; see the reference."""
    _check(candidates)
    k = _checked_k(k, candidates, indices, values)
    return cpu_topk.top_k(candidates, None, k, first, indices, values)


def accumulate_and_top_k(
    velocity: Float32Array,
    base: Float32Array,
    local: Float32Array,
    k: int,
    indices: Int64Array,
    values: Float32Array,
    *,
    first: int = 0,
) -> int:
    """Compute ``velocity += base - local`` and find its largest; see the reference."""
    _check(velocity, base, local)
    k = _checked_k(k, velocity, indices, values)
    return cpu_topk.accumulate_top_k(velocity, base, local, k, first, indices, values)


def scan(
    model: Float32Array,
    replica: Float32Array,
    threshold: float,
    indices: Int64Array,
    values: Float32Array,
    *,
    first: int = 0,
) -> int:
    """Find where a replica lacks much of the model; see the reference."""
    _check(model, replica)
    _check_room(indices, values)
    return cpu_select.scan(model, replica, _checked(threshold), first, indices, values)


def scan_top_k(
    model: Float32Array,
    replica: Float32Array,
    k: int,
    indices: Int64Array,
    values: Float32Array,
    *,
    first: int = 0,
) -> int:
    """Find the largest entries of ``model - replica``; see the reference."""
    _check(model, replica)
    k = _checked_k(k, model, indices, values)
    return cpu_topk.top_k(model, replica, k, first, indices, values)


def apply_update(model: Float32Array, indices: Int64Array, values: Float32Array) -> int:
    """Subtract an update from the model, or refuse it whole; see the reference."""
    _check(model)
    _check_room(indices, values)
    return cpu_select.apply_update(model, indices, values)


def settle(
    velocity: Float32Array, indices: Int64Array, update: Float32Array, momentum: float
) -> None:
    """Decay what was sent; see the reference."""
    _check(velocity)
    _check_room(indices, update)
    cpu_select.settle(velocity, indices, update, np.float32(momentum))


def record(
    replica: Float32Array, model: Float32Array, indices: Int64Array, values: Float32Array
) -> None:
    """Set entries of the replica to the model's; see the reference."""
    _check(replica, model)
    _check_room(indices, values)
    cpu_select.record(replica, model, indices, values)


def _check(*arrays: Float32Array) -> None:
    size = arrays[0].size
    for array in arrays:
        if array.dtype != _FLOAT32 or array.ndim != 1 or not array.flags.c_contiguous:
            raise ConfigError("kernels take flat, contiguous float32 arrays")
        if array.size != size:
            raise ConfigError(f"arrays of {size} and {array.size} entries do not match")


def _check_room(indices: Int64Array, values: Float32Array) -> None:
    _check(values)
    if indices.dtype != _INT64 or indices.ndim != 1 or not indices.flags.c_contiguous:
        raise ConfigError("kernels take flat, contiguous int64 indices")
    if indices.size != values.size:
        raise ConfigError(f"{indices.size} indices and {values.size} values do not match")


def _checked(threshold: float) -> float:
    if not threshold >= 0.0:
        raise ConfigError(f"the threshold is {threshold}; it must not be negative")
    return threshold


def _checked_k(k: int, candidates: Float32Array, indices: Int64Array, values: Float32Array) -> int:
    _check_room(indices, values)
    k = min(max(k, 0), candidates.size)
    if indices.size < k:
        raise ConfigError(f"there is room for {indices.size} entries, but {k} are wanted")
    return k
