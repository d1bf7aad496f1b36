"""The compiled one-pass kernels compute what their definitions compute, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from dgs.errors import ConfigError
from dgs.kernels import reference
from tests.dgs.kernels.conftest import SHAPES, SIZES, Floats, make

Outcome = tuple[int, list[int], bytes]


def _outcome(
    room: int, kernel: Callable[..., int], *arguments: Floats | float, first: int = 0
) -> Outcome:
    indices, values = np.full(room, -7, np.int64), np.zeros(room, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        count = kernel(*arguments, indices, values, first=first)
    written = min(count, room)
    return count, indices[:written].tolist(), values[:written].tobytes()


def _thresholds(values: Floats) -> list[float]:
    magnitudes = np.sort(np.abs(values))
    picks = [float(magnitudes[int(q * (values.size - 1))]) for q in (0.5, 0.99, 1.0)]
    return [0.0, *picks]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
def test_accumulating_selects_and_leaves_what_the_definition_does(
    fast: ModuleType, shape: str, size: int
) -> None:
    base, local, start = (make(shape, size, s) for s in range(3))
    with np.errstate(over="ignore", invalid="ignore"):
        after = start + (base - local)
    for threshold in _thresholds(after) if size else [0.0]:
        if np.isnan(threshold):
            continue
        for room in (size, size // 3):
            seen = []
            for kernel in (reference, fast):
                velocity = start.copy()
                seen.append(
                    (
                        _outcome(
                            room,
                            kernel.accumulate_and_select,
                            *(velocity, base, local),
                            threshold,
                            first=100,
                        ),
                        velocity.tobytes(),
                    )
                )
            assert seen[0] == seen[1]


@pytest.mark.parametrize("shape", SHAPES)
def test_adding_progress_selects_and_leaves_what_the_definition_does(
    fast: ModuleType, shape: str
) -> None:
    progress, start = make(shape, 2113, 0), make(shape, 2113, 1)
    seen = []
    for kernel in (reference, fast):
        velocity = start.copy()
        outcome = _outcome(3000, kernel.add_and_select, velocity, progress, 1e-3)
        seen.append((outcome, velocity.tobytes()))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
def test_scanning_finds_what_the_definition_finds(fast: ModuleType, shape: str, size: int) -> None:
    model, replica = make(shape, size, 0), make(shape, size, 1)
    replica[: size // 2] = model[: size // 2]
    for threshold in (0.0, 1e-44, 0.25, 2.0):
        for room in (size, size // 5):
            expected, got = (
                _outcome(room, k.scan, model, replica, threshold) for k in (reference, fast)
            )
            assert got == expected


def test_at_threshold_zero_everything_that_differs_is_found(fast: ModuleType) -> None:
    model = make("normal", 5000, 0)
    replica = model.copy()
    differs = np.array([0, 63, 64, 511, 512, 4999])
    replica[differs] = np.nextafter(model[differs], np.float32(np.inf))
    assert _outcome(9, fast.scan, model, replica, 0.0)[1] == differs.tolist()


@pytest.mark.parametrize("where", [slice(1, 1000), slice(64, 2500), slice(4999, 5000)])
def test_ranges_of_a_larger_array_are_left_alone_outside(fast: ModuleType, where: slice) -> None:
    base, local, start = (make("normal", 5000, s) for s in range(3))
    velocity = start.copy()
    indices, values = np.zeros(5000, np.int64), np.zeros(5000, np.float32)
    part = velocity[where]
    count = fast.accumulate_and_select(
        part, base[where], local[where], 1.0, indices, values, first=where.start
    )
    expected = start.copy()
    expected[where] += base[where] - local[where]
    assert velocity.tobytes() == expected.tobytes()
    chosen = np.flatnonzero(np.abs(expected[where]) >= 1.0) + where.start
    assert indices[:count].tolist() == chosen.tolist()


@seed(0)
@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(0, 5000),
    shape=st.sampled_from(SHAPES),
    number=st.integers(0, 1 << 20),
    share=st.floats(0, 1),
)
def test_any_scan_agrees(size: int, shape: str, number: int, share: float) -> None:
    cpu = pytest.importorskip("dgs.kernels.cpu")
    model, replica = make(shape, size, number), make("normal", size, number + 1)
    with np.errstate(over="ignore"):
        ordered = np.sort(np.abs(model - replica))
    threshold = float(ordered[int(share * (size - 1))]) if size else 0.0
    expected, got = (_outcome(size, k.scan, model, replica, threshold) for k in (reference, cpu))
    assert got == expected


@pytest.mark.parametrize("bad", [np.nan, np.inf, np.finfo(np.float32).max])
def test_an_update_that_would_break_the_model_changes_nothing(fast: ModuleType, bad: float) -> None:
    model = np.full(100, -np.finfo(np.float32).max, np.float32)
    indices, values = np.array([3, 50, 99]), np.array([-1.0, bad, bad], np.float32)
    for kernel in (reference, fast):
        after = model.copy()
        assert kernel.apply_update(after, indices, values) == 1
        assert after.tobytes() == model.tobytes()


def test_applying_and_settling_compute_what_the_definitions_do(fast: ModuleType) -> None:
    start = make("heavy-tailed", 3000, 0)
    indices = np.flatnonzero(make("sparse", 3000, 1))
    values = make("normal", indices.size, 2)
    seen = []
    for kernel in (reference, fast):
        model, velocity = start.copy(), start.copy()
        assert kernel.apply_update(model, indices, values) == -1
        kernel.settle(velocity, indices, values, 0.7)
        replica, written = start.copy(), np.zeros_like(values)
        kernel.record(replica, model, indices, written)
        assert written.tobytes() == model[indices].tobytes()
        seen.append((model.tobytes(), velocity.tobytes(), replica.tobytes()))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("threshold", [-1.0, float("nan")])
def test_a_threshold_that_is_none_is_refused(fast: ModuleType, threshold: float) -> None:
    room = np.zeros(4, np.int64), np.zeros(4, np.float32)
    for kernel in (reference, fast):
        with pytest.raises(ConfigError, match="must not be negative"):
            kernel.scan(np.ones(4, np.float32), np.zeros(4, np.float32), threshold, *room)


def test_arrays_that_compiled_code_would_misread_are_refused(fast: ModuleType) -> None:
    room = np.zeros(4, np.int64), np.zeros(4, np.float32)
    good = np.ones(4, np.float32)
    for wrong in (np.ones(4), np.ones(5, np.float32), np.ones(8, np.float32)[::2]):
        with pytest.raises(ConfigError):
            fast.scan(good, wrong, 0.5, *room)
    with pytest.raises(ConfigError):
        fast.scan(good, good, 0.5, room[0][:3], room[1])
    with pytest.raises(ConfigError):
        fast.exact_top_k(good, 3, room[0][:2], room[1][:2])
