"""Losses have their known values, and shares of any cut of the tokens add up to the whole."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe.config import LossConfig, RouterConfig
from moe.errors import RoutingError
from moe.losses import (
    RunningLoad,
    balance_loss,
    load,
    router_losses,
    sequence_balance_loss,
    z_loss,
)
from moe.router import Router, Routing, route

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 1.0, 2.0, 3.0], [1.0, 1.0, 0.0, 0.5]])
SCOPES = ("micro-batch", "sequence", "global")


def alone(numbers: Tensor) -> Tensor:
    """Sum over one rank."""
    return numbers


def whole(routing: Routing) -> float:
    """Return the balance loss of all tokens on one rank."""
    counts = load(routing)
    top_k = routing.experts_TK.shape[1]
    return float(balance_loss(routing.probabilities_TE, counts[0, :-1], counts[0, -1], top_k))


def losses(routing: Routing, config: LossConfig, **more: int) -> dict[str, Tensor]:
    running = RunningLoad(routing.probabilities_TE.shape[1]) if config.scope == "global" else None
    return router_losses(routing, config, alone, running=running, **more)


@pytest.mark.parametrize("scope", SCOPES)
def test_even_probabilities_cost_exactly_one(scope: str) -> None:
    routing = route(torch.zeros(32, 32), RouterConfig(32, 8))
    assert losses(routing, LossConfig(1.0, scope), sequences=4)["balance"] == 1.0


@pytest.mark.parametrize(("top_k", "cost"), [(1, 8.0), (2, 4.0)])
def test_all_tokens_on_the_same_experts_cost_e_over_k(top_k: int, cost: float) -> None:
    logits = torch.full((16, 8), -50.0)
    logits[:, :top_k] = 50.0
    assert whole(route(logits, RouterConfig(8, top_k))) == pytest.approx(cost, rel=1e-6)


def test_known_logits_have_their_known_losses() -> None:
    routing = route(LOGITS, RouterConfig(4, 2))
    assert whole(routing) == pytest.approx(1.0383116, abs=1e-6)
    assert float(z_loss(LOGITS, 3)) == pytest.approx(7.3859076, abs=1e-5)


def test_coefficients_are_factors_and_zero_leaves_a_loss_out() -> None:
    routing = route(LOGITS, RouterConfig(4, 2))
    assert router_losses(routing, LossConfig(), alone) == {}
    both = router_losses(routing, LossConfig(0.1, z=0.01), alone)
    assert float(both["balance"]) == pytest.approx(0.10383116, abs=1e-7)
    assert float(both["z"]) == pytest.approx(0.073859076, abs=1e-7)
    assert set(router_losses(routing, LossConfig(z=0.01), alone)) == {"z"}


def test_a_sequence_on_its_own_costs_bitwise_the_same_in_every_scope() -> None:
    routing = route(torch.randn(24, 8), RouterConfig(8, 2))
    values = [losses(routing, LossConfig(0.3, scope))["balance"] for scope in SCOPES]
    assert values[0] == values[1] == values[2]


def test_the_loss_of_sequences_is_the_mean_of_their_losses() -> None:
    routing = route(torch.randn(32, 8), RouterConfig(8, 2))
    counts = load(routing, 4)
    together = sequence_balance_loss(
        routing.probabilities_TE, counts[:, :-1], counts[:, -1], top_k=2
    )
    each = [whole(route(part, RouterConfig(8, 2))) for part in routing.logits_TE.chunk(4)]
    assert float(together) == pytest.approx(sum(each) / 4, rel=1e-6)


CUTS = [(dp, pieces) for dp, pieces in product((1, 2, 4), (1, 2, 4, 8)) if dp * pieces <= 8]
"""Data-parallel replicas, and ranks over which each of their sequences is spread."""


@pytest.mark.parametrize(("dp", "pieces"), CUTS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("padded", [False, True])
def test_shares_of_any_mapping_add_up_to_the_loss_on_one_rank(
    dp: int, pieces: int, scope: str, padded: bool
) -> None:
    sequences, length, hidden = 8, 8, 16
    router, config = Router(RouterConfig(8, 2), hidden), LossConfig(0.1, scope, z=0.01)
    x = torch.randn(sequences, length, hidden)
    # as much padding in every replica, since a mean over replicas weighs them alike
    valid = (torch.arange(length) < 5).expand(sequences, length) if padded else None
    one, gradient = _on_one_rank(router, config, x, valid, dp if scope == "micro-batch" else 1)
    router.zero_grad()
    total: dict[str, Tensor] = {"balance": torch.zeros(()), "z": torch.zeros(())}
    tokens = x.clone().requires_grad_()
    ranks = _routings(router, tokens, valid, dp, pieces)
    for replica in ranks:
        for routing in replica:
            wide = scope == "global"
            over = [r for rep in ranks for r in rep] if wide else replica
            local = sequences // dp if scope == "sequence" else 1
            shares = router_losses(
                routing,
                config,
                _sum_over(over, local),
                sequences=sequences // dp,
                parts=1 if wide else dp,
                running=RunningLoad(8) if wide else None,
            )
            total = {name: total[name] + share for name, share in shares.items()}
    for name, value in one.items():
        torch.testing.assert_close(total[name], value, rtol=1e-5, atol=1e-7)
    sum(total.values(), torch.zeros(())).backward()
    torch.testing.assert_close(router.weight_ED.grad, gradient, rtol=1e-5, atol=1e-7)


def _on_one_rank(
    router: Router, config: LossConfig, x: Tensor, valid: Tensor | None, parts: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the mean of the losses of `parts` batches on one rank, and its gradient."""
    found: dict[str, Tensor] = {}
    for part, batch in enumerate(x.chunk(parts)):
        mask = None if valid is None else valid.chunk(parts)[part].flatten()
        routing = router(batch.flatten(0, 1), mask)
        for name, value in losses(routing, config, sequences=batch.shape[0]).items():
            found[name] = found.get(name, torch.zeros(())) + value / parts
    sum(found.values(), torch.zeros(())).backward()
    assert router.weight_ED.grad is not None
    return {name: value.detach() for name, value in found.items()}, router.weight_ED.grad.clone()


def _routings(
    router: Router, x: Tensor, valid: Tensor | None, dp: int, pieces: int
) -> list[list[Routing]]:
    ranks: list[list[Routing]] = []
    for replica in range(dp):
        ranks.append([])
        for piece in range(pieces):
            mine = x.chunk(dp)[replica].chunk(pieces, dim=1)[piece].flatten(0, 1)
            mask = None
            if valid is not None:
                mask = valid.chunk(dp)[replica].chunk(pieces, dim=1)[piece].flatten()
            ranks[-1].append(router(mine, mask))
    return ranks


def _sum_over(routings: list[Routing], sequences: int) -> Callable[[Tensor], Tensor]:
    def reduce(mine: Tensor) -> Tensor:
        every = [load(routing, sequences) for routing in routings]
        assert any(torch.equal(mine, one) for one in every)
        return torch.stack(every).sum(dim=0)

    return reduce


def test_micro_batching_does_not_change_the_strength() -> None:
    router, x = Router(RouterConfig(8, 2), 16), torch.randn(8, 4, 16)
    config = LossConfig(0.1, "sequence", z=0.01)
    whole_batch, gradient = _on_one_rank(router, config, x, None, parts=1)
    router.zero_grad()
    in_four, accumulated = _on_one_rank(router, config, x, None, parts=4)
    for name, value in whole_batch.items():
        torch.testing.assert_close(in_four[name], value)
    torch.testing.assert_close(accumulated, gradient)


def test_padding_changes_neither_a_loss_nor_a_gradient() -> None:
    router, x = Router(RouterConfig(8, 2), 16), torch.randn(32, 16)
    config = LossConfig(0.1, z=0.01)
    seen = []
    for tokens, valid in (
        (x[:16], None),
        (x, torch.arange(32) < 16),
    ):
        router.zero_grad()
        found = router_losses(router(tokens, valid), config, alone)
        (found["balance"] + found["z"]).backward()
        assert router.weight_ED.grad is not None
        seen.append((found["balance"], found["z"], router.weight_ED.grad.clone()))
    for plain, padded in zip(*seen, strict=True):
        assert torch.equal(plain, padded)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_rank_without_a_real_token_has_no_loss(scope: str) -> None:
    router = Router(RouterConfig(4, 2), 8)
    for tokens, valid in ((torch.zeros(0, 8), None), (torch.randn(4, 8), torch.zeros(4) > 0)):
        router.zero_grad()
        found = losses(router(tokens, valid), LossConfig(0.1, scope, z=0.1))
        (found["balance"] + found["z"]).backward()
        assert found["balance"] == found["z"] == 0
        assert (router.weight_ED.grad == 0).all()


def test_the_global_load_covers_all_passes_of_a_step() -> None:
    router, running = Router(RouterConfig(8, 2), 16), RunningLoad(8)
    world, tokens, config = 4, 6, LossConfig(0.1, "global")
    for _ in range(2):
        seen = torch.zeros(8)
        for step in range(1, 4):
            routing = router(torch.randn(tokens, 16))
            seen += load(routing)[0, :-1] * world
            share = router_losses(routing, config, lambda n: n * world, running=running)["balance"]
            mean = seen / seen.sum() * 8
            wanted = 0.1 * (mean * routing.probabilities_TE.sum(0)).sum() / (tokens * world)
            torch.testing.assert_close(share, wanted)
            share.backward()
            assert int(running.total_1E[0, :-1].sum()) == tokens * world * 2 * step
            assert int(running.total_1E[0, -1]) == tokens * world * step
        running.reset()
        assert int(running.total_1E.sum()) == 0


def test_the_global_load_counts_a_repeated_pass_once_and_an_evaluation_never() -> None:
    router, running, x = Router(RouterConfig(8, 2), 16), RunningLoad(8), torch.randn(6, 16)
    config = LossConfig(0.1, "global")

    def forward(tokens: Tensor) -> Tensor:
        return router_losses(router(tokens), config, alone, running=running)["balance"]

    gradients = []
    for repeated in (False, True):
        running.reset()
        for _ in range(2):
            router.zero_grad()
            loss = checkpoint(forward, x, use_reentrant=False) if repeated else forward(x)
            assert isinstance(loss, Tensor)
            loss.backward()
        assert int(running.total_1E[0, -1]) == 12
        assert router.weight_ED.grad is not None
        gradients.append(router.weight_ED.grad.clone())
    assert torch.equal(*gradients)
    with torch.no_grad():
        forward(x)
    assert int(running.total_1E[0, -1]) == 12


@pytest.mark.parametrize("scope", SCOPES)
def test_a_running_load_is_needed_by_the_global_scope_alone(scope: str) -> None:
    routing = route(LOGITS, RouterConfig(4, 2))
    running = None if scope == "global" else RunningLoad(4)
    with pytest.raises(RoutingError, match="running"):
        router_losses(routing, LossConfig(0.1, scope), alone, running=running)


def test_tokens_that_do_not_divide_into_sequences_are_refused() -> None:
    with pytest.raises(RoutingError, match="3 tokens do not divide into 2"):
        load(route(LOGITS, RouterConfig(4, 2)), 2)
