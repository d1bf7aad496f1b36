"""The two mappings of one world of ranks, as integers.

Attention layers see TP x CP x DP x PP, expert layers ETP x EP x EDP x PP:

    attention: rank = ((pp*DP + dp)*CP + cp)*TP + tp
    experts:   rank = ((pp*EDP + edp)*EP + ep)*ETP + etp

Both views cut the world into the same pipeline stages, because PP is outermost in both; inside a
stage neither knows the other, which is what "folded" means. No process group, no torch: layouts of
thousands of ranks are looked at in microseconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import lcm, prod
from types import MappingProxyType

from moe.errors import LayoutError

__all__ = ["AXES", "ORDERS", "ParallelDims", "legal_mappings"]

AXES = ("tp", "cp", "dp", "pp", "ep", "etp", "edp")
"""Every axis, those of attention first."""

ORDERS = MappingProxyType(
    {
        "pp-outermost": (("pp", "dp", "cp", "tp"), ("pp", "edp", "ep", "etp")),
        "listing-1": (("dp", "pp", "cp", "tp"), ("edp", "pp", "ep", "etp")),
    }
)
"""Axes of the two views by order of ranks, outermost first."""

ALIASES = MappingProxyType({"sequence": "tp_cp", "stage": "tp_cp_dp"})
"""Names for products that are asked for often."""


@dataclass(frozen=True)
class ParallelDims:
    """Sizes of every axis of both mappings; `dp` and `edp` follow from the others.

    Args:
        world: number of ranks.
        tp: tensor-parallel size of attention.
        cp: context-parallel size of attention.
        pp: pipeline stages, common to both mappings.
        ep: expert-parallel size.
        etp: tensor-parallel size of the experts; 1 unless asked for, whatever `tp` is.
        order: ``"pp-outermost"``, or ``"listing-1"``: DP outside PP as the paper prints it, which
            is refused where the two mappings would get different pipeline stages.

    Raises:
        LayoutError: the sizes do not divide the world; names the nearest that do.

    Example:
        >>> dims = ParallelDims(world=8, tp=2, cp=2, ep=8)
        >>> dims.dp, dims.edp
        (2, 1)
        >>> dims.groups("cp")
        [[0, 2], [1, 3], [4, 6], [5, 7]]
    """

    world: int = 1
    tp: int = 1
    cp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    order: str = "pp-outermost"

    def __post_init__(self) -> None:
        for name in ("world", "tp", "cp", "pp", "ep", "etp"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise LayoutError(f"{name} is {value!r}; it has to be a whole number, at least 1")
        if self.order not in ORDERS:
            raise LayoutError(f"order is {self.order!r}; choose one of {', '.join(ORDERS)}")
        self._check_division("attention", ("tp", "cp", "pp"))
        self._check_division("experts", ("etp", "ep", "pp"))
        self._check_stages()

    @property
    def dp(self) -> int:
        """Data-parallel size of attention."""
        return self.world // (self.tp * self.cp * self.pp)

    @property
    def edp(self) -> int:
        """Data-parallel size of the experts."""
        return self.world // (self.etp * self.ep * self.pp)

    @property
    def stage(self) -> int:
        """Ranks of one pipeline stage."""
        return self.world // self.pp

    def size(self, name: str) -> int:
        """Return how many ranks one group of an axis, or of a product of axes, has."""
        return prod(getattr(self, axis) for axis in self._axes(name))

    def coordinates(self, rank: int) -> dict[str, int]:
        """Return a rank's place on every axis.

        Raises:
            LayoutError: the world has no such rank.

        Example:
            >>> ParallelDims(world=8, tp=2, cp=2, ep=8).coordinates(5)
            {'tp': 1, 'cp': 0, 'dp': 1, 'pp': 0, 'ep': 5, 'etp': 0, 'edp': 0}
        """
        self._check_rank(rank)
        return {axis: rank // self._stride(axis) % getattr(self, axis) for axis in AXES}

    def groups(self, name: str) -> list[list[int]]:
        """Return every group of an axis or of a product of axes of one view.

        Args:
            name: an axis of `AXES`; axes of one view joined by ``_`` such as ``"tp_cp"``;
                ``"sequence"`` (the ranks that hold one sequence: tp_cp), ``"stage"`` (those of a
                pipeline stage) or ``"world"``.

        Returns:
            Groups in the order of their first ranks, each ascending; together they are the world.

        Raises:
            LayoutError: there is no such name.
        """
        axes = self._axes(name)
        offsets = self._offsets(axes)
        others = tuple(axis for axis in self._view(axes) if axis not in axes)
        return [[first + offset for offset in offsets] for first in self._offsets(others)]

    def group_of(self, name: str, rank: int) -> list[int]:
        """Return the group of `groups(name)` that has `rank` in it."""
        self._check_rank(rank)
        axes = self._axes(name)
        own = self.coordinates(rank)
        first = rank - sum(own[axis] * self._stride(axis) for axis in axes)
        return [first + offset for offset in self._offsets(axes)]

    def local_experts(self, num_experts: int) -> int:
        """Return how many experts each expert-parallel rank holds.

        Raises:
            LayoutError: they cannot be shared out evenly; names the nearest numbers that can.

        Example:
            >>> ParallelDims(world=8, ep=8).local_experts(64)
            8
        """
        if num_experts < 1 or num_experts % self.ep:
            near = _around(max(num_experts, 0), self.ep)
            remedies = [f"{_either(near)} experts"]
            sizes = _divisors(num_experts) if num_experts > 0 else []
            legal = _nearest([size for size in sizes if self._works(ep=size)], self.ep)
            remedies += [f"ep={_either(legal)}"] if legal else []
            raise LayoutError(
                f"{num_experts} experts cannot be shared out evenly over ep={self.ep}; nearest "
                f"legal: {', or '.join(remedies)}"
            )
        return num_experts // self.ep

    def _axes(self, name: str) -> tuple[str, ...]:
        """Return the axes that a name stands for, of one view."""
        if name == "world":
            return ORDERS[self.order][0]
        axes = tuple(ALIASES.get(name, name).split("_"))
        known = len(set(axes)) == len(axes) and any(
            set(axes) <= set(view) for view in ORDERS[self.order]
        )
        if not known:
            raise LayoutError(
                f"there is no group {name!r}; use one of {', '.join(AXES)}, axes of one view "
                f"joined by '_' (tp cp dp pp, or etp ep edp pp), sequence, stage or world"
            )
        return axes

    def _view(self, axes: Sequence[str]) -> tuple[str, ...]:
        """Return the view that has all of these axes, outermost first."""
        return next(view for view in ORDERS[self.order] if set(axes) <= set(view))

    def _stride(self, axis: str) -> int:
        """Return by how much the rank grows with one step along an axis."""
        view = self._view((axis,))
        return prod(getattr(self, inner) for inner in view[view.index(axis) + 1 :])

    def _offsets(self, axes: Sequence[str]) -> list[int]:
        """Return the ranks whose other coordinates are all zero, ascending."""
        steps = sorted((self._stride(axis), getattr(self, axis)) for axis in axes)
        offsets = [0]
        for stride, size in steps:
            offsets = [i * stride + offset for i in range(size) for offset in offsets]
        return offsets

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.world:
            raise LayoutError(f"there is no rank {rank} in a world of {self.world}")

    def _check_division(self, view: str, axes: tuple[str, ...]) -> None:
        sizes = [getattr(self, axis) for axis in axes]
        if self.world % prod(sizes) == 0:
            return
        both = lcm(self.tp * self.cp * self.pp, self.etp * self.ep * self.pp)
        candidates = {"world": _around(self.world, both)}
        candidates |= dict.fromkeys(axes, _divisors(self.world))
        remedies = []
        for axis, numbers in candidates.items():
            legal = [number for number in numbers if self._works(**{axis: number})]
            if near := _nearest(legal, getattr(self, axis)):
                remedies.append(f"{axis}={_either(near)}")
        told = f"nearest legal, all else unchanged: {', or '.join(remedies)}"
        raise LayoutError(
            f"{view}: world={self.world} is not divisible by {'*'.join(axes)} = "
            f"{'*'.join(map(str, sizes))} = {prod(sizes)}; "
            f"{told if remedies else 'no change of one size alone makes it legal'}"
        )

    def _works(self, **changes: int) -> bool:
        """Return whether the mapping would be legal with other sizes."""
        axes = ("world", "tp", "cp", "pp", "ep", "etp")
        world, tp, cp, pp, ep, etp = (changes.get(axis, getattr(self, axis)) for axis in axes)
        if world % (tp * cp * pp) or world % (etp * ep * pp):
            return False
        return self.order != "listing-1" or pp == 1 or tp * cp == etp * ep

    def _check_stages(self) -> None:
        """Refuse an order that gives the two views different pipeline stages."""
        inner, expert_inner = self.tp * self.cp, self.etp * self.ep
        if self.order == "listing-1" and self.pp > 1 and inner != expert_inner:
            raise LayoutError(
                f"order 'listing-1' needs tp*cp == ep*etp when pp > 1, and here tp*cp = "
                f"{self.tp}*{self.cp} = {inner}, ep*etp = {self.ep}*{self.etp} = {expert_inner}: "
                f"attention and experts would get different pipeline groups; use order "
                f"'pp-outermost'"
            )


def legal_mappings(world: int) -> Iterator[ParallelDims]:
    """Yield every legal mapping of a world, in lexicographic order of (pp, tp, cp, ep, etp).

    Example:
        >>> sum(1 for _ in legal_mappings(2))
        10
    """
    for pp in _divisors(world):
        sizes = _divisors(world // pp)
        halves = [pair for pair in product(sizes, sizes) if world // pp % prod(pair) == 0]
        for (tp, cp), (ep, etp) in product(halves, halves):
            yield ParallelDims(world=world, tp=tp, cp=cp, pp=pp, ep=ep, etp=etp)


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _around(number: int, unit: int) -> list[int]:
    """Return the multiples of `unit` next to a number, positive ones only."""
    below = number // unit * unit
    return [multiple for multiple in (below, below + unit) if multiple > 0]


def _nearest(legal: Sequence[int], wanted: int) -> list[int]:
    """Return the legal sizes next below and next above the wanted one."""
    below = [size for size in legal if size < wanted]
    above = [size for size in legal if size > wanted]
    return [*below[-1:], *above[:1]]


def _either(numbers: Sequence[int]) -> str:
    return " or ".join(map(str, numbers))
