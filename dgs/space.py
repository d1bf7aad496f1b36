"""The index space of a model: its logical tensors, flattened one after another.

The server knows nothing of layouts. It holds the tensors that a single-process model has, unsharded
and by those names, row-major in one index space [0, N), float buffers last. What one member of a
worker holds of it stands in `dgs.view`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import prod

import numpy as np
import numpy.typing as npt

from dgs.errors import ConfigError, ModelMismatchError, ViewError

__all__ = [
    "MAX_MEMBERS",
    "MAX_NAMES",
    "MAX_NAME_BYTES",
    "MAX_NUMBERS",
    "MAX_RANK",
    "MAX_SIZE",
    "MAX_SLABS",
    "SEGMENT_LIMIT",
    "FloatArray",
    "Int64Array",
    "ParameterSpace",
    "TensorSpec",
]

Int64Array = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]

SEGMENT_LIMIT = 1 << 22
"""Longest segment, in coordinates. Shards are cut between segments, so that selection and block
scales, which never cross a segment, do not depend on the number of shards."""

# What a model and its views may hold at most. A server reads them from peers, so each bounds what
# one request can cost in time and memory; no model that was ever trained comes near any of them.

MAX_SIZE = 1 << 48
"""Coordinates of a model, and product of the extents above 0 of a tensor: index arithmetic, with
its strides, stays exact in int64."""

MAX_RANK = 64
"""Dimensions of a tensor; torch's own limit."""

MAX_NAMES = 1 << 20
"""Names in a model, aliases included. Reading one takes some microseconds."""

MAX_NAME_BYTES = 1024
"""UTF-8 bytes of a name: error texts carry names, and gRPC carries 8 KiB of error text."""

MAX_MEMBERS = 1 << 16
"""Members of a worker: a frame's header has 16 bits for them."""

MAX_SLABS = 1 << 18
"""Slabs in all views of a worker together. Reading and checking one takes some microseconds, each
time that a member joins."""

MAX_NUMBERS = 1 << 22
"""Extents, or first indices, in all shapes of a model, or in all its slabs, together."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One logical tensor: the name and shape it has in the single-process model."""

    name: str
    shape: tuple[int, ...]
    buffer: bool = False
    aliases: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Count the tensor's coordinates; 1 for a scalar."""
        return prod(self.shape)


def _check_names(tensors: Sequence[TensorSpec]) -> None:
    names = sum(1 + len(t.aliases) for t in tensors)
    if names > MAX_NAMES:
        raise ViewError(f"the model has {names} names; at most {MAX_NAMES} are possible")


def _check_name(name: str) -> None:
    """Refuse a name that is too long, or that UTF-8, and so a message, cannot hold."""
    if name.isascii() and len(name) <= MAX_NAME_BYTES:  # nearly all; encoding takes longer
        return
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        raise ViewError(f"the name {name[:40]!r} of a tensor is not valid Unicode") from None
    if length > MAX_NAME_BYTES:
        raise ViewError(
            f"the name of tensor {name[:40]!r}... has {length} bytes; at most {MAX_NAME_BYTES} are "
            "possible"
        )


def _checked_size(spec: TensorSpec) -> int:
    """Count a tensor's coordinates, without ever making a number that is too large."""
    if len(spec.shape) > MAX_RANK:
        raise ViewError(
            f"tensor {spec.name!r} has {len(spec.shape)} dimensions; at most {MAX_RANK} are "
            "possible"
        )
    product = 1  # of the extents above 0: an empty tensor has strides, too
    for n in spec.shape:
        product *= max(n, 1)
        if n < 0 or product > MAX_SIZE:
            shown = ", ".join(map(str, spec.shape[:8])) + (", ..." if len(spec.shape) > 8 else "")
            raise ViewError(
                f"tensor {spec.name!r} has the impossible shape [{shown}]; its extents must be "
                "at least 0, and those above 0 may multiply to at most 2**48"
            )
    return 0 if 0 in spec.shape else product


@dataclass(frozen=True)
class ParameterSpace:
    """An ordered list of logical tensors, flattened into one index space [0, N).

    Args:
        tensors: parameters first, buffers last; names (aliases included) unique.

    Raises:
        ViewError: a name occurs twice or cannot travel, a shape is impossible, a parameter follows
            a buffer, or there is more of something than the limits of this module allow.

    Example:
        >>> space = ParameterSpace((TensorSpec("w", (3, 2)), TensorSpec("b", (3,))))
        >>> space.size, space.tensor_at(7).name
        (9, 'b')
    """

    tensors: tuple[TensorSpec, ...]

    def __post_init__(self) -> None:
        """Check names, shapes and order."""
        _check_names(self.tensors)
        seen: set[str] = set()
        buffers, size, numbers = False, 0, 0
        for t in self.tensors:
            for name in (t.name, *t.aliases):
                _check_name(name)
                if name in seen:
                    raise ViewError(f"the model names tensor {name!r} twice")
                seen.add(name)
            if buffers and not t.buffer:
                raise ViewError(f"parameter {t.name!r} stands behind a buffer; put buffers last")
            buffers = t.buffer
            numbers += len(t.shape)
            size += _checked_size(t)
            if size > MAX_SIZE or numbers > MAX_NUMBERS:
                raise ViewError(
                    f"tensor {t.name!r} makes the model too large: at most 2**48 coordinates and "
                    f"{MAX_NUMBERS} extents are possible"
                )

    @cached_property
    def offsets(self) -> Int64Array:
        """First global index of each tensor, then N; shape ``(tensors + 1,)``."""
        sizes = [t.size for t in self.tensors]
        return np.cumsum(np.array([0, *sizes], dtype=np.int64))

    @cached_property
    def size(self) -> int:
        """Count the coordinates, buffers included (N)."""
        return sum(t.size for t in self.tensors)

    @cached_property
    def num_parameters(self) -> int:
        """Count the coordinates that are trained; those of buffers follow them."""
        return sum(t.size for t in self.tensors if not t.buffer)

    @cached_property
    def segment_bounds(self) -> Int64Array:
        """Global bounds of the segments: tensors, cut where longer than `SEGMENT_LIMIT`."""
        pieces = -(-np.diff(self.offsets) // SEGMENT_LIMIT)
        nth = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        starts = np.repeat(self.offsets[:-1], pieces) + nth * SEGMENT_LIMIT
        return np.append(starts, self.size)

    def count_segments(self, start: int, stop: int) -> int:
        """Count the segments of parameters in a shard: the most that a session there can have.

        Args:
            start: first global index of the shard.
            stop: global index behind the shard.
        """
        stop = min(stop, self.num_parameters)
        first, last = np.searchsorted(self.segment_bounds, [start, stop])
        return max(0, int(last - first))

    def shard_ranges(self, num_shards: int) -> list[tuple[int, int]]:
        """Split [0, N) into contiguous ranges, each cut at the segment bound nearest to even.

        Args:
            num_shards: number of server processes, at least 1.

        Returns:
            One ``(start, stop)`` per shard; a model with few segments may leave some empty.
        """
        bounds = self.segment_bounds
        ideal = np.arange(1, num_shards) * self.size / num_shards
        right = np.minimum(np.searchsorted(bounds, ideal), len(bounds) - 1)
        left = np.maximum(right - 1, 0)
        nearest = np.where(ideal - bounds[left] <= bounds[right] - ideal, left, right)
        cuts = [0, *bounds[nearest].tolist(), self.size]
        return list(pairwise(cuts))

    def tensor_at(self, index: int) -> TensorSpec:
        """Return the tensor that global `index` belongs to."""
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is outside the model's {self.size} coordinates")
        return self.tensors[int(np.searchsorted(self.offsets, index, side="right")) - 1]

    def first_difference(self, other: ParameterSpace) -> str | None:
        """Describe the first tensor in which `other` differs, or return None if none does."""
        for i, (mine, theirs) in enumerate(zip(self.tensors, other.tensors, strict=False)):
            if mine.name != theirs.name:
                return f"tensor {i} is {mine.name!r} here and {theirs.name!r} there"
            if mine.shape != theirs.shape:
                a, b = list(mine.shape), list(theirs.shape)
                return f"tensor {mine.name!r} has shape {a} here and {b} there"
            if mine.buffer != theirs.buffer:
                kinds = ("a parameter", "an averaged buffer")
                ours, other_kind = kinds[mine.buffer], kinds[theirs.buffer]
                return f"tensor {mine.name!r} is {ours} here and {other_kind} there"
        if len(self.tensors) != len(other.tensors):
            short, long, where = self.tensors, other.tensors, "here"
            if len(short) > len(long):
                short, long, where = long, short, "there"
            extra = long[len(short)]
            return f"tensor {extra.name!r} of shape {list(extra.shape)} is missing {where}"
        return None

    def flatten(self, tensors: Mapping[str, FloatArray]) -> FloatArray:
        """Lay out tensors given by name (or by an alias) in this order; others are ignored.

        Raises:
            ModelMismatchError: a tensor is missing or has another shape; names it.
            ConfigError: a tensor holds NaN or infinity, or what float32 cannot hold; names it.
        """
        flat = np.empty(self.size, dtype=np.float32)
        for spec, (a, b) in zip(self.tensors, pairwise(self.offsets.tolist()), strict=True):
            names = (n for n in (spec.name, *spec.aliases) if n in tensors)
            given = tensors.get(next(names, ""))
            if given is None:
                raise ModelMismatchError(
                    f"tensor {spec.name!r} of shape {list(spec.shape)} is missing"
                )
            if given.shape != spec.shape:
                raise ModelMismatchError(
                    f"tensor {spec.name!r} has shape {list(given.shape)} instead of "
                    f"{list(spec.shape)}"
                )
            with np.errstate(over="ignore"):  # what overflows float32 is refused below
                flat[a:b] = given.reshape(-1)
            if not np.isfinite(flat[a:b]).all():
                raise ConfigError(
                    f"the initial model holds NaN, infinity or more than float32 can in tensor "
                    f"{spec.name!r}; give a model that is finite"
                )
        return flat

    def unflatten(self, flat: FloatArray) -> dict[str, FloatArray]:
        """Cut a whole model into copies of its tensors, by name and by each alias.

        Args:
            flat: shape ``(N,)``.
        """
        bounds = pairwise(self.offsets.tolist())
        return {
            name: flat[a:b].reshape(spec.shape).copy()
            for spec, (a, b) in zip(self.tensors, bounds, strict=True)
            for name in (spec.name, *spec.aliases)
        }
