"""Tensor and context parallelism do not show in a whole model, dense or not, however folded."""

from __future__ import annotations

import os

import pytest

from moe.parallel.dims import ParallelDims, legal_mappings
from tests.helpers.worlds import World
from tests.moe.model_law import CASES, violations

pytestmark = pytest.mark.dist

ALL = os.environ.get("ALL_MAPPINGS") == "1"

CHOSEN = (
    ParallelDims(2, tp=2),
    ParallelDims(2, ep=2),
    ParallelDims(2, tp=2, ep=2),
    ParallelDims(2, etp=2),
    ParallelDims(4, tp=4),
    ParallelDims(4, tp=2, ep=4),
    ParallelDims(4, tp=2, etp=2),
    ParallelDims(4, tp=4, ep=2, etp=2),
    ParallelDims(4, ep=2, etp=2),
    ParallelDims(2, cp=2),
    ParallelDims(4, cp=4, ep=4),
    ParallelDims(4, cp=2, ep=2),
    ParallelDims(4, tp=2, cp=2, ep=4),
    ParallelDims(4, tp=2, cp=2, etp=4),
)
"""What is tried unless ALL_MAPPINGS=1 asks for all without pipeline parallelism."""


def _mappings(size: int) -> list[ParallelDims]:
    legal = [dims for dims in legal_mappings(size) if dims.pp == 1]
    return legal if ALL else [dims for dims in CHOSEN if dims.world == size]


def _name(dims: ParallelDims) -> str:
    sizes = {axis: getattr(dims, axis) for axis in ("tp", "cp", "ep", "etp")}
    return f"world{dims.world}" + "".join(f"-{a}{n}" for a, n in sizes.items() if n > 1)


def _hold(world: World, dims: ParallelDims) -> None:
    found = {line for lines in world.run(violations, dims, tuple(CASES)) for line in lines}
    assert not found, "\n".join(sorted(found))


@pytest.mark.parametrize("dims", _mappings(2), ids=_name)
def test_the_mapping_does_not_show_in_a_world_of_2(world2: World, dims: ParallelDims) -> None:
    _hold(world2, dims)


@pytest.mark.parametrize("dims", _mappings(4), ids=_name)
def test_the_mapping_does_not_show_in_a_world_of_4(world4: World, dims: ParallelDims) -> None:
    _hold(world4, dims)
