"""The compiled exact top-k is `top_k_indices`, whatever the values do to its sample."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from dgs.kernels import reference
from dgs.select import top_k_indices
from tests.dgs.kernels.conftest import SHAPES, SIZES, Floats, make


def _check(fast: ModuleType, values: Floats, k: int) -> None:
    expected = top_k_indices(torch.from_numpy(values), k).tolist()
    for room in (values.size, min(values.size, 2 * k + 1024), k):
        indices, found = np.full(room, -7, np.int64), np.zeros(room, np.float32)
        count = fast.exact_top_k(values, k, indices, found)
        assert indices[:count].tolist() == expected
        assert found[:count].tobytes() == values[expected].tobytes()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [*SIZES, 40_000])
def test_top_k_is_the_definition(fast: ModuleType, shape: str, size: int) -> None:
    values = make(shape, size, 0)
    for k in sorted({0, min(1, size), size // 100, size // 3, max(size - 1, 0), size}):
        _check(fast, values, k)


def test_a_sample_that_sees_none_of_the_large_entries_costs_no_exactness(
    fast: ModuleType,
) -> None:
    values = make("normal", 50_000, 0)
    offset = np.arange(values.size) % 2039
    values[offset >= 32] *= 100  # the sample sees the small ones: too many candidates
    _check(fast, values, 500)
    values = make("normal", 50_000, 0)
    values[offset < 32] *= 100  # and the large ones only: too few
    _check(fast, values, 5_000)


def test_ties_among_many_go_to_the_lower_index(fast: ModuleType) -> None:
    values = np.ones(100_000, np.float32)
    values[::3] = -1.0
    values[77_777] = 2.0
    _check(fast, values, 1_000)


def test_accumulating_and_scanning_choose_the_same_as_two_steps(fast: ModuleType) -> None:
    for shape in ("normal", "ties", "equal", "sparse"):
        base, local, start = (make(shape, 30_011, s) for s in range(3))
        seen = []
        for kernel in (reference, fast):
            velocity = start.copy()
            indices, values = np.zeros(1700, np.int64), np.zeros(1700, np.float32)
            arrays = velocity, base, local
            count = kernel.accumulate_and_top_k(*arrays, 300, indices, values, first=9)
            seen.append((velocity.tobytes(), indices[:count].tolist(), values[:count].tobytes()))
            count = kernel.scan_top_k(base, local, 300, indices, values, first=9)
            seen.append((b"", indices[:count].tolist(), values[:count].tobytes()))
        assert seen[:2] == seen[2:]


@seed(0)
@settings(max_examples=80, deadline=None)
@given(
    size=st.integers(0, 9000),
    shape=st.sampled_from(SHAPES),
    number=st.integers(0, 1 << 20),
    share=st.floats(0, 1),
)
def test_any_top_k_agrees(size: int, shape: str, number: int, share: float) -> None:
    cpu = pytest.importorskip("dgs.kernels.cpu")
    _check(cpu, make(shape, size, number), int(share * size))
