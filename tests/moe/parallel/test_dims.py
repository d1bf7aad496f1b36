"""Layouts: known tables, every legal mapping, and what is refused with which words."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.errors import LayoutError
from moe.parallel.dims import AXES, ORDERS, ParallelDims, legal_mappings

PAIRS = [[0, 1], [2, 3], [4, 5], [6, 7]]
EVENS_AND_ODDS = [[0, 2], [1, 3], [4, 6], [5, 7]]
HALVES = [[0, 4], [1, 5], [2, 6], [3, 7]]
FOURS = [[0, 1, 2, 3], [4, 5, 6, 7]]
ALONE = [[rank] for rank in range(8)]

TABLES = {
    "the paper's figure": (
        ParallelDims(8, tp=2, cp=2, ep=8),
        {
            "tp": PAIRS,
            "cp": EVENS_AND_ODDS,
            "dp": HALVES,
            "ep": [list(range(8))],
            "etp": ALONE,
            "edp": ALONE,
            "pp": ALONE,
            "sequence": FOURS,
        },
    ),
    "ep over tp and dp": (
        ParallelDims(8, tp=2, ep=4),
        {"dp": [[0, 2, 4, 6], [1, 3, 5, 7]], "ep": FOURS, "edp": HALVES},
    ),
    "context and pipeline": (
        ParallelDims(8, cp=2, pp=2, ep=4),
        {"cp": PAIRS, "pp": HALVES, "ep": FOURS, "edp": ALONE, "stage": FOURS},
    ),
    "everything two": (
        ParallelDims(8, tp=2, cp=2, pp=2, ep=2, etp=2),
        {"etp": PAIRS, "ep": EVENS_AND_ODDS, "pp": HALVES, "ep_etp": FOURS},
    ),
    "etp smaller than tp": (
        ParallelDims(8, tp=4, ep=2, etp=2),
        {"tp": FOURS, "etp": PAIRS, "ep": EVENS_AND_ODDS, "edp": HALVES},
    ),
    "sixteen ranks": (
        ParallelDims(16, tp=2, pp=4),
        {
            "dp": [[i, i + 2] for i in range(16) if i % 4 < 2],
            "pp": [[i, i + 4, i + 8, i + 12] for i in range(4)],
        },
    ),
    "the middle one of three axes": (
        ParallelDims(24, tp=2, cp=3),
        {"cp": [[i, i + 2, i + 4] for i in range(24) if i % 6 < 2]},
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_groups_are_those_of_the_known_tables(name: str) -> None:
    dims, table = TABLES[name]
    assert {axis: dims.groups(axis) for axis in table} == table


def test_the_papers_call_in_its_own_order() -> None:
    dims = ParallelDims(64, tp=2, cp=2, pp=2, ep=2, etp=2, order="listing-1")
    assert dims.groups("pp")[0] == [0, 4]
    assert dims.groups("dp")[0] == list(range(0, 64, 8))
    assert dims.groups("ep")[0] == [0, 2]


@cache
def _reshaped(view: tuple[str, ...], sizes: tuple[int, ...], axis: str) -> list[list[int]]:
    """Return groups the way the paper's listing makes them: move an axis last."""
    moved = np.moveaxis(np.arange(prod(sizes)).reshape(sizes), view.index(axis), -1)
    groups = sorted(moved.reshape(-1, sizes[view.index(axis)]).tolist())
    assert sorted(rank for group in groups for rank in group) == list(range(prod(sizes)))
    return groups


def _check_against_reshaping(dims: ParallelDims) -> None:
    for view in ORDERS[dims.order]:
        sizes = tuple(getattr(dims, axis) for axis in view)
        for axis in view:
            # for "pp" this also says that both views have the same stages
            assert dims.groups(axis) == _reshaped(view, sizes, axis), (dims, axis)
    assert dims.tp * dims.cp * dims.dp == dims.etp * dims.ep * dims.edp == dims.stage


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8, 12, 16, 20, 32, 48, 64])
def test_every_legal_mapping_cuts_the_world_into_groups(world: int) -> None:
    seen = 0
    for dims in legal_mappings(world):
        _check_against_reshaping(dims)
        seen += 1
    assert seen == sum(1 for _ in _tuples_that_divide(world))


def _tuples_that_divide(world: int) -> Iterator[tuple[int, ...]]:
    sizes = [size for size in range(1, world + 1) if world % size == 0]
    for pp, tp, cp, ep, etp in product(sizes, repeat=5):
        if world % (pp * tp * cp) == 0 == world % (pp * ep * etp):
            yield pp, tp, cp, ep, etp


SIZES = st.integers(1, 4)


@given(SIZES, SIZES, SIZES, SIZES, SIZES, SIZES, SIZES)
def test_group_and_coordinates_of_a_rank_agree_with_the_tables(
    tp: int, cp: int, pp: int, etp: int, ep: int, dp: int, more: int
) -> None:
    world = tp * cp * pp * etp * ep * dp
    dims = ParallelDims(world, tp=tp, cp=cp, pp=pp, ep=ep, etp=etp)
    rank = (world - 1) * more // 4
    own = dims.coordinates(rank)
    attention = ((own["pp"] * dims.dp + own["dp"]) * cp + own["cp"]) * tp + own["tp"]
    experts = ((own["pp"] * dims.edp + own["edp"]) * ep + own["ep"]) * etp + own["etp"]
    assert rank == attention == experts
    for name in (*AXES, "sequence", "dp_cp", "stage", "ep_etp", "world"):
        group = dims.group_of(name, rank)
        assert group in dims.groups(name)
        assert rank in group
        assert len(group) == dims.size(name)
    for axis in AXES:
        assert dims.group_of(axis, rank).index(rank) == own[axis]


@pytest.mark.parametrize("world", [8, 16, 32])
def test_the_papers_order_is_refused_exactly_where_its_stages_differ(world: int) -> None:
    accepted = refused = 0
    for legal in legal_mappings(world):
        sizes = {axis: getattr(legal, axis) for axis in ("tp", "cp", "pp", "ep", "etp")}
        attention = np.arange(world).reshape(legal.dp, legal.pp, -1).swapaxes(1, 2)
        experts = np.arange(world).reshape(legal.edp, legal.pp, -1).swapaxes(1, 2)
        alike = np.array_equal(
            *(np.sort(view.reshape(-1, legal.pp), axis=0) for view in (attention, experts))
        )
        if alike:
            _check_against_reshaping(ParallelDims(world, **sizes, order="listing-1"))
            accepted += 1
        else:
            with pytest.raises(LayoutError, match="different pipeline groups"):
                ParallelDims(world, **sizes, order="listing-1")
            refused += 1
    assert accepted
    assert refused


WRONG = {
    "tp above the world": ({"world": 8, "tp": 16}, "world=8 is not divisible by tp*cp*pp = 16*1*1"),
    "pp above the world": ({"world": 8, "pp": 16}, "nearest legal, all else unchanged: world=16"),
    "tp and pp together": ({"world": 8, "tp": 8, "pp": 8}, "tp=1, or pp=1"),
    "experts do not fit": (
        {"world": 64, "pp": 8, "ep": 16},
        "experts: world=64 is not divisible by etp*ep*pp = 1*16*8 = 128; nearest legal, all else "
        "unchanged: world=128, or ep=8, or pp=4",
    ),
    "between two legal sizes": ({"world": 12, "tp": 5}, "world=10 or 15, or tp=4 or 6"),
    "no ranks": ({"world": 0}, "world is 0; it has to be a whole number, at least 1"),
    "not a number": ({"world": 8, "ep": "4"}, "ep is '4'"),
    "true is no size": ({"world": 8, "tp": True}, "tp is True"),
    "pp innermost": (
        {"world": 8, "order": "pp-innermost"},
        "choose one of pp-outermost, listing-1",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_legal_is_refused_with_the_numbers_and_the_nearest_that_are(name: str) -> None:
    arguments, words = WRONG[name]
    with pytest.raises(LayoutError) as refusal:
        ParallelDims(**arguments)
    assert words in str(refusal.value)


@given(st.integers(1, 64), *[st.integers(1, 9)] * 5)
def test_a_size_that_a_refusal_names_is_legal(
    world: int, tp: int, cp: int, pp: int, ep: int, etp: int
) -> None:
    sizes = {"world": world, "tp": tp, "cp": cp, "pp": pp, "ep": ep, "etp": etp}
    try:
        ParallelDims(**sizes)
    except LayoutError as refusal:
        remedies = str(refusal).partition("unchanged: ")[2].split(", or ")
        assert remedies[0].startswith("world=")
        for remedy in remedies:
            axis, _, numbers = remedy.partition("=")
            for number in numbers.split(" or "):
                ParallelDims(**{**sizes, axis: int(number)})


def test_where_no_size_alone_is_a_remedy_the_refusal_says_so() -> None:
    with pytest.raises(LayoutError, match="no change of one size alone makes it legal"):
        ParallelDims(8, tp=8, pp=2, ep=2, etp=3, order="listing-1")


@given(st.integers(-9, 70), st.sampled_from(list(legal_mappings(8))))
def test_numbers_of_experts_and_ranks_that_a_refusal_names_are_legal(
    num_experts: int, dims: ParallelDims
) -> None:
    try:
        dims.local_experts(num_experts)
    except LayoutError as refusal:
        experts, _, ep = str(refusal).partition("nearest legal: ")[2].partition(", or ep=")
        for number in experts.removesuffix(" experts").split(" or "):
            assert dims.local_experts(int(number)) >= 1
        for number in ep.split(" or ") if ep else []:
            assert replace(dims, ep=int(number)).local_experts(num_experts) >= 1


def test_experts_that_cannot_be_shared_out_are_refused() -> None:
    dims = ParallelDims(8, ep=8)
    assert dims.local_experts(64) == 8
    with pytest.raises(LayoutError, match=r"63 experts .* ep=8; nearest legal: 56 or 64 experts"):
        dims.local_experts(63)
    for number in (0, -3):
        with pytest.raises(LayoutError, match=r"nearest legal: 8 experts$"):
            dims.local_experts(number)


@pytest.mark.parametrize("name", ["", "tp_ep", "tp_tp", "dq", "edp_dp"])
def test_groups_that_do_not_exist_are_refused(name: str) -> None:
    with pytest.raises(LayoutError, match="there is no group"):
        ParallelDims(8, tp=2).groups(name)


def test_ranks_that_do_not_exist_are_refused() -> None:
    for look in (lambda d: d.coordinates(8), lambda d: d.group_of("tp", -1)):
        with pytest.raises(LayoutError, match="there is no rank"):
            look(ParallelDims(8))


def test_thousands_of_ranks_are_looked_at_in_no_time() -> None:
    started = time.perf_counter()
    dims = ParallelDims(16384, tp=8, cp=4, pp=16, ep=64)
    for axis in AXES:
        assert sum(map(len, dims.groups(axis))) == 16384
    for rank in range(0, 16384, 16):
        dims.group_of("ep", rank)
    assert time.perf_counter() - started < 5.0  # 0.1 s on an idle machine
