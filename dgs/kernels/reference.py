"""What each kernel computes, in plain numpy and torch: the definition that fast ones are held to.

Arrays are flat float32; indices int64. A *magnitude* is compared by its bits, so that subnormal
numbers count also where the processor treats them as zero, and NaN counts as larger than anything.
Entries that are zero, of either sign, are never selected.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from dgs.codec import decode_body, encode_body
from dgs.errors import ConfigError
from dgs.select import top_k_indices

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

NAME = "reference"
"""What this implementation is called in messages."""


def warm_up() -> float:
    """Return 0.0: there is nothing to compile."""
    return 0.0


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
    """Accumulate progress and find what is large.

    ``velocity += base - local``, then the entries with ``|velocity| >= threshold``.

    Args:
        velocity: shape ``(n,)``; changed in place.
        base: same shape.
        local: same shape.
        threshold: not negative; at 0, everything that is not zero is selected.
        indices: written: ascending indices of what was selected.
        values: written: the velocity there.
        first: added to the indices, for ranges of a larger array.

    Returns:
        How many entries were selected. Where these are more than there is room for, the first are
        written, and the velocity is complete nevertheless.

    Raises:
        ConfigError: the threshold is negative or NaN.

    Example:
        >>> velocity, room = np.zeros(3, np.float32), (np.zeros(3, np.int64), np.ones(3, "f4"))
        >>> base, local = np.array([[3, 1, -2], [1, 1, 1]], np.float32)
        >>> accumulate_and_select(velocity, base, local, 2.0, *room)
        2
        >>> room[0][:2].tolist(), room[1][:2].tolist(), velocity.tolist()
        ([0, 2], [2.0, -3.0], [2.0, 0.0, -3.0])
    """
    progress = _difference(base, local)
    return add_and_select(velocity, progress, threshold, indices, values, first=first)


def add_and_select(
    velocity: Float32Array,
    progress: Float32Array,
    threshold: float,
    indices: Int64Array,
    values: Float32Array,
    *,
    first: int = 0,
) -> int:
    """Accumulate given progress and find what is large; see `accumulate_and_select`."""
    _add(velocity, progress)
    return _compact(velocity, threshold, indices, values, first)


def exact_top_k(
    candidates: Float32Array,
    k: int,
    indices: Int64Array,
    values: Float32Array,
    *,
    first: int = 0,
) -> int:
    """Find the entries of largest magnitude, as `dgs.select.top_k_indices` does.

    Args:
        candidates: shape ``(n,)``, finite; not modified.
        k: number of entries wanted, in ``[0, n]``.
        indices: written, ascending; has room for `k`. Ties go to the lower index. A compiled
            kernel uses the rest as scratch, and is several times faster where there is room for
            ``2 * k + 1024`` entries, or for all.
        values: written: the candidates there; of the same size as `indices`.
        first: added to the indices.

    Returns:
        How many were found; fewer than `k` only where fewer entries differ from zero.
    """
    chosen = top_k_indices(torch.from_numpy(candidates), k).numpy()
    indices[: chosen.size] = chosen + first
    values[: chosen.size] = candidates[chosen]
    return chosen.size


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
    """Compute ``velocity += base - local`` and find its largest entries; see `exact_top_k`."""
    _add(velocity, _difference(base, local))
    return exact_top_k(velocity, k, indices, values, first=first)


def scan(
    model: Float32Array,
    replica: Float32Array,
    threshold: float,
    indices: Int64Array,
    values: Float32Array,
    *,
    first: int = 0,
) -> int:
    """Find where a replica lacks much of the model: ``|model - replica| >= threshold``.

    Args:
        model: shape ``(n,)``; not modified.
        replica: same shape; not modified.
        threshold: not negative; at 0, everything that differs is selected.
        indices: written: ascending indices of what was selected.
        values: written: ``model - replica`` there.
        first: added to the indices.

    Returns:
        How many entries were selected; the first are written where there is no room for all.

    Raises:
        ConfigError: the threshold is negative or NaN.
    """
    return _compact(_difference(model, replica), threshold, indices, values, first)


def scan_top_k(
    model: Float32Array,
    replica: Float32Array,
    k: int,
    indices: Int64Array,
    values: Float32Array,
    *,
    first: int = 0,
) -> int:
    """Find the largest entries of ``model - replica``; see `exact_top_k`."""
    return exact_top_k(_difference(model, replica), k, indices, values, first=first)


def apply_update(model: Float32Array, indices: Int64Array, values: Float32Array) -> int:
    """Subtract an update from the model, or refuse it whole.

    Args:
        model: shape ``(n,)``; changed in place where the update is accepted.
        indices: unique, in ``[0, n)``.
        values: one per index.

    Returns:
        -1, or the position in the update of the first entry that would leave NaN or infinity in
        the model, which is then unchanged.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        after = model[indices] - values
    finite = np.isfinite(after)
    if not finite.all():
        return int(np.argmin(finite))
    model[indices] = after
    return -1


def settle(
    velocity: Float32Array, indices: Int64Array, update: Float32Array, momentum: float
) -> None:
    """Decay what was sent: ``velocity = update * momentum + (velocity - update)``.

    Args:
        velocity: shape ``(n,)``; changed in place at the indices.
        indices: unique, in ``[0, n)``.
        update: what the other side decodes, one per index.
        momentum: in [0, 1).
    """
    velocity[indices] = update * np.float32(momentum) + (velocity[indices] - update)


def record(
    replica: Float32Array, model: Float32Array, indices: Int64Array, values: Float32Array
) -> None:
    """Set entries of the replica to the model's: ``replica[i] = model[i]``.

    Args:
        replica: shape ``(n,)``; changed in place at the indices.
        model: same shape; not modified.
        indices: unique, in ``[0, n)``.
        values: written: the model there, one per index.
    """
    values[:] = model[indices]
    replica[indices] = values


def _add(velocity: Float32Array, progress: Float32Array) -> None:
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is selected, and found
        velocity += progress


def _difference(model: Float32Array, replica: Float32Array) -> Float32Array:
    with np.errstate(over="ignore"):  # an infinite difference is still found
        return model - replica


def _compact(
    candidates: Float32Array,
    threshold: float,
    indices: Int64Array,
    values: Float32Array,
    first: int,
) -> int:
    if not threshold >= 0.0:
        raise ConfigError(f"the threshold is {threshold}; it must not be negative")
    magnitude = candidates.view(np.uint32) & np.uint32(0x7FFFFFFF)
    bound = max(int(np.float32(threshold).view(np.uint32)) & 0x7FFFFFFF, 1)
    chosen = np.flatnonzero(magnitude >= bound)
    written = chosen[: indices.size]
    indices[: written.size] = written + first
    values[: written.size] = candidates[written]
    return chosen.size
