"""Dropping follows its tables and its definition, stably, and never needs a choice there is not."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe.capacity import capacity, keep
from moe.config import By, RouterConfig
from moe.errors import RoutingError
from moe.permute import choose_weights, pad_to_capacity, permute, row_order, unpermute
from moe.router import Routing, route
from tests.moe.single import dropped

FOUR_BY_FOUR = [[0.11, 0.2, 0.1, 0.3], [0.3, 0.4, 0.11, 0.1], [0.11, 0.1, 0.6, 0.5]]
FOUR_BY_FOUR += [[0.1, 0.11, 0.7, 0.8]]
FOUR_BY_SIX = [
    [0.5858, 0.4801, 0.6269, 0.5397, 0.9722, 0.7034],
    [0.5445, 0.6332, 0.4519, 0.6308, 0.0519, 0.6450],
    [0.4874, 0.8110, 0.7467, 0.8474, 0.0277, 0.3068],
    [0.8570, 0.6714, 0.5310, 0.3274, 0.4836, 0.9892],
]
TABLES: list[tuple[list[list[float]], int, By, set[tuple[int, int]]]] = [
    (
        FOUR_BY_FOUR,
        2,
        "probability",
        {(0, 1), (1, 0), (1, 1), (2, 2), (2, 3), (3, 2), (3, 3)},
    ),
    (
        FOUR_BY_FOUR,
        2,
        "position",
        {(0, 1), (0, 3), (1, 0), (1, 1), (2, 2), (2, 3), (3, 2)},
    ),
    (
        FOUR_BY_SIX,
        3,
        "probability",
        {(0, 2), (0, 4), (1, 1), (1, 3), (1, 5), (2, 1), (2, 2), (2, 3), (3, 0), (3, 5)},
    ),
    (
        FOUR_BY_SIX,
        3,
        "position",
        {(0, 2), (0, 4), (0, 5), (1, 1), (1, 3), (1, 5), (2, 1), (2, 2), (2, 3), (3, 0)},
    ),
]
"""Tables that DeepSpeed tests against: logits, choices, policy, (token, expert) kept."""


def kept_pairs(routing: Routing) -> set[tuple[int, int]]:
    pairs = zip(*torch.where(routing.kept_TK), strict=True)
    return {(int(t), int(routing.experts_TK[t, k])) for t, k in pairs}


def definition(
    experts: Tensor, weights: Tensor, num_experts: int, limit: int, by: By
) -> list[list[bool]]:
    """Serve each expert's tokens in order with Python's own sort."""
    tokens, choices = experts.shape
    kept = [[False] * choices for _ in range(tokens)]
    for e in range(num_experts):
        slots = [(t, k) for t in range(tokens) for k in range(choices) if experts[t, k] == e]
        if by == "probability":
            slots.sort(key=lambda slot: -float(weights[slot]))
        for t, k in slots[:limit]:
            kept[t][k] = True
    return kept


@pytest.mark.parametrize(("logits", "top_k", "by", "wanted"), TABLES)
@pytest.mark.parametrize("scale", [1, 2])
def test_what_is_dropped_is_that_of_the_tables(
    logits: list[list[float]], top_k: int, by: By, wanted: set[tuple[int, int]], scale: int
) -> None:
    scores = torch.tensor(logits) * scale
    limit = capacity(4, top_k, scores.shape[1], 1.0)
    assert limit == 2
    routing = dropped(route(scores, RouterConfig(scores.shape[1], top_k)), limit, by)
    assert kept_pairs(routing) == wanted


def test_weights_over_the_chosen_alone_drop_differently() -> None:
    routing = dropped(
        route(torch.tensor(FOUR_BY_FOUR), RouterConfig(4, 2, "topk-softmax")), 2, "probability"
    )
    assert kept_pairs(routing) != TABLES[0][3]


@pytest.mark.parametrize(("tokens", "num_experts"), [(64, 4), (4096, 8)])
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25])
def test_by_position_the_first_come_are_served_and_no_later_one(
    tokens: int, num_experts: int, factor: float
) -> None:
    routing = route(torch.randn(tokens, num_experts), RouterConfig(num_experts, 2))
    limit = capacity(tokens, 2, num_experts, factor)
    kept = kept_pairs(dropped(routing, limit, "position"))
    for e in range(num_experts):
        arrived = (routing.experts_TK == e).any(dim=1).nonzero().flatten().tolist()
        assert sorted(t for t, other in kept if other == e) == arrived[:limit]


@given(
    st.integers(0, 12),
    st.integers(1, 5),
    st.integers(0, 14),
    st.sampled_from(["probability", "position"]),
    st.integers(0, 10**6),
)
def test_the_kept_are_those_of_the_definition(
    tokens: int, num_experts: int, limit: int, by: By, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    top_k = int(torch.randint(1, num_experts + 1, (), generator=generator))
    orders = torch.rand(tokens, num_experts, generator=generator).argsort(dim=1)
    experts = orders[:, :top_k].contiguous()
    experts[torch.rand(tokens, generator=generator) < 0.2] = -1
    weights = torch.randint(0, 3, (tokens, top_k), generator=generator) / 4  # many ties
    found = keep(experts, weights, num_experts, limit, by)
    assert found.tolist() == definition(experts, weights, num_experts, limit, by)


@pytest.mark.parametrize("by", ["probability", "position"])
def test_padding_takes_nobodys_place(by: By) -> None:
    logits, valid = torch.randn(20, 4), torch.arange(20) % 3 != 0
    padded = route(logits, RouterConfig(4, 2), valid_T=valid)
    plain = route(logits[valid], RouterConfig(4, 2))
    for limit in (1, 3, 7):
        kept = dropped(padded, limit, by).kept_TK
        assert torch.equal(kept[valid], dropped(plain, limit, by).kept_TK)
        assert not kept[~valid].any()


@pytest.mark.parametrize(
    ("factor", "pad", "rows"), [(1.0, True, 64), (2.0, True, 128), (1.0, False, None)]
)
def test_padded_experts_have_exactly_their_capacity(
    factor: float, pad: bool, rows: int | None
) -> None:
    routing = route(torch.randn(32, 4), RouterConfig(4, 2))
    limit = capacity(32, 2, 4, factor)
    order = row_order(routing.experts_TK, dropped(routing, limit, "probability").kept_TK, 4)
    assert order.slot_N.numel() <= 64
    if pad:
        order = pad_to_capacity(order, limit)
        assert order.slot_N.numel() == rows
        assert order.counts_E.tolist() == [limit] * 4


def test_without_a_capacity_all_choices_are_carried_out() -> None:
    routing = route(torch.randn(32, 4), RouterConfig(4, 2))
    assert row_order(routing.experts_TK, routing.kept_TK, 4).slot_N.numel() == 64


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("by", ["probability", "position"])
def test_the_output_of_identity_experts_is_the_input_times_the_kept_weights(
    pad: bool, by: By
) -> None:
    factor, limit = (0.6, 3) if pad else (0.5, 2)
    x = torch.randn(16, 8, requires_grad=True)
    assert capacity(16, 2, 8, factor) == limit
    routing = dropped(route(torch.randn(16, 8), RouterConfig(8, 2)), limit, by)
    order = row_order(routing.experts_TK, routing.kept_TK, 8)
    assert int(order.counts_E.max()) <= limit
    if pad:
        order = pad_to_capacity(order, limit)
        assert order.counts_E.tolist() == [3] * 8
    y = unpermute(permute(x, order), order, choose_weights(routing.weights_TK, order))
    share = (routing.weights_TK * routing.kept_TK).sum(dim=1, keepdim=True)
    torch.testing.assert_close(y, x * share)
    y.sum().backward()
    torch.testing.assert_close(x.grad, share.expand_as(x))


@pytest.mark.parametrize(("tokens", "factor"), list(product((1, 2, 5), (4.0, 100.0))))
def test_a_capacity_above_the_tokens_works_padded_and_drops_nothing(
    tokens: int, factor: float
) -> None:
    limit = capacity(tokens, 2, 2, factor)
    assert limit == tokens  # a token goes to an expert once at most
    x = torch.randn(tokens, 16)
    routing = dropped(route(torch.randn(tokens, 2), RouterConfig(2, 2)), limit, "probability")
    assert routing.kept_TK.all()
    order = pad_to_capacity(row_order(routing.experts_TK, routing.kept_TK, 2), limit)
    y = unpermute(permute(x, order), order, choose_weights(routing.weights_TK, order))
    torch.testing.assert_close(y, x * routing.weights_TK.sum(dim=1, keepdim=True))
    # nor does a capacity that was not cut to the tokens break anything
    wide = pad_to_capacity(row_order(routing.experts_TK, routing.kept_TK, 2), 3 * tokens + 1)
    assert permute(x, wide).shape == (2 * (3 * tokens + 1), 16)


def test_the_factor_means_its_decimal_digits() -> None:
    assert [capacity(100, 1, 10, f) for f in (1.0, 1.1, 1.25, 0.05)] == [10, 11, 13, 1]
    assert 1.1 * 100 / 10 > 11  # what a plain ceil would round up to 12
    assert capacity(0, 2, 4, 1.0) == 0


def test_more_rows_than_the_capacity_are_not_padded_silently() -> None:
    order = row_order(torch.zeros(5, 1, dtype=torch.int64), None, 2)
    with pytest.raises(RoutingError, match="5 rows, more than the capacity of 4"):
        pad_to_capacity(order, 4)
    with pytest.raises(RoutingError, match="limit=-1"):
        keep(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), 1, -1, "position")
