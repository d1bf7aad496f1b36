"""The index space of a model: its logical tensors, flattened one after another.

The server knows nothing of layouts. It holds the tensors that a single-process model has, unsharded
and by those names, row-major in one index space [0, N), float buffers last. What one member of a
worker holds of it stands in `dgs.view`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import prod

import numpy as np
import numpy.typing as npt

from dgs.errors import ModelMismatchError, ViewError

__all__ = ["SEGMENT_LIMIT", "FloatArray", "Int64Array", "ParameterSpace", "TensorSpec"]

Int64Array = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]

SEGMENT_LIMIT = 1 << 22
"""Longest segment, in coordinates. Shards are cut between segments, so that selection and block
scales, which never cross a segment, do not depend on the number of shards."""


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


@dataclass(frozen=True)
class ParameterSpace:
    """An ordered list of logical tensors, flattened into one index space [0, N).

    Args:
        tensors: parameters first, buffers last; names (aliases included) unique.

    Raises:
        ViewError: a name occurs twice, a shape is negative, or a parameter follows a buffer.

    Example:
        >>> space = ParameterSpace((TensorSpec("w", (3, 2)), TensorSpec("b", (3,))))
        >>> space.size, space.tensor_at(7).name
        (9, 'b')
    """

    tensors: tuple[TensorSpec, ...]

    def __post_init__(self) -> None:
        """Check names, shapes and order."""
        seen: set[str] = set()
        buffers = False
        for t in self.tensors:
            for name in (t.name, *t.aliases):
                if name in seen:
                    raise ViewError(f"the model names tensor {name!r} twice")
                seen.add(name)
            if any(n < 0 for n in t.shape):
                raise ViewError(f"tensor {t.name!r} has the impossible shape {list(t.shape)}")
            if buffers and not t.buffer:
                raise ViewError(f"parameter {t.name!r} stands behind a buffer; put buffers last")
            buffers = t.buffer
        if self.size >= 1 << 48:
            raise ViewError(f"the model has {self.size} coordinates; at most 2**48 are possible")

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
        bounds = [0]
        for start, stop in pairwise(self.offsets.tolist()):
            bounds.extend(range(start + SEGMENT_LIMIT, stop, SEGMENT_LIMIT))
            if stop > bounds[-1]:
                bounds.append(stop)
        return np.array(bounds, dtype=np.int64)

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
            flat[a:b] = given.reshape(-1)
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
