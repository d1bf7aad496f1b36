"""What one member of a worker holds of a model, and which part of that each shard exchanges.

A member's `View` is, for each logical tensor, nothing or one rectangular `Slab`; its *local* index
space is its slabs flattened in the order of the tensors. Because both orders are row-major, the map
from local to global indices is strictly increasing: sorted local indices are sorted global ones,
and every range of the global space, such as a shard, is a range of the local one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Self

import numpy as np

from dgs.errors import ViewError
from dgs.space import Int64Array, ParameterSpace

__all__ = ["Part", "Slab", "View", "check_cover"]


@dataclass(frozen=True, slots=True)
class Slab:
    """A rectangle of one tensor: first index and extent per dimension."""

    tensor: int
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Count the slab's coordinates."""
        return prod(self.shape)


@dataclass(frozen=True)
class View:
    """What one member holds: at most one slab per tensor, in the order of the tensors.

    Args:
        space: the model's index space.
        slabs: the rectangles; tensors without one are not held.

    Raises:
        ViewError: a slab names an unknown tensor, leaves its tensor, or is out of order.

    Example:
        >>> from dgs.space import TensorSpec
        >>> space = ParameterSpace((TensorSpec("w", (3, 4)),))
        >>> right_half = View(space, (Slab(0, (0, 2), (3, 2)),))
        >>> right_half.to_global(np.arange(6)).tolist()
        [2, 3, 6, 7, 10, 11]
    """

    space: ParameterSpace
    slabs: tuple[Slab, ...]

    @classmethod
    def whole(cls, space: ParameterSpace) -> Self:
        """Hold every tensor whole: plain data parallelism."""
        slabs = (Slab(i, (0,) * len(t.shape), t.shape) for i, t in enumerate(space.tensors))
        return cls(space, tuple(slabs))

    def __post_init__(self) -> None:
        """Check that each slab lies inside its tensor."""
        last = -1
        for slab in self.slabs:
            if not 0 <= slab.tensor < len(self.space.tensors):
                count = len(self.space.tensors)
                raise ViewError(f"a view names tensor {slab.tensor}; the model has {count}")
            if slab.tensor <= last:
                raise ViewError("a view lists its slabs out of order, or one tensor twice")
            last = slab.tensor
            spec = self.space.tensors[slab.tensor]
            dims = (len(slab.offset), len(slab.shape))
            inside = dims == (len(spec.shape),) * 2 and all(
                o >= 0 and n >= 0 and o + n <= d
                for o, n, d in zip(slab.offset, slab.shape, spec.shape, strict=True)
            )
            if not inside:
                raise ViewError(
                    f"the slab at {list(slab.offset)} of shape {list(slab.shape)} does not lie "
                    f"inside tensor {spec.name!r} of shape {list(spec.shape)}"
                )

    @cached_property
    def offsets(self) -> Int64Array:
        """First local index of each slab, then the view's size; shape ``(slabs + 1,)``."""
        return np.cumsum(np.array([0, *(s.size for s in self.slabs)], dtype=np.int64))

    @property
    def size(self) -> int:
        """Count the coordinates held, buffers included."""
        return int(self.offsets[-1])

    @cached_property
    def num_parameters(self) -> int:
        """Count the coordinates held that are trained; those of buffers follow them."""
        return self.rank(self.space.num_parameters)

    def name_at(self, local: int) -> str:
        """Return the name of the tensor that local index `local` belongs to."""
        slab = self.slabs[int(np.searchsorted(self.offsets, local, side="right")) - 1]
        return self.space.tensors[slab.tensor].name

    @cached_property
    def _tensors(self) -> Int64Array:
        return np.array([s.tensor for s in self.slabs], dtype=np.int64)

    @cached_property
    def _radix(self) -> tuple[Int64Array, Int64Array, Int64Array]:
        """Extents, first indices and strides of all slabs, padded to the same rank.

        Dimensions that a slab holds in full are merged into the next outer one, so a contiguous
        slab has one dimension and costs one addition per index.
        """
        merged = [_merge(s, self.space.tensors[s.tensor].shape) for s in self.slabs]
        rank = max((len(m) for m in merged), default=1)
        nothing = np.array([1, 0, 1 << 62], dtype=np.int64)
        table = np.tile(nothing, (len(merged), rank, 1))
        for row, dims in zip(table, merged, strict=True):
            row[rank - len(dims) :] = dims
        return table[:, :, 0], table[:, :, 1], table[:, :, 2]

    def to_global(self, local: Int64Array) -> Int64Array:
        """Map local indices to global ones; strictly increasing.

        Args:
            local: indices in ``[0, size)``, any order, shape ``(k,)``.
        """
        if self.size == self.space.size:
            return local.astype(np.int64)
        shape, offset, stride = self._radix
        slab = np.searchsorted(self.offsets, local, side="right") - 1
        rest = local - self.offsets[slab]
        result = self.space.offsets[self._tensors[slab]]
        for d in reversed(range(shape.shape[1])):
            extent = shape[slab, d]
            result += (rest % extent + offset[slab, d]) * stride[slab, d]
            rest //= extent
        return result

    def to_local(self, index: Int64Array) -> Int64Array:
        """Map global indices to local ones, -1 where this view does not hold them.

        Args:
            index: global indices in ``[0, N)``, any order, shape ``(k,)``.
        """
        tensor = np.searchsorted(self.space.offsets, index, side="right") - 1
        slab = np.searchsorted(self._tensors, tensor)
        held = slab < len(self.slabs)
        held[held] = self._tensors[slab[held]] == tensor[held]
        shape, offset, stride = self._radix
        slab, rest = slab[held], index[held] - self.space.offsets[tensor[held]]
        local, inside = np.zeros_like(rest), np.ones(rest.shape, dtype=bool)
        for d in range(shape.shape[1]):
            digit, rest = np.divmod(rest, stride[slab, d])
            digit -= offset[slab, d]
            inside &= (digit >= 0) & (digit < shape[slab, d])
            local = local * shape[slab, d] + digit
        result = np.full(index.shape, -1, dtype=np.int64)
        result[held] = np.where(inside, local + self.offsets[slab], -1)
        return result

    def rank(self, index: int) -> int:
        """Count the held coordinates with a global index below `index`."""
        tensor = int(np.searchsorted(self.space.offsets, index, side="right")) - 1
        position = int(np.searchsorted(self._tensors, tensor))
        count = int(self.offsets[position])
        if position == len(self.slabs) or self._tensors[position] != tensor:
            return count
        rest = index - int(self.space.offsets[tensor])
        inner = self.slabs[position].size
        shape = self.space.tensors[tensor].shape
        for extent, first, stride in _merge(self.slabs[position], shape):
            inner //= max(extent, 1)
            digit, rest = divmod(rest, stride)
            if not first <= digit < first + extent:
                return count + (0 if digit < first else extent * inner)
            count += (digit - first) * inner
        return count


def _merge(slab: Slab, shape: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return (extent, first index, stride) per dimension, full inner dimensions merged outward."""
    dims: list[tuple[int, int, int]] = []
    stride, unit = 1, 1  # of the run of full dimensions that is being merged
    for offset, extent, full in zip(
        reversed(slab.offset), reversed(slab.shape), reversed(shape), strict=True
    ):
        if extent == full:
            unit *= full
        else:
            dims.append((extent * unit, offset * unit, stride))
            stride, unit = stride * unit * full, 1
    if unit > 1 or not dims:
        dims.append((unit, 0, stride))
    return dims[::-1]


def check_cover(space: ParameterSpace, views: Iterable[View]) -> None:
    """Check that the members' views hold each coordinate exactly once.

    Raises:
        ViewError: a coordinate is held by nobody, or by two members; names the tensor.
    """
    holders: list[list[tuple[int, Slab]]] = [[] for _ in space.tensors]
    for member, view in enumerate(views):
        for slab in view.slabs:
            if slab.size:
                holders[slab.tensor].append((member, slab))
    for spec, slabs in zip(space.tensors, holders, strict=True):
        for i, (a, first) in enumerate(slabs):
            for b, second in slabs[:i]:
                if _overlap(first, second):
                    raise ViewError(
                        f"members {b} and {a} both hold a part of tensor {spec.name!r}; "
                        "each coordinate needs exactly one owner"
                    )
        held = sum(slab.size for _, slab in slabs)
        if held != spec.size:
            raise ViewError(
                f"no member holds {spec.size - held} of the {spec.size} coordinates of tensor "
                f"{spec.name!r}; each coordinate needs exactly one owner"
            )


def _overlap(a: Slab, b: Slab) -> bool:
    return all(
        p < q + m and q < p + n
        for p, n, q, m in zip(a.offset, a.shape, b.offset, b.shape, strict=True)
    )


@dataclass(frozen=True)
class Part:
    """What one member exchanges with one shard: a range of its local index space.

    A message between the two indexes this part from 0: its parameters, cut into segments, and
    behind them, dense, its buffers.

    Args:
        view: the member's view.
        start: first global index of the shard.
        stop: global index behind the shard.
    """

    view: View
    start: int
    stop: int

    @cached_property
    def local(self) -> slice:
        """The trained coordinates in the view's local index space."""
        end = self.view.space.num_parameters
        return slice(self.view.rank(min(self.start, end)), self.view.rank(min(self.stop, end)))

    @cached_property
    def local_tail(self) -> slice:
        """The buffers' coordinates in the view's local index space."""
        end = self.view.space.num_parameters
        return slice(self.view.rank(max(self.start, end)), self.view.rank(max(self.stop, end)))

    @property
    def size(self) -> int:
        """Count the trained coordinates."""
        return int(self.local.stop - self.local.start)

    @property
    def tail_size(self) -> int:
        """Count the buffers' coordinates."""
        return int(self.local_tail.stop - self.local_tail.start)

    @cached_property
    def segment_sizes(self) -> Int64Array:
        """Number of trained coordinates held of each segment of the shard; some may be 0."""
        bounds = self.view.space.segment_bounds
        stop = min(self.stop, self.view.space.num_parameters)
        inside = bounds[(bounds >= self.start) & (bounds <= stop)]
        ranks = np.array([self.view.rank(int(b)) for b in inside], dtype=np.int64)
        return ranks[1:] - ranks[:-1]

    @cached_property
    def coordinates(self) -> slice | Int64Array:
        """Positions of the trained coordinates in the shard; a slice where contiguous."""
        return self._positions(self.local)

    @cached_property
    def tail_coordinates(self) -> slice | Int64Array:
        """Positions of the buffers' coordinates in the shard; a slice where contiguous."""
        return self._positions(self.local_tail)

    def _positions(self, local: slice) -> slice | Int64Array:
        if local.start == local.stop:
            return slice(0, 0)
        ends = np.array([local.start, local.stop - 1], dtype=np.int64)
        first, last = (self.view.to_global(ends) - self.start).tolist()
        if last - first == local.stop - local.start - 1:
            return slice(first, last + 1)
        span = np.arange(local.start, local.stop, dtype=np.int64)
        return self.view.to_global(span) - self.start

    def name_at(self, index: int) -> str:
        """Return the name of the tensor that coordinate `index` of this part belongs to."""
        return self.view.name_at(self.local.start + index)
