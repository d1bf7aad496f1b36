"""What one member of a worker holds of a model, and which part of that each shard exchanges.

A member's `View` is, for each logical tensor, nothing or one rectangular `Slab`; its *local* index
space is its slabs flattened in the order of the tensors. Because both orders are row-major, the map
from local to global indices is strictly increasing: sorted local indices are sorted global ones,
and every range of the global space, such as a shard, is a range of the local one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Self

import numpy as np

from dgs.errors import ViewError
from dgs.space import MAX_NUMBERS, Int64Array, ParameterSpace

__all__ = ["Part", "Slab", "View"]

_POSITIONS_AT_A_TIME = 1 << 20


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
            if slab.shape == spec.shape and slab.offset == (0,) * len(spec.shape):
                continue
            rank = len(spec.shape)
            inside = len(slab.offset) == len(slab.shape) == rank and all(
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

        Raises:
            ViewError: the table would be out of proportion to any view that is used.
        """
        merged = [_merge(s, self.space.tensors[s.tensor].shape) for s in self.slabs]
        rank = max((len(m) for m in merged), default=1)
        if len(merged) * rank > MAX_NUMBERS:
            raise ViewError(
                f"a view of {len(merged)} slabs, one of them cut in {rank} dimensions, is too "
                f"intricate: slabs times dimensions may be at most {MAX_NUMBERS}"
            )
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

    def ranks(self, index: Int64Array) -> Int64Array:
        """Count, for each global index, the held coordinates below it.

        Args:
            index: in ``[0, N]``, any order, shape ``(k,)``.
        """
        if self.size == self.space.size:
            return index.astype(np.int64)
        tensor = np.searchsorted(self.space.offsets, index, side="right") - 1
        slab = np.searchsorted(self._tensors, tensor)
        result = self.offsets[slab]
        cut = slab < len(self.slabs)  # where the index lies in a tensor of which a part is held
        cut[cut] = self._tensors[slab[cut]] == tensor[cut]
        shape, offset, stride = self._radix
        slab, rest = slab[cut], index[cut] - self.space.offsets[tensor[cut]]
        inner = self.offsets[slab + 1] - self.offsets[slab]
        count, equal = np.zeros_like(rest), np.ones(rest.shape, dtype=bool)
        for d in range(shape.shape[1]):
            extent = shape[slab, d]
            inner //= np.maximum(extent, 1)
            digit, rest = np.divmod(rest, stride[slab, d])
            digit -= offset[slab, d]
            count += np.where(equal, np.clip(digit, 0, extent) * inner, 0)
            equal &= (digit >= 0) & (digit < extent)
        result[cut] += count
        return result

    def rank(self, index: int) -> int:
        """Count the held coordinates with a global index below `index`."""
        return int(self.ranks(np.array([index], dtype=np.int64))[0])


def _merge(slab: Slab, shape: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return (extent, first index, stride) per dimension, full inner dimensions merged outward."""
    if slab.shape == shape:
        return [(slab.size, 0, 1)]
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
        ranks = self.view.ranks(inside)
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
        positions = np.arange(local.start, local.stop, dtype=np.int64)
        for at in range(0, len(positions), _POSITIONS_AT_A_TIME):  # several times as much memory
            some = slice(at, at + _POSITIONS_AT_A_TIME)
            positions[some] = self.view.to_global(positions[some])
        positions -= self.start
        return positions

    def prepare_segments(self) -> None:
        """Compute all that exchanges need but the coordinates, so that none of it fails later.

        Raises:
            ViewError: the view is too intricate.
        """
        _ = self.local, self.local_tail, self.segment_sizes

    def prepare(self) -> None:
        """Compute the coordinates, too; 8 bytes each where they are not contiguous."""
        self.prepare_segments()
        _ = self.coordinates, self.tail_coordinates

    def name_at(self, index: int) -> str:
        """Return the name of the tensor that coordinate `index` of this part belongs to."""
        return self.view.name_at(self.local.start + index)
