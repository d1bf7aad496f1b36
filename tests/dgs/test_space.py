"""Views and slabs against numpy's own indexing."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgs.errors import ViewError
from dgs.space import SEGMENT_LIMIT, ParameterSpace, TensorSpec
from dgs.view import Part, Slab, View, check_cover

SHAPES = st.lists(
    st.lists(st.integers(0, 5), min_size=0, max_size=4).map(tuple), min_size=1, max_size=5
)


def make_space(shapes: list[tuple[int, ...]], num_buffers: int = 0) -> ParameterSpace:
    """Name the shapes t0, t1, ...; the last `num_buffers` are buffers."""
    first_buffer = len(shapes) - num_buffers
    return ParameterSpace(
        tuple(TensorSpec(f"t{i}", s, buffer=i >= first_buffer) for i, s in enumerate(shapes))
    )


@st.composite
def spaces_and_views(draw: st.DrawFn) -> tuple[ParameterSpace, View]:
    """Draw a model and one rectangle of some of its tensors."""
    shapes = draw(SHAPES)
    space = make_space(shapes, draw(st.integers(0, len(shapes))))
    slabs = []
    for i, shape in enumerate(shapes):
        if draw(st.booleans()):
            ends = [sorted(draw(st.tuples(*[st.integers(0, n)] * 2))) for n in shape]
            slabs.append(Slab(i, tuple(a for a, _ in ends), tuple(b - a for a, b in ends)))
    return space, View(space, tuple(slabs))


def global_by_numpy(space: ParameterSpace, view: View) -> np.ndarray:
    """List the held global indices by slicing an array of all of them."""
    every = np.arange(space.size)
    held = [np.zeros(0, np.int64)]
    for slab in view.slabs:
        spec, first = space.tensors[slab.tensor], space.offsets[slab.tensor]
        block = every[first : first + spec.size].reshape(spec.shape)
        window = tuple(slice(o, o + n) for o, n in zip(slab.offset, slab.shape, strict=True))
        held.append(block[window].reshape(-1))
    return np.concatenate(held)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(spaces_and_views())
def test_local_indices_map_to_the_global_ones_that_numpy_slicing_gives(
    case: tuple[ParameterSpace, View],
) -> None:
    space, view = case
    expected = global_by_numpy(space, view)
    assert view.size == len(expected)
    assert view.to_global(np.arange(view.size)).tolist() == expected.tolist()
    inverse = np.full(space.size, -1)
    inverse[expected] = np.arange(len(expected))
    assert view.to_local(np.arange(space.size)).tolist() == inverse.tolist()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(spaces_and_views())
def test_rank_counts_the_held_coordinates_below_any_index(
    case: tuple[ParameterSpace, View],
) -> None:
    space, view = case
    expected = global_by_numpy(space, view)
    for index in range(space.size + 1):
        assert view.rank(index) == int((expected < index).sum())


@settings(max_examples=200, deadline=None, derandomize=True)
@given(spaces_and_views(), st.integers(1, 5))
def test_parts_split_a_view_at_shard_boundaries_and_lose_nothing(
    case: tuple[ParameterSpace, View], num_shards: int
) -> None:
    space, view = case
    expected = global_by_numpy(space, view)
    seen: list[int] = []
    tails: list[int] = []
    for start, stop in space.shard_ranges(num_shards):
        part = Part(view, start, stop)
        window = np.arange(start, stop)
        mine, tail = window[part.coordinates], window[part.tail_coordinates]
        assert part.size == len(mine) == part.segment_sizes.sum()
        assert part.tail_size == len(tail)
        for i, g in enumerate(mine.tolist()):
            assert part.name_at(i) == space.tensor_at(g).name
        seen += mine.tolist()
        tails += tail.tolist()
    assert seen == expected[expected < space.num_parameters].tolist()
    assert tails == expected[expected >= space.num_parameters].tolist()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(SHAPES, st.integers(1, 6))
def test_shards_are_contiguous_and_cut_between_segments(
    shapes: list[tuple[int, ...]], num_shards: int
) -> None:
    space = make_space(shapes)
    ranges = space.shard_ranges(num_shards)
    assert len(ranges) == num_shards
    assert ranges[0][0] == 0
    assert ranges[-1][1] == space.size
    assert all(a[1] == b[0] for a, b in pairwise(ranges))
    assert all(stop in space.segment_bounds for _, stop in ranges)


def test_long_tensors_are_cut_into_segments_and_shared_evenly() -> None:
    space = make_space([(10 * SEGMENT_LIMIT + 5,), (3,)])
    assert np.diff(space.segment_bounds).max() == SEGMENT_LIMIT
    (a, b), (c, d) = space.shard_ranges(2)
    assert abs((b - a) - (d - c)) <= SEGMENT_LIMIT


def test_contiguous_slabs_are_ranges() -> None:
    space = make_space([(4, 6), (8,)])
    rows = View(space, (Slab(0, (1, 0), (2, 6)), Slab(1, (0,), (8,))))
    assert Part(rows, 0, 24).coordinates == slice(6, 18)
    columns = View(space, (Slab(0, (0, 1), (4, 2)),))
    assert not isinstance(Part(columns, 0, 24).coordinates, slice)


def quarters(space: ParameterSpace) -> list[View]:
    """Cut a (4, 6) tensor by columns for two members; the second also holds the rest."""
    left = View(space, (Slab(0, (0, 0), (4, 3)),))
    right = View(space, (Slab(0, (0, 3), (4, 3)), Slab(1, (0,), (2,))))
    return [left, right]


def test_views_that_hold_everything_once_are_accepted() -> None:
    space = make_space([(4, 6), (2,), (0, 3), ()])
    left, right = quarters(space)
    rest = View(space, (Slab(3, (), ()),))
    check_cover(space, [left, right, rest])
    check_cover(space, [View.whole(space)])


def test_gaps_are_refused_with_the_name_of_the_tensor() -> None:
    space = make_space([(4, 6), (2,)])
    left, right = quarters(space)
    with pytest.raises(ViewError, match=r"no member holds 12 of the 24 .* 't0'"):
        check_cover(space, [right])
    with pytest.raises(ViewError, match=r"no member holds 2 of the 2 .* 't1'"):
        check_cover(space, [left, View(space, (Slab(0, (0, 3), (4, 3)),))])


def test_overlaps_are_refused_with_the_members_and_the_tensor() -> None:
    space = make_space([(4, 6), (2,)])
    left, right = quarters(space)
    with pytest.raises(ViewError, match=r"members 0 and 1 both hold .* 't0'"):
        check_cover(space, [left, View(space, (Slab(0, (0, 2), (4, 4)),)), right])


@pytest.mark.parametrize(
    ("slab", "message"),
    [
        (Slab(7, (0,), (1,)), "names tensor 7; the model has 2"),
        (Slab(0, (0, 4), (4, 3)), "does not lie inside tensor 't0'"),
        (Slab(0, (-1, 0), (1, 1)), "does not lie inside tensor 't0'"),
        (Slab(1, (0, 0), (1, 1)), "does not lie inside tensor 't1'"),
    ],
)
def test_slabs_outside_the_model_are_refused(slab: Slab, message: str) -> None:
    with pytest.raises(ViewError, match=message):
        View(make_space([(4, 6), (2,)]), (slab,))


def test_models_with_a_doubled_name_or_a_parameter_behind_a_buffer_are_refused() -> None:
    with pytest.raises(ViewError, match="'w' twice"):
        ParameterSpace((TensorSpec("w", ()), TensorSpec("v", (), aliases=("w",))))
    with pytest.raises(ViewError, match="'w' stands behind a buffer"):
        ParameterSpace((TensorSpec("b", (), buffer=True), TensorSpec("w", ())))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ([(2, 3), (5,)], "tensor 't1' has shape [4] here and [5] there"),
        ([(2, 3)], "tensor 't1' of shape [4] is missing there"),
        ([(2, 3), (4,), (1,)], "tensor 't2' of shape [1] is missing here"),
    ],
)
def test_the_first_difference_names_the_tensor_and_both_shapes(
    other: list[tuple[int, ...]], message: str
) -> None:
    assert make_space([(2, 3), (4,)]).first_difference(make_space(other)) == message
    assert make_space(other).first_difference(make_space(other)) is None
