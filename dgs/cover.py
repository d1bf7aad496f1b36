"""Whether the members of a worker hold every coordinate of a model once: no gaps, no overlaps.

Slabs are separated by planes that cut none of them, along one dimension after another. All the ways
in which models are sharded come apart into single slabs by that, at the cost of sorting. Only slabs
that no plane separates are compared in pairs, and the number of comparisons is bounded, because the
views come from peers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeAlias

from dgs.errors import ViewError
from dgs.space import ParameterSpace, TensorSpec
from dgs.view import Slab, View

__all__ = ["check_cover"]

MAX_COMPARISONS: Final = 1 << 21
"""Comparisons made for one model; they take about a second. A slab takes one per dimension of the
grid that it belongs to."""

Held: TypeAlias = tuple[int, Slab]
"""A member, and the slab that it holds of the tensor in question."""


def check_cover(space: ParameterSpace, views: Sequence[View]) -> None:
    """Check that the members' views hold each coordinate exactly once.

    Args:
        space: the model's index space.
        views: one per member.

    Raises:
        ViewError: a coordinate is held by nobody, or by two members, or the slabs interlock so much
            that telling would take too long; names the tensor.

    Example:
        >>> space = ParameterSpace((TensorSpec("w", (4, 2)),))
        >>> check_cover(space, [View(space, (Slab(0, (i, 0), (2, 2)),)) for i in (0, 2)])
    """
    if len(views) == 1 and views[0].size == space.size:
        return
    holders: list[list[Held]] = [[] for _ in space.tensors]
    sizes = [0] * len(space.tensors)
    for member, view in enumerate(views):
        for slab in view.slabs:
            size = slab.size
            if size:
                holders[slab.tensor].append((member, slab))
                sizes[slab.tensor] += size
    work = 0
    for spec, held, size in zip(space.tensors, holders, sizes, strict=True):
        if len(held) > 1:
            search = _Search(spec, held, work)
            pair, work = search.find_overlap(), search.work
            if pair is not None:
                raise ViewError(
                    f"members {min(pair)} and {max(pair)} both hold a part of tensor "
                    f"{spec.name!r}; each coordinate needs exactly one owner"
                )
        if size != spec.size:
            raise ViewError(
                f"no member holds {spec.size - size} of the {spec.size} coordinates of tensor "
                f"{spec.name!r}; each coordinate needs exactly one owner"
            )


class _Search:
    """A search for two slabs of one tensor that overlap.

    Args:
        spec: the tensor.
        held: its slabs, at least two; those without coordinates left out.
        work: comparisons made for other tensors.
    """

    def __init__(self, spec: TensorSpec, held: list[Held], work: int) -> None:
        """Find the dimensions that the slabs cut; in all others, all slabs are the same."""
        self._spec = spec
        self._held = held
        self._axes = [
            axis
            for axis, n in enumerate(spec.shape)
            if any(slab.shape[axis] != n for _, slab in held)
        ]
        self.work = work

    def find_overlap(self) -> tuple[int, int] | None:
        """Return two members whose slabs overlap, or None."""
        if not self._axes:
            return self._held[0][0], self._held[1][0]
        groups = [(self._held, 0)]
        while groups:
            group, turn = groups.pop()
            for i in range(turn, turn + len(self._axes)):  # what one plane cut, another cuts next
                parts = self._separate(group, self._axes[i % len(self._axes)])
                if len(parts) > 1:
                    groups.extend((part, i + 1) for part in parts if len(part) > 1)
                    break
            else:
                pair = self._sweep(group)
                if pair is not None:
                    return pair
        return None

    def _separate(self, group: list[Held], axis: int) -> list[list[Held]]:
        """Split slabs at the planes across a dimension that cut none of them."""
        self._count(len(group))
        parts: list[list[Held]] = []
        end = 0
        for held in sorted(group, key=lambda h: h[1].offset[axis]):
            slab = held[1]
            if slab.offset[axis] >= end:
                parts.append([])
            parts[-1].append(held)
            end = max(end, slab.offset[axis] + slab.shape[axis])
        return parts

    def _sweep(self, group: list[Held]) -> tuple[int, int] | None:
        """Compare each slab with those that a plane, moving along one dimension, cuts with it."""
        along = max(self._axes, key=lambda axis: len({slab.offset[axis] for _, slab in group}))
        cut: list[Held] = []
        for member, slab in sorted(group, key=lambda h: h[1].offset[along]):
            self._count(len(self._axes) * (1 + len(cut)))
            first = slab.offset[along]
            cut = [h for h in cut if h[1].offset[along] + h[1].shape[along] > first]
            for other, earlier in cut:
                if self._overlap(slab, earlier):
                    return member, other
            cut.append((member, slab))
        return None

    def _overlap(self, a: Slab, b: Slab) -> bool:
        return all(
            a.offset[d] < b.offset[d] + b.shape[d] and b.offset[d] < a.offset[d] + a.shape[d]
            for d in self._axes
        )

    def _count(self, comparisons: int) -> None:
        self.work += comparisons
        if self.work > MAX_COMPARISONS:
            raise ViewError(
                f"the members' parts of tensor {self._spec.name!r} interlock too much to be "
                "checked; cut tensors along their dimensions"
            )
