"""A layer put together from its parts is what a loop over tokens and choices computes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe.capacity import capacity
from moe.config import ExpertConfig, RouterConfig, Score
from moe.experts import Experts
from moe.permute import choose_weights, pad_to_capacity, permute, row_order, unpermute
from moe.router import Router, Routing
from tests.moe.single import dropped, layer, token_loop

DROPPING = st.sampled_from([None, 0.5, 1.0, 8.0])


def results(
    y: Tensor, x: Tensor, router: Router, experts: Experts, *, zeros: bool = False
) -> list[Tensor]:
    """Return the output and the gradients of something that tells its entries apart.

    With `zeros`, what has no part in the output may have no gradient; it becomes zero.
    """
    head = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    inputs = [x, router.weight_ED, *experts.parameters()]
    return [y, *torch.autograd.grad((y * head).sum(), inputs, materialize_grads=zeros)]


@given(
    st.integers(1, 8),
    st.integers(2, 5),
    st.integers(1, 3),
    st.sampled_from(["softmax-topk", "topk-softmax", "sigmoid"]),
    DROPPING,
    st.booleans(),
    st.integers(0, 10**6),
)
def test_output_and_gradients_are_those_of_a_loop_over_tokens(
    tokens: int,
    num_experts: int,
    top_k: int,
    score: Score,
    factor: float | None,
    inside: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    top_k = min(top_k, num_experts)
    score = "sigmoid" if top_k == 1 else score
    router = Router(RouterConfig(num_experts, top_k, score), 4, dtype=torch.float64)
    experts = Experts(ExpertConfig(4, 3), num_experts, dtype=torch.float64)
    x = torch.randn(tokens, 4, dtype=torch.float64, requires_grad=True)
    valid = torch.rand(tokens) < 0.8

    def routing() -> Routing:
        found = router(x, valid)
        if factor is None:
            return found
        return dropped(found, capacity(tokens, top_k, num_experts, factor), "probability")

    found = results(layer(x, routing(), experts, weigh_inside=inside), x, router, experts)
    wanted = results(token_loop(x, routing(), experts), x, router, experts, zeros=True)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("factor", [0.5, 0.6, 1.0, 100.0])
def test_padding_to_capacity_changes_neither_output_nor_gradients(factor: float) -> None:
    router, experts = Router(RouterConfig(8, 2), 16), Experts(ExpertConfig(16, 8), 8)
    x = torch.randn(16, 16, requires_grad=True)
    limit = capacity(16, 2, 8, factor)
    seen = []
    for pad in (False, True):
        routing = dropped(router(x), limit, "probability")
        order = row_order(routing.experts_TK, routing.kept_TK, 8)
        if pad:
            order = pad_to_capacity(order, limit)
            assert order.counts_E.tolist() == [limit] * 8
        weights = choose_weights(routing.weights_TK, order)
        y = unpermute(experts(permute(x, order), order.counts_E, weights), order)
        seen.append(results(y, x, router, experts))
    torch.testing.assert_close(*seen, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_experts", [2, 8])
def test_maps_that_tell_experts_apart_arrive_at_their_tokens(num_experts: int) -> None:
    # a misrouted row would meet the wrong map f_e(x) = (e + 1) x + e
    x, router = torch.randn(32, 8), Router(RouterConfig(num_experts, 2), 8)
    routing = router(x)
    order = row_order(routing.experts_TK, routing.kept_TK, num_experts)
    e = torch.arange(num_experts).repeat_interleave(order.counts_E).unsqueeze(1)
    y = unpermute((e + 1) * permute(x, order) + e, order, choose_weights(routing.weights_TK, order))
    chosen = routing.experts_TK.unsqueeze(2)
    each = routing.weights_TK.unsqueeze(2) * ((chosen + 1) * x.unsqueeze(1) + chosen)
    torch.testing.assert_close(y, each.sum(dim=1))


def test_the_whole_layer_without_a_token_has_zero_gradients() -> None:
    router, experts = Router(RouterConfig(4, 2), 8), Experts(ExpertConfig(8, 4), 4)
    x = torch.zeros(0, 8, requires_grad=True)
    y = layer(x, router(x), experts)
    assert y.shape == (0, 8)
    y.sum().backward()
    for weight in (*router.parameters(), *experts.parameters()):
        assert weight.grad is not None
        assert (weight.grad == 0).all()


def test_half_precision_stays_half_precision_outside_the_router() -> None:
    router = Router(RouterConfig(8, 2), 16, dtype=torch.bfloat16)
    experts = Experts(ExpertConfig(16, 8), 8, dtype=torch.bfloat16)
    x = torch.randn(12, 16).bfloat16().requires_grad_()
    for inside in (False, True):
        y = layer(x, router(x), experts, weigh_inside=inside)
        assert y.dtype == torch.bfloat16
        y.sum().backward()
    assert router.weight_ED.grad is not None
    assert router.weight_ED.grad.dtype == torch.bfloat16
