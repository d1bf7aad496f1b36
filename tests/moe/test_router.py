"""Choices and weights follow their equations; loads are counted once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe.config import RouterConfig
from moe.errors import RoutingError
from moe.router import Router, moved_bias, route, tokens_per_expert

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 1.0, 2.0, 3.0], [1.0, 1.0, 0.0, 0.5]])


def definition(
    row: Tensor, config: RouterConfig, bias: Tensor | None
) -> tuple[list[int], list[float]]:
    """Route one token with Python's own sort."""
    scores = row.sigmoid() if config.score == "sigmoid" else row.softmax(0)
    ranked = (scores if bias is None else scores + bias).tolist()
    allowed = set(range(config.num_experts))
    if config.groups is not None:
        count, kept = config.groups
        size, each = config.num_experts // count, max(1, config.top_k // kept)
        members = [list(range(g * size, (g + 1) * size)) for g in range(count)]
        worth = [sum(sorted((ranked[e] for e in m), reverse=True)[:each]) for m in members]
        best = sorted(range(count), key=lambda g: -worth[g])[:kept]
        allowed = {e for g in best for e in members[g]}
    keys = row.tolist() if bias is None else ranked
    chosen = sorted(allowed, key=lambda e: -keys[e])[: config.top_k]
    weights = row[chosen].softmax(0) if config.score == "topk-softmax" else scores[chosen]
    if config.renormalise:
        weights = weights / weights.sum()
    return chosen, (weights * config.scale).tolist()


@st.composite
def settings(draw: st.DrawFn) -> RouterConfig:
    count, size = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    kept = draw(st.integers(1, count))
    top_k = draw(st.integers(min(2, kept * size), kept * size))
    score = draw(st.sampled_from(["softmax-topk", "topk-softmax", "sigmoid"]))
    renormalise = score != "topk-softmax" and top_k > 1 and draw(st.booleans())
    if top_k == 1 < count * size:
        score = "sigmoid"
    groups = (count, kept) if draw(st.booleans()) else None
    scale = draw(st.sampled_from([1.0, 2.5]))
    return RouterConfig(count * size, top_k, score, renormalise, groups, scale)


@given(settings(), st.integers(0, 10**6), st.booleans())
def test_every_token_goes_where_the_equations_send_it(
    config: RouterConfig, seed: int, ties: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, config.num_experts, generator=generator)
    bias: Tensor | None = torch.randn(config.num_experts, generator=generator) * 0.3
    if ties:
        logits, bias = logits if config.groups else logits.round(), None
    routing = route(logits, config, bias)
    for t, row in enumerate(logits):
        chosen, weights = definition(row, config, bias)
        assert routing.experts_TK[t].tolist() == chosen
        torch.testing.assert_close(routing.weights_TK[t], torch.tensor(weights))
    assert bool(routing.kept_TK.all())
    torch.testing.assert_close(routing.probabilities_TE.sum(dim=1), torch.ones(5))


def test_softmax_of_the_best_equals_the_best_of_softmax_renormalised() -> None:
    logits = torch.randn(64, 16)
    after = route(logits, RouterConfig(16, 4, "topk-softmax"))
    before = route(logits, RouterConfig(16, 4, "softmax-topk", renormalise=True))
    assert torch.equal(after.experts_TK, before.experts_TK)
    torch.testing.assert_close(after.weights_TK, before.weights_TK)


@pytest.mark.parametrize("score", ["softmax-topk", "topk-softmax", "sigmoid"])
def test_the_bias_changes_the_choice_and_never_a_weight(score: str) -> None:
    config = RouterConfig(4, 2, score)
    bias = torch.tensor([-10.0, -10.0, 10.0, 10.0], requires_grad=True)
    routing = route(LOGITS, config, bias)
    assert routing.experts_TK.sort(dim=1).values.tolist() == [[2, 3]] * 3
    scores = LOGITS.sigmoid() if score == "sigmoid" else LOGITS.softmax(1)
    wanted = scores.gather(1, routing.experts_TK)
    if score == "topk-softmax":
        wanted = LOGITS.gather(1, routing.experts_TK).softmax(1)
    torch.testing.assert_close(routing.weights_TK, wanted)
    assert not routing.weights_TK.requires_grad


def test_ties_go_to_the_lower_expert() -> None:
    routing = route(torch.zeros(3, 40), RouterConfig(40, 3))
    assert routing.experts_TK.tolist() == [[0, 1, 2]] * 3


def test_a_token_keeps_to_its_best_groups() -> None:
    # the best expert, 0, is alone in its group; groups 1 and 2 are better together
    logits = torch.tensor([[3.0, -9.0, 2.9, 2.8, 2.7, 2.6]])
    routing = route(logits, RouterConfig(6, 4, groups=(3, 2)))
    assert routing.experts_TK.tolist() == [[2, 3, 4, 5]]


@pytest.mark.parametrize("score", ["softmax-topk", "topk-softmax", "sigmoid"])
def test_padding_goes_nowhere_and_gets_no_gradient(score: str) -> None:
    logits = torch.randn(4, 6, requires_grad=True)
    valid = torch.tensor([True, False, True, False])
    routing = route(logits, RouterConfig(6, 2, score), valid_T=valid)
    assert (routing.experts_TK[~valid] == -1).all()
    assert not routing.kept_TK[~valid].any()
    assert (routing.weights_TK[~valid] == 0).all()
    assert (routing.probabilities_TE[~valid] == 0).all()
    (routing.weights_TK.sum() + routing.probabilities_TE.square().sum()).backward()
    assert (logits.grad[~valid] == 0).all()
    assert int(tokens_per_expert(routing).sum()) == 2 * 2


def test_what_padding_holds_reaches_nothing() -> None:
    router = Router(RouterConfig(4, 2), 8)
    x, valid = torch.randn(6, 8), torch.tensor([True] * 4 + [False] * 2)
    dirty = x.clone()
    dirty[4:] = torch.nan
    for tokens in (x, dirty.requires_grad_()):
        router.zero_grad()
        routing = router(tokens, valid)
        routing.weights_TK.square().sum().backward()
        assert torch.isfinite(router.weight_ED.grad).all()
    assert (dirty.grad[4:] == 0).all()


def test_the_router_has_the_parameters_of_a_matrix() -> None:
    router = Router(RouterConfig(4, 2), 12)
    assert [p.numel() for p in router.parameters()] == [48]


@pytest.mark.parametrize(
    ("tokens", "weights"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_logits_and_weights_are_of_full_precision(
    tokens: torch.dtype, weights: torch.dtype
) -> None:
    router = Router(RouterConfig(4, 2, expert_bias=True), 12, dtype=tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(torch.randn(5, 12).to(tokens))
    assert routing.logits_TE.dtype == routing.weights_TK.dtype == weights
    assert routing.probabilities_TE.dtype == weights


def test_half_precision_tokens_are_routed_as_their_values_are_in_float32() -> None:
    router, x = Router(RouterConfig(8, 2), 16), torch.randn(32, 16).bfloat16()
    half, full = router(x), router(x.float())
    assert torch.equal(half.logits_TE, full.logits_TE)
    assert torch.equal(half.experts_TK, full.experts_TK)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    router, x = Router(RouterConfig(4, 2), 8), torch.randn(5, 8)
    x[3, 2] = bad
    with pytest.raises(RoutingError, match=r"not finite for 1 of 5 tokens.*token 3"):
        router(x)


def test_shapes_that_do_not_fit_are_refused() -> None:
    config = RouterConfig(4, 2)
    with pytest.raises(RoutingError, match=r"\(3, 5\); needed is \(tokens, 4\)"):
        route(torch.zeros(3, 5), config)
    with pytest.raises(RoutingError, match="bias"):
        route(torch.zeros(3, 4), config, torch.zeros(3))
    with pytest.raises(RoutingError, match="mask"):
        route(torch.zeros(3, 4), config, valid_T=torch.ones(3))


def test_no_tokens_are_routed_nowhere() -> None:
    router = Router(RouterConfig(4, 2, groups=(2, 1)), 8)
    routing = router(torch.zeros(0, 8))
    assert routing.experts_TK.shape == (0, 2)
    routing.weights_TK.sum().backward()
    assert (router.weight_ED.grad == 0).all()


def test_jitter_follows_the_seed_and_is_gone_in_evaluation() -> None:
    router, x = Router(RouterConfig(8, 2, jitter=0.5), 16), torch.randn(32, 16)
    seen = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        seen.append(router(x).logits_TE)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    router.eval()
    assert torch.equal(router(x).logits_TE, x @ router.weight_ED.T)


def test_jitter_is_the_same_when_a_checkpoint_repeats_the_pass() -> None:
    router, x = Router(RouterConfig(8, 2, jitter=0.5), 16), torch.randn(32, 16)
    seen: list[Tensor] = []

    def forward(tokens: Tensor) -> Tensor:
        routing = router(tokens)
        seen.append(routing.experts_TK)
        return routing.weights_TK.square().sum()

    loss = checkpoint(forward, x, use_reentrant=False)
    assert isinstance(loss, Tensor)
    loss.backward()
    assert len(seen) == 2
    assert torch.equal(seen[0], seen[1])


def test_the_load_moves_the_bias_towards_the_mean() -> None:
    bias = moved_bias(torch.tensor([0.5, 0.0, 0.0]), torch.tensor([6, 3, 0]), 0.1)
    torch.testing.assert_close(bias, torch.tensor([0.4, 0.0, 0.1]))


def _passes(router: Router, x: Tensor) -> Iterator[tuple[str, int]]:
    """Run every kind of pass; yield its name and how often its tokens are to be counted."""
    with torch.no_grad():
        router(x)
    yield "no_grad", 0
    router(x)
    yield "no backward", 0
    router.eval()
    router(x).weights_TK.sum().backward()
    router.train()
    yield "eval", 0
    router(x).weights_TK.sum().backward()
    yield "plain", 1
    for reentrant in (True, False):
        tokens = x.clone().requires_grad_()
        loss = checkpoint(
            lambda t: router(t).weights_TK.square().sum(), tokens, use_reentrant=reentrant
        )
        assert isinstance(loss, Tensor)
        loss.backward()
        yield f"reentrant={reentrant}", 1


def test_loads_are_counted_once_a_training_pass_and_never_else() -> None:
    router, x = Router(RouterConfig(4, 2, expert_bias=True), 8), torch.randn(6, 8)
    assert router.counts_E is not None
    for name, times in _passes(router, x):
        assert int(router.counts_E.sum()) == times * 6 * 2, name
        router.counts_E.zero_()


def test_the_bias_counts_no_padding_and_all_ranks() -> None:
    router, x = Router(RouterConfig(4, 2, expert_bias=True), 8), torch.randn(6, 8)
    valid = torch.tensor([True] * 4 + [False] * 2)
    routing = router(x, valid)
    routing.weights_TK.sum().backward()
    counts, others = tokens_per_expert(routing), torch.tensor([50, 0, 0, 50])
    assert router.counts_E is not None
    assert torch.equal(router.counts_E, counts)
    router.update_bias(0.25, reduce=lambda n: n + others)
    assert router.bias_E is not None
    assert torch.equal(router.bias_E, moved_bias(torch.zeros(4), counts + others, 0.25))
    assert router.bias_E.tolist() == [-0.25, 0.25, 0.25, -0.25]
    assert int(router.counts_E.sum()) == 0
    assert set(router.state_dict()) == {"weight_ED", "bias_E"}


def test_the_bias_brings_an_uneven_load_to_even() -> None:
    router = Router(RouterConfig(4, 1, "sigmoid", expert_bias=True), 8)
    x = torch.randn(256, 8) + 2 * router.weight_ED[0].detach()  # all like expert 0
    first = tokens_per_expert(router(x))
    for _ in range(200):
        router(x).weights_TK.sum().backward()
        router.update_bias(0.005)
    last = tokens_per_expert(router(x))
    assert int(first.max()) > 150
    assert int(last.max()) < 90


def test_a_router_without_a_bias_cannot_move_it() -> None:
    with pytest.raises(RoutingError, match=r"RouterConfig\.expert_bias"):
        Router(RouterConfig(4, 2), 8).update_bias(0.1)


def test_the_expert_bias_stays_exact_when_the_module_is_cast() -> None:
    router = Router(RouterConfig(4, 2, score="sigmoid", expert_bias=True), 8)
    assert router.bias_E is not None
    router.bias_E.copy_(torch.tensor([1.0, 1.001, 1.002, 1.003]))
    before = router.bias_E.clone()
    router.bfloat16()
    assert router.weight_ED.dtype is torch.bfloat16
    torch.testing.assert_close(router.bias_E, before, rtol=0, atol=0)
    assert "bias_E" in router.state_dict()
    assert router.double().bias_E.dtype is torch.float64
