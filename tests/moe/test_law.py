"""Every legal mapping gives the one-rank result: a few by default, all with ALL_MAPPINGS=1."""

from __future__ import annotations

import os

import pytest

from moe.parallel.dims import ParallelDims, legal_mappings
from tests.helpers.worlds import World
from tests.moe.law import CASES, violations

pytestmark = pytest.mark.dist

ALL = os.environ.get("ALL_MAPPINGS") == "1"

CHOSEN = (
    ParallelDims(4),
    ParallelDims(4, ep=4),
    ParallelDims(4, tp=2, cp=2, etp=4),  # ETP other than TP with EP of one
    ParallelDims(4, tp=4, ep=2, etp=2),  # and with EP above one
    ParallelDims(4, tp=2, ep=4),  # EP over TP and DP
    ParallelDims(4, cp=4, etp=2),
    ParallelDims(4, tp=2, pp=2, ep=2),
    ParallelDims(4, cp=2, ep=2),
    ParallelDims(8, tp=2, cp=2, ep=8),  # EP over TP, CP and DP at once
    ParallelDims(8, tp=2, cp=2, pp=2, ep=2, etp=2),
    ParallelDims(8, tp=4, ep=2, etp=2),
)
"""What continuous integration tries."""


def _mappings(size: int) -> list[ParallelDims]:
    return [dims for dims in (legal_mappings(size) if ALL else CHOSEN) if dims.world == size]


def _name(dims: ParallelDims) -> str:
    sizes = {axis: getattr(dims, axis) for axis in ("tp", "cp", "pp", "ep", "etp")}
    return f"world{dims.world}" + "".join(f"-{a}{n}" for a, n in sizes.items() if n > 1)


def _hold(world: World, dims: ParallelDims) -> None:
    found = {line for lines in world.run(violations, dims, tuple(CASES)) for line in lines}
    assert not found, "\n".join(sorted(found))


@pytest.mark.skipif(not ALL, reason="worlds of 4 and 8 say more; ALL_MAPPINGS=1 tries all")
@pytest.mark.parametrize("dims", list(legal_mappings(2)), ids=_name)
def test_the_mapping_does_not_show_in_a_world_of_2(world2: World, dims: ParallelDims) -> None:
    _hold(world2, dims)


@pytest.mark.parametrize("dims", _mappings(4), ids=_name)
def test_the_mapping_does_not_show_in_a_world_of_4(world4: World, dims: ParallelDims) -> None:
    _hold(world4, dims)


@pytest.mark.parametrize("dims", _mappings(8), ids=_name)
def test_the_mapping_does_not_show_in_a_world_of_8(world8: World, dims: ParallelDims) -> None:
    _hold(world8, dims)
