"""Views that hold everything once pass, others name the tensor; none costs more than a bound."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgs.cover import MAX_COMPARISONS, check_cover
from dgs.errors import ViewError
from dgs.space import MAX_SLABS, ParameterSpace, TensorSpec
from dgs.view import Slab, View

Box = tuple[tuple[int, ...], tuple[int, ...]]


def space_of(*shapes: tuple[int, ...]) -> ParameterSpace:
    return ParameterSpace(tuple(TensorSpec(f"t{i}", s) for i, s in enumerate(shapes)))


def views_of(shape: tuple[int, ...], boxes: Sequence[Box]) -> tuple[ParameterSpace, list[View]]:
    """Give each member one box of a single tensor."""
    space = space_of(shape)
    return space, [View(space, (Slab(0, *box),)) for box in boxes]


def quarters(space: ParameterSpace) -> list[View]:
    """Cut a (4, 6) tensor by columns for two members; the second also holds the rest."""
    left = View(space, (Slab(0, (0, 0), (4, 3)),))
    right = View(space, (Slab(0, (0, 3), (4, 3)), Slab(1, (0,), (2,))))
    return [left, right]


def test_views_that_hold_everything_once_are_accepted() -> None:
    space = space_of((4, 6), (2,), (0, 3), ())
    left, right = quarters(space)
    rest = View(space, (Slab(3, (), ()),))
    check_cover(space, [left, right, rest])
    check_cover(space, [View.whole(space)])


def test_gaps_are_refused_with_the_name_of_the_tensor() -> None:
    space = space_of((4, 6), (2,))
    left, right = quarters(space)
    with pytest.raises(ViewError, match=r"no member holds 12 of the 24 .* 't0'"):
        check_cover(space, [right])
    with pytest.raises(ViewError, match=r"no member holds 2 of the 2 .* 't1'"):
        check_cover(space, [left, View(space, (Slab(0, (0, 3), (4, 3)),))])


def test_overlaps_are_refused_with_the_members_and_the_tensor() -> None:
    space = space_of((4, 6), (2,))
    left, right = quarters(space)
    with pytest.raises(ViewError, match=r"members 0 and 1 both hold .* 't0'"):
        check_cover(space, [left, View(space, (Slab(0, (0, 2), (4, 4)),)), right])
    scalar = space_of(())
    with pytest.raises(ViewError, match=r"members 0 and 1 both hold .* 't0'"):
        check_cover(scalar, [View.whole(scalar), View.whole(scalar)])


def cut_up(shape: tuple[int, ...], rng: np.random.Generator) -> list[Box]:
    """Cut a tensor into boxes by planes, some of them around a pinwheel that no plane separates."""
    boxes: list[Box] = [((0,) * len(shape), shape)]
    for _ in range(int(rng.integers(0, 6))):
        offset, size = boxes.pop(int(rng.integers(len(boxes))))
        wide = [d for d, n in enumerate(size) if n >= 3]
        if len(wide) >= 2 and rng.random() < 0.5:
            boxes += pinwheel(offset, size, wide[0], wide[1])
            continue
        d = int(rng.integers(len(shape)))
        at = int(rng.integers(0, size[d] + 1))
        boxes.append((offset, (*size[:d], at, *size[d + 1 :])))
        moved = (*offset[:d], offset[d] + at, *offset[d + 1 :])
        boxes.append((moved, (*size[:d], size[d] - at, *size[d + 1 :])))
    return boxes


def pinwheel(offset: tuple[int, ...], size: tuple[int, ...], a: int, b: int) -> list[Box]:
    """Cut a box into five around its middle, such that every plane cuts one of them."""
    n, m = size[a], size[b]
    blades = [
        ((0, 0), (1, m - 1)),
        ((0, m - 1), (n - 1, 1)),
        ((n - 1, 1), (1, m - 1)),
        ((1, 0), (n - 1, 1)),
        ((1, 1), (n - 2, m - 2)),
    ]
    boxes = []
    for (x, y), (w, h) in blades:
        at, extent = list(offset), list(size)
        at[a], at[b], extent[a], extent[b] = offset[a] + x, offset[b] + y, w, h
        boxes.append((tuple(at), tuple(extent)))
    return boxes


def overlap(a: Box, b: Box) -> bool:
    """Tell by the definition whether two boxes have a coordinate in common."""
    cells = [set(product(*map(range, o, np.add(o, n).tolist()))) for o, n in (a, b)]
    return bool(cells[0] & cells[1])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 4), max_size=3).map(tuple), st.integers(0, 2**32 - 1))
def test_cover_is_what_comparing_all_pairs_says(shape: tuple[int, ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    boxes: list[Box] = [((), ())] * int(rng.integers(0, 3))
    if shape:
        boxes = cut_up(shape, rng)
    for _ in range(int(rng.integers(0, 3)) if boxes else 0):  # and damage it
        i = int(rng.integers(len(boxes)))
        offset = tuple(int(rng.integers(0, n)) for n in shape)
        left = [n - o for o, n in zip(offset, shape, strict=True)]
        boxes[i] = (offset, tuple(int(rng.integers(0, n + 1)) for n in left))
    rng.shuffle(boxes)
    space, views = views_of(shape, boxes)
    pairs = {(i, j) for i, j in combinations(range(len(boxes)), 2) if overlap(boxes[i], boxes[j])}
    held = sum(view.size for view in views)
    if pairs:
        with pytest.raises(ViewError, match="both hold a part of tensor 't0'") as caught:
            check_cover(space, views)
        words = str(caught.value).split()
        assert (int(words[1]), int(words[3])) in pairs
    elif held != space.size:
        with pytest.raises(ViewError, match=f"no member holds {space.size - held} of the"):
            check_cover(space, views)
    else:
        check_cover(space, views)


def rings(count: int) -> tuple[ParameterSpace, list[View]]:
    """Nest pinwheels: no plane separates any two of the 4 * count + 1 slabs."""
    side = 2 * count + 1
    boxes: list[Box] = [((count, count), (1, 1))]
    for k in range(count):
        long = side - 1 - 2 * k
        boxes += [((k, k), (1, long)), ((k, k + long), (long, 1))]
        boxes += [((k + long, k + 1), (1, long)), ((k + 1, k), (long, 1))]
    return views_of((side, side), boxes)


def spiral(count: int) -> tuple[ParameterSpace, list[View]]:
    """Peel off a row, then a column, and so on: each plane separates one slab from all others."""
    boxes: list[Box] = []
    row = column = 0
    for i in range(count):
        if i % 2:
            boxes.append(((row, column), (count - row, 1)))
            column += 1
        else:
            boxes.append(((row, column), (1, count - column)))
            row += 1
    boxes.append(((row, column), (count - row, count - column)))
    return views_of((count, count), boxes)


def test_slabs_that_no_plane_separates_are_accepted() -> None:
    check_cover(*rings(200))
    check_cover(*spiral(500))


def test_a_thousand_members_of_one_tensor_are_checked_at_the_cost_of_sorting() -> None:
    rows: list[Box] = [((i, 0), (1, 8)) for i in range(1000)]
    grid: list[Box] = [((i, j), (10, 10)) for i in range(0, 320, 10) for j in range(0, 320, 10)]
    for shape, boxes in (((1000, 8), rows), ((320, 320), grid)):
        space, views = views_of(shape, boxes)
        begin = time.perf_counter()
        check_cover(space, views)
        with pytest.raises(ViewError, match="both hold"):
            check_cover(space, [*views, View(space, (Slab(0, (5, 0), (1, 8)),))])
        assert time.perf_counter() - begin < 1.0  # some milliseconds; pairs would take seconds


@pytest.mark.parametrize("maze", [rings, spiral])
def test_mazes_of_thousands_of_slabs_are_refused_after_a_bounded_number_of_comparisons(
    maze: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MAX_COMPARISONS >= 4 * MAX_SLABS  # enough for grids of four dimensions
    monkeypatch.setattr("dgs.cover.MAX_COMPARISONS", 10_000)
    space, views = maze(400)
    with pytest.raises(ViewError, match="of tensor 't0' interlock too much to be checked"):
        check_cover(space, views)
