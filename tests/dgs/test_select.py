"""Which entries are sent."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dgs.errors import ConfigError
from dgs.select import ExactSelector, Selector, TrackedSelector, make_selector, top_k_indices

FLOATS = st.floats(-100, 100, width=32) | st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-40, -1e-40])


def by_sorting(values: Tensor, k: int) -> list[int]:
    """Take the k largest by a stable sort, then leave out zeros: the definition."""
    order = np.argsort(-values.abs().numpy(), kind="stable")[:k]
    return sorted(i for i in order.tolist() if values[i] != 0)


@given(st.lists(FLOATS, max_size=60), st.integers(0, 70))
def test_top_k_is_a_stable_sort_by_magnitude(values: list[float], k: int) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)
    assert top_k_indices(tensor, k).tolist() == by_sorting(tensor, k)


def test_ties_go_to_the_lower_index() -> None:
    assert top_k_indices(torch.tensor([1.0, -2.0, 2.0, -2.0, 2.0]), 2).tolist() == [1, 2]
    assert top_k_indices(torch.full((1000,), -3.0), 10).tolist() == list(range(10))


@pytest.mark.parametrize("selection", ["exact", "tracked"])
@pytest.mark.parametrize("n", [0, 1, 7, 1000])
def test_every_selector_returns_ascending_indices_and_everything_at_density_one(
    selection: str, n: int
) -> None:
    selector = make_selector(selection, 1, 0)
    values = torch.randn(n)
    for density in (1.0, 0.1, 0.33, 1.0):
        chosen = selector.select(values, 0, density)
        assert chosen.dtype == torch.int64
        assert (chosen.diff() > 0).all()
        if density == 1.0:
            assert chosen.tolist() == list(range(n))


@pytest.mark.parametrize("selector", [ExactSelector(1), TrackedSelector(1, 0)])
def test_zeros_are_never_sent(selector: Selector) -> None:
    values = torch.zeros(100)
    values[[3, 50]] = torch.tensor([1.0, -2.0])
    for _ in range(3):
        assert selector.select(values, 0, 0.1).tolist() == [3, 50]
    assert selector.select(torch.zeros(100), 0, 0.1).tolist() == []


def test_exact_takes_the_ceiling_of_density_times_size() -> None:
    selector = ExactSelector(1)
    for n in (1, 7, 50, 100, 101):
        for density in (0.01, 0.07, 0.5):
            k = math.ceil(round(n * density, 9))
            assert len(selector.select(torch.randn(n), 0, density)) == k
    assert len(selector.select(torch.randn(100), 0, 0.07)) == 7  # 0.07 * 100 > 7 in binary


def accumulated(kind: str, steps: int, n: int) -> list[tuple[Tensor, Tensor]]:
    """Draw gradients that a velocity accumulates, as the worker's loop does."""
    g = torch.Generator().manual_seed(0)
    draws = []
    for step in range(steps):
        noise = torch.randn(n, generator=g)
        if kind == "heavy-tailed":
            noise = noise / torch.rand(n, generator=g).clamp(1e-3).sqrt()
        if kind == "sparse":
            noise *= torch.rand(n, generator=g) < 0.05
        scale = 1000.0 if kind == "jumping" and step >= steps // 2 else 1.0
        draws.append((noise * scale, torch.tensor(scale)))
    return draws


@pytest.mark.parametrize("kind", ["gaussian", "heavy-tailed", "sparse", "jumping"])
@pytest.mark.parametrize("density", [0.01, 0.1])
def test_tracked_stays_near_the_density_and_never_above_twice_it(kind: str, density: float) -> None:
    n, steps = 20_000, 120
    selector, velocity = TrackedSelector(1, 0), torch.zeros(n)
    counts = []
    for gradient, _ in accumulated(kind, steps, n):
        velocity += gradient
        sent_at_most = int(velocity.count_nonzero())
        chosen = selector.select(velocity, 0, density)
        velocity[chosen] *= 0.7 if kind == "gaussian" else 0.0
        wanted = min(density * n, sent_at_most)  # zeros are never sent
        counts.append(len(chosen) / wanted)
    assert max(counts) <= 2.0
    for start in (20, 70):  # after the warm-up, and again after the jump
        assert np.mean(counts[start : start + 50]) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("selection", ["exact", "tracked"])
@pytest.mark.parametrize("count", [1, 10, 900])
def test_nan_is_always_among_what_is_selected(selection: str, count: int) -> None:
    selector = make_selector(selection, 1, 0)
    values = torch.randn(1000)
    for _ in range(3):  # so that there is a threshold to track
        selector.select(values, 0, 0.05)
    broken = values.clone()
    broken[100 : 100 + count] = torch.nan
    for _ in range(2):
        chosen = selector.select(broken, 0, 0.05)
        assert broken[chosen].isnan().sum() == min(count, 50)
        assert len(chosen) <= 100
    for _ in range(30):  # a unit that is set right again is selected from as before
        chosen = selector.select(values, 0, 0.05)
    assert 25 <= len(chosen) <= 100


@pytest.mark.parametrize("selector", [ExactSelector(1), TrackedSelector(1, 0)])
def test_selection_is_on_the_device_of_the_values(selector: Selector) -> None:
    values = torch.randn(1000)
    with torch.device("meta"):
        fresh = make_selector("tracked", 1, 0)
        for _ in range(3):
            assert selector.select(values, 0, 0.05).device == values.device
        assert selector.state().device == fresh.state().device == values.device


def test_tracked_is_deterministic_and_continues_from_its_state() -> None:
    a, b = TrackedSelector(3, 8), TrackedSelector(3, 8)
    saved = b.state()
    data = [torch.randn(3, 500) for _ in range(8)]
    for step, values in enumerate(data):
        if step == 4:
            b = TrackedSelector(3, 8)
            b.load_state(saved)
        for unit in range(3):
            expected = a.select(values[unit], unit, 0.05)
            assert torch.equal(b.select(values[unit], unit, 0.05), expected)
        saved = b.state()


def test_tracked_sends_small_units_whole() -> None:
    selector = TrackedSelector(1, dense_below=10)
    assert len(selector.select(torch.ones(9), 0, 0.1)) == 9
    assert len(selector.select(torch.ones(10), 0, 0.1)) == 1


def test_a_state_of_another_model_is_refused() -> None:
    for selector in (ExactSelector(2), TrackedSelector(2, 0)):
        with pytest.raises(ConfigError, match="is of 3 tensors, this model has 2"):
            selector.load_state(torch.zeros(3, 2, dtype=torch.float64))
