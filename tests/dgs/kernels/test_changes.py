"""The compiled loops over changes give what their definitions give, bit for bit."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from dgs.errors import ConfigError
from dgs.kernels import changes
from tests.dgs.kernels.conftest import SHAPES, Floats, make

Ints = npt.NDArray[np.int64]


@pytest.fixture(scope="module")
def walking(fast: ModuleType) -> ModuleType:
    """Return the compiled loops; skip where numba is missing."""
    from dgs.kernels import cpu_changes

    return cpu_changes


def cuts(size: int, seed: int) -> Ints:
    """Cut a range into segments, some of them empty."""
    rng = np.random.default_rng(seed)
    return np.append(np.sort(rng.integers(0, size + 1, 4)), size)


def some(size: int, share: float, seed: int) -> Ints:
    """Draw coordinates, ascending."""
    return np.flatnonzero(np.random.default_rng(seed).random(size) < share)


def bounds_of(values: Floats, segments: int, seed: int) -> npt.NDArray[np.uint32]:
    """Draw one bound per segment: magnitudes that occur, the least, or one that nothing reaches."""
    rng = np.random.default_rng(seed)
    usual = np.maximum(changes.magnitude_bits(values), 1).tolist()
    return rng.choice(np.array([1, changes.NO_BOUND, *usual], np.uint32), segments)


def listed(total: int, *arrays: npt.NDArray[Any]) -> list[bytes]:
    """Return the first entries of some arrays as bytes."""
    return [a[:total].tobytes() for a in arrays]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [0, 1, 64, 65, 3000, 70_000])
@pytest.mark.parametrize("number", [0, 1, 3])
def test_walks_agree(walking: ModuleType, shape: str, size: int, number: int) -> None:
    then, ends = make(shape, size, 1), cuts(size, 2)
    floors, bounds = bounds_of(then, ends.size, 3), bounds_of(then, ends.size, 4)
    held = some(size, 0.1, 5)
    lists = [some(size + 20, 0.3, 6 + i) + 7 for i in range(number)]  # also what lies outside
    coordinates = np.concatenate([np.zeros(0, np.int64), *lists])
    starts = np.cumsum([0, *(at.size for at in lists)])
    now = make(shape, coordinates.size, 9)
    results = []
    for kernels in (changes, walking):
        room = coordinates.size + held.size
        out = np.zeros(room, np.int64), np.zeros(room, np.float32)
        counts, reached = np.full(ends.size, -1), np.full(ends.size, -1)
        old = held, make("normal", held.size, 10)
        arguments = coordinates, now, starts, then, 15, *old, ends, floors, bounds
        total = kernels.walk(*arguments, *out, counts, reached)
        assert counts.sum() == total
        assert (np.diff(out[0][:total]) > 0).all()
        results.append([counts.tobytes(), reached.tobytes(), *listed(total, *out)])
    assert results[0] == results[1]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [0, 1, 65, 3000])
def test_choosing_and_retaining_agree(walking: ModuleType, shape: str, size: int) -> None:
    values = make(shape, size, 0)
    values[values == 0] = 0.5
    counts = np.diff(cuts(size, 1), prepend=0)
    rng = np.random.default_rng(2)
    wanted = rng.integers(0, np.maximum(counts, 1) + 3)
    most = rng.integers(0, np.maximum(counts, 1) + 3)
    results = []
    for kernels in (changes, walking):
        bounds = np.full(counts.size, 7, np.uint32)
        ties = np.full(counts.size, 9)
        kernels.largest(values, counts, wanted, bounds, ties)
        positions = np.zeros(size, np.int64)
        found = kernels.choose(values, counts, bounds, ties, positions)
        kept = np.zeros(size, np.int64), np.zeros(size, np.float32)
        left, floors = counts.copy(), bounds_of(values, counts.size, 3)
        total = kernels.retain(np.arange(size), values, left, floors, most, *kept)
        assert left.sum() == total
        assert (left <= np.maximum(most, 0)).all()
        arrays = [bounds, ties, left, floors]
        results.append([*(a.tobytes() for a in arrays), *listed(found, positions)])
        results[-1] += listed(total, *kept)
    assert results[0] == results[1]


def test_the_largest_are_those_of_the_exact_selection() -> None:
    values = make("ties", 500, 3)
    values[values == 0] = 4.0
    counts, wanted = np.array([200, 300]), np.array([50, 400])
    bounds, ties = np.zeros(2, np.uint32), np.zeros(2, np.int64)
    changes.largest(values, counts, wanted, bounds, ties)
    positions = np.zeros(500, np.int64)
    found = positions[: changes.choose(values, counts, bounds, ties, positions)]
    order = np.argsort(-np.abs(values[:200]), kind="stable")[:50]
    assert found.tolist() == [*sorted(order.tolist()), *range(200, 500)]


def test_an_update_is_applied_whole_and_both_sides_noted_or_refused_whole(
    walking: ModuleType,
) -> None:
    for kernels in (changes, walking):
        model = make("normal", 100, 0)
        start, at = model.copy(), np.arange(3, 90, 7)
        values = make("normal", at.size, 1)
        before, after = np.zeros(at.size, np.float32), np.zeros(at.size, np.float32)
        assert kernels.apply_and_log(model, at, values, before, after) == -1
        assert before.tobytes() == start[at].tobytes()
        assert after.tobytes() == model[at].tobytes() == (start[at] - values).tobytes()
        values[5] = np.nan
        applied = model.copy()
        assert kernels.apply_and_log(model, at, values, before, after) == 5
        assert model.tobytes() == applied.tobytes()


@seed(0)
@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 3000),
    shape=st.sampled_from(SHAPES),
    number=st.integers(0, 1 << 20),
)
def test_any_scan_of_segments_agrees(size: int, shape: str, number: int) -> None:
    cpu_changes = pytest.importorskip("dgs.kernels.cpu_changes")
    model, replica = make(shape, size, number), make("normal", size, number + 1)
    ends = cuts(size, number)
    rng = np.random.default_rng(number)
    most = rng.integers(0, np.diff(ends, prepend=0) + 1)
    bounds = bounds_of(replica, ends.size, number)
    results = []
    for kernels in (changes, cpu_changes):
        room = np.zeros(most.sum(), np.int64), np.zeros(most.sum(), np.float32)
        counts = np.full(ends.size, -5)
        total = kernels.scan_segments(model, replica, ends, bounds, most, *room, counts)
        results.append([counts.tobytes(), *listed(total, *room)])
    assert results[0] == results[1]


def test_sizes_that_do_not_match_are_refused(walking: ModuleType) -> None:
    ramp, at = np.ones(4, np.float32), np.arange(4)
    with pytest.raises(ConfigError, match="4 and 3 entries do not match"):
        walking.apply_and_log(ramp, at, ramp[:3], ramp, ramp)
    with pytest.raises(ConfigError, match="room for 3 entries, but 4 are possible"):
        walking.choose(ramp, at[:1], np.ones(1, np.uint32), at[:1], at[:3])
