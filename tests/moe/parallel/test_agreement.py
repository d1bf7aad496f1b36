"""Ranks stop together, with the same words."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from moe.errors import CollectiveError, LayoutError, MoeError, RoutingError
from moe.parallel.agreement import Fact, together
from moe.parallel.collectives import all_reduce_sum
from moe.parallel.dims import ParallelDims
from moe.parallel.groups import Group, build_groups
from tests.helpers.worlds import World

CPU = torch.device("cpu")


def _attempt(failures: dict[int, Exception]) -> tuple[str, str, str]:
    """Return class, words and cause of what was raised, and show that collectives still work."""
    group = build_groups(ParallelDims(4))["world"]

    def work() -> int:
        if group.index in failures:
            raise failures[group.index]
        return group.index

    try:
        told = "", str(together(work, group, CPU)), ""
    except MoeError as error:
        told = type(error).__name__, str(error), type(error.__cause__).__name__
    assert int(all_reduce_sum(torch.tensor(1), group)) == 4
    return told


@pytest.mark.dist
def test_work_that_succeeds_everywhere_returns_its_result(world4: World) -> None:
    assert world4.run(_attempt, {}) == [("", str(rank), "") for rank in range(4)]


@pytest.mark.dist
@pytest.mark.parametrize(
    ("failures", "kind", "words"),
    [
        ({2: RoutingError("NaN in 3 tokens")}, "RoutingError", "rank 2: NaN in 3 tokens"),
        ({3: LayoutError("x"), 1: RoutingError("y")}, "RoutingError", "rank 1: y"),
        ({3: LayoutError("x"), 0: LayoutError("z")}, "LayoutError", "rank 0: z"),
        ({1: KeyError("k")}, "CollectiveError", "rank 1: 'k'"),
        ({0: RoutingError("\u03b8" * 200)}, "RoutingError", "rank 0: " + "\\u03b8" * 85 + "\\u"),
    ],
    ids=["one", "a routing error first", "the lower rank first", "any error", "long"],
)
def test_a_failure_anywhere_is_raised_everywhere_in_the_same_words(
    world4: World, failures: dict[int, Exception], kind: str, words: str
) -> None:
    for rank, told in enumerate(world4.run(_attempt, failures)):
        cause = type(failures[rank]).__name__ if rank in failures else "NoneType"
        assert told == (kind, words, cause)


def _compare(values: list[int], blocks: int) -> str:
    groups = build_groups(ParallelDims(4))
    group = groups["world"]
    facts = [
        Fact("the colour", 7, "paint it"),
        Fact("the size", values[group.index], "cut it", group.index // (4 // blocks), blocks),
    ]
    try:
        told = str(together(lambda: "agreed", group, CPU, facts))
    except RoutingError as error:
        told = str(error)
    assert int(all_reduce_sum(torch.tensor(1), group)) == 4
    groups.close()
    return told


@pytest.mark.dist
def test_ranks_of_a_part_that_differ_in_a_fact_are_told_which_on_every_rank(world4: World) -> None:
    assert set(world4.run(_compare, [5, 5, -6, -6], 2)) == {"agreed"}
    said = "the ranks differ in the size: -6 on rank 2 and 0 on rank 3; cut it"
    assert set(world4.run(_compare, [5, 5, -6, 0], 2)) == {said}
    said = "the ranks differ in the size: 5 on rank 0 and -6 on rank 2; cut it"
    assert set(world4.run(_compare, [5, 5, -6, -6], 1)) == {said}


def test_one_rank_raises_its_own_error() -> None:
    def work() -> None:
        raise KeyError("k")

    with pytest.raises(KeyError):
        together(work, Group(), CPU)
    assert not dist.is_initialized()
    assert CollectiveError.__mro__[1] is MoeError
