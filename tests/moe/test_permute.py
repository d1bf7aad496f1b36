"""Rows go where their experts are and come back, with the gradients of what was done."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe.errors import RoutingError
from moe.permute import (
    RowOrder,
    choose_weights,
    expert_major,
    pad_to_capacity,
    pad_to_multiple,
    permute,
    row_order,
    unpermute,
)


def draw(tokens: int, choices: int, num_experts: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return choices without repetition, and which of them are kept."""
    generator = torch.Generator().manual_seed(seed)
    experts = torch.rand(tokens, num_experts, generator=generator).argsort(dim=1)[:, :choices]
    return experts.contiguous(), torch.rand(tokens, choices, generator=generator) < 0.7


cases = st.integers(1, 6).flatmap(
    lambda e: st.tuples(
        st.integers(0, 9), st.integers(1, e), st.just(e), st.integers(0, 10**6), st.integers(0, 2)
    )
)


def padded(order: RowOrder, how: int) -> RowOrder:
    if how == 1:
        return pad_to_multiple(order, 4)
    return pad_to_capacity(order, int(order.counts_E.max()) + 1) if how == 2 else order


@given(cases)
def test_rows_lie_by_expert_and_then_by_token(case: tuple[int, int, int, int, int]) -> None:
    tokens, choices, num_experts, seed, how = case
    experts, kept = draw(tokens, choices, num_experts, seed)
    order = padded(row_order(experts, kept, num_experts), how)
    wanted = [
        [s for s in range(tokens * choices) if kept.flatten()[s] and experts.flatten()[s] == e]
        for e in range(num_experts)
    ]
    for rows, slots in zip(order.slot_N.split(order.counts_E.tolist()), wanted, strict=True):
        assert rows.tolist() == slots + [-1] * (len(rows) - len(slots))
        assert how != 1 or len(rows) % 4 == 0
    assert order.source_N.tolist() == [s if s < 0 else s // choices for s in order.slot_N.tolist()]
    back = {int(s): n for n, s in enumerate(order.slot_N) if s >= 0}
    assert order.position_TK.flatten().tolist() == [
        back.get(s, -1) for s in range(tokens * choices)
    ]


@given(cases)
def test_gradients_are_those_of_plain_indexing(case: tuple[int, int, int, int, int]) -> None:
    tokens, choices, num_experts, seed, how = case
    experts, kept = draw(tokens, choices, num_experts, seed)
    order = padded(row_order(experts, kept, num_experts), how)
    generator = torch.Generator().manual_seed(seed)
    x, weights = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((tokens, 3), (tokens, choices))
    )
    maps = (torch.arange(order.slot_N.numel()).double() + 1).unsqueeze(1)
    y = unpermute(permute(x, order) * maps, order, choose_weights(weights, order))
    real = order.slot_N >= 0
    source, slots = order.source_N[real], order.slot_N[real]
    rows = x[source] * maps[real] * weights.flatten()[slots].unsqueeze(1)
    wanted = torch.zeros_like(x).index_add(0, source, rows)
    torch.testing.assert_close(y, wanted)
    head = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    found = torch.autograd.grad((y * head).sum(), (x, weights))
    expected = torch.autograd.grad((wanted * head).sum(), (x, weights))
    torch.testing.assert_close(found, expected)


def test_gradients_pass_the_numerical_check() -> None:
    experts, kept = draw(5, 2, 4, seed=3)
    order = pad_to_multiple(row_order(experts, kept, 4), 3)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)

    def both(tokens: Tensor, factors: Tensor) -> Tensor:
        rows = permute(tokens, order)
        return unpermute(rows.square(), order, choose_weights(factors, order))

    assert torch.autograd.gradcheck(both, (x, weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_is_the_input_times_its_choices(dtype: torch.dtype) -> None:
    experts, _ = draw(32, 4, 8, seed=0)
    order = row_order(experts, None, 8)
    x = torch.randn(32, 16).to(dtype).requires_grad_()
    y = unpermute(permute(x, order), order)
    assert torch.equal(y, 4 * x)
    y.backward(x.detach())
    assert torch.equal(x.grad, 4 * x)


def test_half_precision_rows_are_summed_in_float32() -> None:
    order = row_order(torch.tensor([[0, 1, 2, 3]]), None, 4)
    rows = torch.tensor([[256.0], [1.0], [1.0], [1.0]]).bfloat16()
    assert unpermute(rows, order).item() == 260  # 256 + 1 would be 256 again


@pytest.mark.parametrize("multiple", [8, 16, 32])
def test_padding_to_a_multiple_changes_no_result(multiple: int) -> None:
    experts, kept = draw(32, 2, 8, seed=1)
    x, weights = torch.randn(32, 16), torch.rand(32, 2)
    plain = row_order(experts, kept, 8)
    order = pad_to_multiple(plain, multiple)
    assert all(count % multiple == 0 for count in order.counts_E.tolist())
    results = [
        unpermute(permute(x, o).square(), o, choose_weights(weights, o)) for o in (plain, order)
    ]
    assert torch.equal(*results)
    assert (permute(x, order)[order.slot_N < 0] == 0).all()


def test_padding_to_a_multiple_adds_what_is_missing_and_nothing_else() -> None:
    kept = torch.zeros(8, 1, dtype=torch.bool)
    kept[[0, 3, 5]] = True
    order = pad_to_multiple(row_order(torch.zeros(8, 1, dtype=torch.int64), kept, 2), 4)
    assert order.counts_E.tolist() == [4, 0]
    assert order.source_N.tolist() == [0, 3, 5, -1]


def test_rows_of_padding_pass_no_gradient_and_may_hold_anything() -> None:
    order = pad_to_capacity(row_order(torch.tensor([[1], [0], [1]]), None, 3), 3)
    rows = torch.randn(9, 4)
    rows[order.slot_N < 0] = torch.nan
    rows.requires_grad_()
    weights = torch.rand(9, requires_grad=True)
    y = unpermute(rows, order, weights)
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert (rows.grad[order.slot_N < 0] == 0).all()
    assert (weights.grad[order.slot_N < 0] == 0).all()


@pytest.mark.parametrize("tokens", [0, 4])
def test_no_row_at_all_gives_zeros_with_a_gradient(tokens: int) -> None:
    experts = torch.zeros(tokens, 2, dtype=torch.int64)
    order = row_order(experts, torch.zeros(tokens, 2, dtype=torch.bool), 3)
    x = torch.randn(tokens, 5, requires_grad=True)
    weights = torch.rand(tokens, 2, requires_grad=True)
    rows = permute(x, order)
    assert rows.shape == (0, 5)
    y = unpermute(rows, order, choose_weights(weights, order))
    assert torch.equal(y, torch.zeros(tokens, 5))
    y.sum().backward()
    assert (x.grad == 0).all()
    assert (weights.grad == 0).all()


def test_rows_of_another_order_are_refused() -> None:
    order = row_order(torch.tensor([[1], [0]]), None, 2)
    with pytest.raises(RoutingError, match="permute got 3 tokens, but the order is one of 2"):
        permute(torch.zeros(3, 4), order)
    with pytest.raises(RoutingError, match="unpermute got 5 rows"):
        unpermute(torch.zeros(5, 4), order)


LISTS = [
    ([[2, 3], [1, 4]], [0, 1, 5, 2, 3, 4, 6, 7, 8, 9], [3, 7]),
    ([[0, 3], [2, 0]], [3, 4, 0, 1, 2], [2, 3]),
    ([[2, 2], [2, 2], [2, 2]], [0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11], [6, 6]),
    ([[0, 0], [0, 0]], [], [0, 0]),
]
"""Lists that torchtitan tests against: rows by rank and expert, index, rows by expert."""


@pytest.mark.parametrize(("counts", "index", "per_expert"), LISTS)
def test_rows_of_ranks_are_brought_into_the_order_of_experts(
    counts: list[list[int]], index: list[int], per_expert: list[int]
) -> None:
    found, sums = expert_major(torch.tensor(counts))
    assert found.tolist() == index
    assert sums.tolist() == per_expert
