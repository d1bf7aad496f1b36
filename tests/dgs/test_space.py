"""Views and slabs against numpy's own indexing."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgs.errors import ConfigError, ViewError
from dgs.space import SEGMENT_LIMIT, ParameterSpace, TensorSpec
from dgs.view import Part, Slab, View

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
    ("spec", "message"),
    [
        (TensorSpec("w", (1,) * 10**6), "'w' has 1000000 dimensions; at most 64"),
        (
            TensorSpec("w", (2,) * 64),
            r"'w' has the impossible shape \[2, 2, 2, 2, 2, 2, 2, 2, ...\]",
        ),
        (TensorSpec("w", (2**63, 2)), "'w' has the impossible shape"),
        (TensorSpec("w", (0, 2**40, 2**40)), "'w' has the impossible shape"),
        (TensorSpec("w", (3, -1)), r"'w' has the impossible shape \[3, -1\]"),
        (TensorSpec("w" * 1025, ()), "'w{40}'... has 1025 bytes; at most 1024"),
        (TensorSpec("\xe4" * 600, ()), "has 1200 bytes"),
        (TensorSpec("w", (), aliases=("v" * 1025,)), "'v{40}'... has 1025 bytes"),
        (TensorSpec("w", (), aliases=("v",) * 2**20), "1048577 names; at most 1048576"),
        (TensorSpec("w\udc80", ()), r"the name 'w\\udc80' of a tensor is not valid Unicode"),
    ],
    ids=range(10),
)
def test_tensors_that_no_message_or_int64_can_hold_are_refused_at_once(
    spec: TensorSpec, message: str
) -> None:
    with pytest.raises(ViewError, match=message):
        ParameterSpace((spec,))


def test_models_that_are_too_large_together_are_refused_by_the_tensor_that_is_too_much() -> None:
    half = TensorSpec("half", (2**47,))
    whole = ParameterSpace((half, TensorSpec("rest", (2**47,))))
    assert whole.size == 2**48
    with pytest.raises(ViewError, match="'more' makes the model too large"):
        ParameterSpace((*whole.tensors, TensorSpec("more", ())))
    flat = [TensorSpec(f"t{i}", (1,) * 64) for i in range(2**16)]
    assert ParameterSpace(tuple(flat)).size == 2**16
    with pytest.raises(ViewError, match="'more' makes the model too large"):
        ParameterSpace((*flat, TensorSpec("more", (1,))))


def test_views_whose_index_tables_would_be_huge_are_refused() -> None:
    many = [(1,)] * 2**18
    space = make_space([(2,) * 40, *many])
    every_second = Slab(0, (0,) * 40, (1, 2) * 20)
    rest = tuple(Slab(i + 1, (0,), (1,)) for i in range(2**18))
    with pytest.raises(ViewError, match="262145 slabs, one of them cut in 20 dimensions, is too"):
        Part(View(space, (every_second, *rest)), 0, 5).prepare_segments()


@pytest.mark.parametrize(
    "shape", [(2**43,), (2,) * 43, (2**20, 3, 2**20), (2**42, 1, 2), (0, 2**20, 2**20, 5)]
)
def test_what_is_prepared_does_not_overflow_in_models_of_any_size(shape: tuple[int, ...]) -> None:
    space = make_space([shape, (3,)])
    cut = tuple(n - n // 2 for n in shape)
    for offset in ((0,) * len(shape), tuple(n // 2 for n in shape)):
        view = View(space, (Slab(0, offset, cut), Slab(1, (1,), (2,))))
        part = Part(view, *space.shard_ranges(1024)[0])
        part.prepare_segments()
        last = np.array([view.size - 1])
        assert view.to_global(last)[0] == space.size - 1
        assert view.to_local(view.to_global(last)) == last
        assert view.rank(space.size) == view.size


def test_the_segments_of_a_shard_are_counted_as_its_parts_have_them() -> None:
    space = make_space([(3,), (0,), (2 * SEGMENT_LIMIT + 1,), (), (4,), (2,)], num_buffers=2)
    for num_shards in (1, 2, 3, 7, 1000):
        for start, stop in space.shard_ranges(num_shards):
            sizes = Part(View.whole(space), start, stop).segment_sizes
            assert space.count_segments(start, stop) == len(sizes)


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


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39])
def test_tensors_that_float32_cannot_hold_are_refused_by_name(bad: float) -> None:
    space = make_space([(2,), (3,)], num_buffers=1)
    given = {"t0": np.zeros(2), "t1": np.array([0.0, bad, 1.0]), "ignored": np.full(2, np.nan)}
    with pytest.raises(ConfigError, match="in tensor 't1'"):
        space.flatten(given)
    given["t1"][1] = 2.0
    assert space.flatten(given).tolist() == [0.0, 0.0, 0.0, 2.0, 1.0]
