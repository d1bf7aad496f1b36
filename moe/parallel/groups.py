"""Process groups of a mapping, all built in one place and passed to whoever needs them.

A `Group` is what a collective needs to know: who takes part, which place this rank has, and
torch's handle. Groups of one rank have no handle, and collectives on them do nothing, so that a
layer on one rank runs the same code as on a thousand and needs no process group at all. Axes that
come down to the same ranks share one handle.

A `DeviceMesh` per view would serve too, but joining axes of a mesh (the ranks that hold one
sequence, those that hold one copy of the experts) goes through names that torch keeps private.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist

from moe.errors import CollectiveError, LayoutError
from moe.parallel.dims import AXES, ORDERS, ParallelDims

__all__ = ["NAMES", "Group", "ProcessGroups", "build_groups", "single"]

NAMES = (*AXES, "sequence", "dp_cp", "stage", "ep_etp", "world")
"""Groups that are built unless others are asked for."""

TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Group:
    """Some ranks that act together, seen from one of them.

    Args:
        ranks: their numbers in the world, ascending.
        index: this rank's place among them.
        handle: torch's process group; None for a group of one, or one that is only looked at.
    """

    ranks: tuple[int, ...] = (0,)
    index: int = 0
    handle: dist.ProcessGroup | None = field(default=None, repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        """Return the group itself: a copy of a layer talks to the same ranks."""
        return self

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)


@dataclass(frozen=True)
class ProcessGroups:
    """The groups of one rank under one mapping.

    Args:
        dims: the mapping.
        rank: this rank's number in the world.
        by_name: a group for each name, as `ParallelDims.groups` knows them.
    """

    dims: ParallelDims
    rank: int
    by_name: Mapping[str, Group]

    def __getitem__(self, name: str) -> Group:
        try:
            return self.by_name[name]
        except KeyError:
            known = ", ".join(self.by_name)
            raise LayoutError(f"no group {name!r} was built; there are {known}") from None

    def __deepcopy__(self, memo: dict[int, Any]) -> ProcessGroups:
        """Return the groups themselves, which `close` gives back once for all copies."""
        return self

    def close(self) -> None:
        """Give back the communicators; torch's default group is left to whoever started it."""
        handles = {id(g.handle): g.handle for g in self.by_name.values() if g.handle is not None}
        for handle in handles.values():
            dist.destroy_process_group(handle)


def single(names: Iterable[str] = NAMES) -> ProcessGroups:
    """Return the groups of a world of one rank, which communicates with nobody.

    Example:
        >>> single()["ep"].size
        1
    """
    return ProcessGroups(ParallelDims(), 0, MappingProxyType(dict.fromkeys(names, Group())))


def build_groups(
    dims: ParallelDims, names: Iterable[str] = NAMES, *, timeout_s: float = TIMEOUT_S
) -> ProcessGroups:
    """Build the process groups of a mapping; every rank of the world calls this alike.

    Args:
        dims: the mapping; the same on every rank, which is checked.
        names: groups to build, as `ParallelDims.groups` knows them.
        timeout_s: seconds after which a collective of any of the groups, those of all ranks
            included, gives up on a rank that does not answer.

    Returns:
        This rank's groups.

    Raises:
        LayoutError: the world has another size than the mapping, or torch.distributed has not been
            started; on every rank, before any of them waits for another.
        CollectiveError: ranks were given different mappings; on every rank.
    """
    if not (dist.is_available() and dist.is_initialized()):
        if dims.world == 1:
            return single(names)
        raise LayoutError(
            f"the mapping has {dims.world} ranks, and torch.distributed was not started here; "
            f"call torch.distributed.init_process_group first"
        )
    world = dist.get_world_size()
    if world != dims.world:
        raise LayoutError(
            f"the mapping has {dims.world} ranks, and {world} were started; start {dims.world}, "
            f"or choose a mapping of {world}"
        )
    _check_agreement(dims)
    rank = dist.get_rank()
    handles: dict[tuple[int, ...], dist.ProcessGroup | None] = {(rank,): None}
    by_name = {}
    for name in names:
        ranks = tuple(dims.group_of(name, rank))
        if ranks not in handles:
            handles[ranks] = _new_group(dims.groups(name), rank, timeout_s)
        by_name[name] = Group(ranks, ranks.index(rank), handles[ranks])
    # a rank that gave its groups back at once would leave others without an answer
    dist.all_reduce(torch.zeros((), device=_device()))
    return ProcessGroups(dims, rank, MappingProxyType(by_name))


def _new_group(groups: list[list[int]], rank: int, timeout_s: float) -> dist.ProcessGroup:
    """Build all groups of a name, in the same order on every rank; return this rank's.

    Letting the members alone build a group would be faster, but torch then names it after how many
    groups a rank has, so that one built after another was given up finds the old one's addresses.
    """
    timeout = timedelta(seconds=timeout_s)
    built = [dist.new_group(group, timeout=timeout) for group in groups]
    return next(new for new, group in zip(built, groups, strict=True) if rank in group)


def _check_agreement(dims: ParallelDims) -> None:
    """Compare the mappings of all ranks."""
    sizes = [dims.world, dims.tp, dims.cp, dims.pp, dims.ep, dims.etp]
    own = torch.tensor([*sizes, list(ORDERS).index(dims.order)], device=_device())
    everyone = [torch.empty_like(own) for _ in range(dims.world)]
    dist.all_gather(everyone, own)
    for rank, theirs in enumerate(everyone):
        if not torch.equal(theirs, everyone[0]):
            raise CollectiveError(
                f"ranks were given different mappings: (world, tp, cp, pp, ep, etp, order) is "
                f"{everyone[0].tolist()} on rank 0 and {theirs.tolist()} on rank {rank}"
            )


def _device() -> torch.device:
    """Return where the default group's collectives want their tensors."""
    if dist.get_backend() == dist.Backend.NCCL:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
