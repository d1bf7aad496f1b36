"""Process groups: who is in them, that they work, and what is refused before anything waits."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from moe.errors import CollectiveError, LayoutError
from moe.parallel.collectives import all_reduce_sum
from moe.parallel.dims import ParallelDims
from moe.parallel.groups import NAMES, Group, build_groups, single
from tests.helpers.worlds import PATIENCE_S, World

MAPPINGS = (
    ParallelDims(4, tp=2, ep=4),
    ParallelDims(4, tp=2, pp=2, etp=2),
    ParallelDims(4, cp=2, ep=2, etp=2),
)


def _every_group_adds_up() -> None:
    for dims in MAPPINGS * 2:  # twice: what was given up is not mistaken for what is new
        groups = build_groups(dims)
        for name in NAMES:
            group = groups[name]
            assert list(group.ranks) == dims.group_of(name, dist.get_rank())
            assert group.ranks[group.index] == dist.get_rank() == groups.rank
            assert (group.handle is None) == (group.size == 1)
            total = all_reduce_sum(torch.tensor(dist.get_rank()), group)
            assert int(total) == sum(group.ranks)
        groups.close()


def _same_ranks_share_a_handle() -> None:
    groups = build_groups(ParallelDims(4, tp=2, cp=2, etp=2, ep=2))
    assert groups["tp"].handle is groups["etp"].handle
    assert groups["cp"].handle is groups["ep"].handle
    assert groups["world"].handle is groups["ep_etp"].handle
    assert groups["world"].handle is not dist.group.WORLD, "it has a timeout of its own"
    groups.close()
    left = torch.tensor(1)
    dist.all_reduce(left)
    assert int(left) == 4, "torch's default group is left"


def _nobody_answers_in_the_whole_world() -> str:
    groups = build_groups(ParallelDims(2), timeout_s=0.5)
    told = ""
    try:
        if groups.rank == 0:
            all_reduce_sum(torch.zeros(1), groups["world"])
    except CollectiveError as error:
        told = str(error)
    # rank 1 is there all the time, but says nothing until rank 0 has given up
    dist.barrier()
    groups.close()
    return told


def _another_size_is_refused() -> str:
    with pytest.raises(LayoutError) as refusal:
        build_groups(ParallelDims(8, ep=8))
    return str(refusal.value)


def _disagreement_is_refused() -> str:
    with pytest.raises(CollectiveError) as refusal:
        build_groups(ParallelDims(4, tp=2 if dist.get_rank() == 3 else 1))
    return str(refusal.value)


@pytest.mark.dist
def test_every_group_of_every_name_adds_up(world4: World) -> None:
    world4.run(_every_group_adds_up)


@pytest.mark.dist
def test_names_with_the_same_ranks_share_one_communicator(world4: World) -> None:
    world4.run(_same_ranks_share_a_handle)


@pytest.mark.dist
def test_the_timeout_holds_for_groups_of_all_ranks(world2: World) -> None:
    started = time.monotonic()
    told = world2.run(_nobody_answers_in_the_whole_world)
    assert "among ranks [0, 1] failed on rank 0" in told[0]
    assert told[1] == ""
    assert time.monotonic() - started < PATIENCE_S / 2


@pytest.mark.dist
def test_a_world_of_another_size_is_refused_on_every_rank_with_one_message(world4: World) -> None:
    assert set(world4.run(_another_size_is_refused)) == {
        "the mapping has 8 ranks, and 4 were started; start 8, or choose a mapping of 4"
    }


@pytest.mark.dist
def test_ranks_with_different_mappings_are_refused_on_every_rank(world4: World) -> None:
    assert set(world4.run(_disagreement_is_refused)) == {
        "ranks were given different mappings: (world, tp, cp, pp, ep, etp, order) is "
        "[4, 1, 1, 1, 1, 1, 0] on rank 0 and [4, 2, 1, 1, 1, 1, 0] on rank 3"
    }


def test_many_ranks_need_a_started_torch_distributed() -> None:
    with pytest.raises(LayoutError, match="init_process_group first"):
        build_groups(ParallelDims(4))


def test_one_rank_has_all_groups_and_no_communicator() -> None:
    for groups in (single(), build_groups(ParallelDims())):
        assert {groups[name] for name in NAMES} == {Group()}
        groups.close()


def test_a_group_that_was_not_built_is_refused_by_name() -> None:
    with pytest.raises(LayoutError, match="no group 'tp_cp' was built; there are ep"):
        single(["ep"])["tp_cp"]
