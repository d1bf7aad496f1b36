"""Mixtral's and Qwen2-MoE's blocks, as `transformers` has them, compute what ours do."""

from __future__ import annotations

import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe.config import ExpertConfig, RouterConfig
from moe.experts import Experts, SharedExpert
from moe.losses import balance_loss, load
from moe.router import Router, route
from tests.moe.single import whole_layer

HIDDEN, INNER, SHARED, EXPERTS = 32, 24, 40, 8


def _import(name: str) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs to fix
        return pytest.importorskip(f"transformers.models.{name}", exc_type=ImportError)


def _block(kind: str, top_k: int, normalised: bool = True) -> nn.Module:
    """Return a sparse block of `transformers` with random weights."""
    common: dict[str, Any] = {"hidden_size": HIDDEN, "num_experts_per_tok": top_k}
    if kind == "mixtral":
        mixtral = _import("mixtral.modeling_mixtral")
        config = mixtral.MixtralConfig(intermediate_size=INNER, num_local_experts=EXPERTS, **common)
        config._experts_implementation = "eager"
        block: nn.Module = mixtral.MixtralSparseMoeBlock(config)
    else:
        qwen = _import("qwen2_moe.modeling_qwen2_moe")
        config = qwen.Qwen2MoeConfig(
            moe_intermediate_size=INNER,
            shared_expert_intermediate_size=SHARED,
            num_experts=EXPERTS,
            norm_topk_prob=normalised,
            **common,
        )
        config._experts_implementation = "eager"
        block = qwen.Qwen2MoeSparseMoeBlock(config)
    for weight in block.parameters():
        nn.init.normal_(weight, std=0.2)
    return block


def _ours(block: Any, kind: str, top_k: int, normalised: bool) -> dict[str, nn.Module]:
    """Return our modules with the block's weights."""
    shared = SHARED if kind == "qwen2" else 0
    config = ExpertConfig(HIDDEN, INNER, shared=shared, shared_gate=shared > 0)
    made: dict[str, nn.Module] = {
        "router": Router(RouterConfig(EXPERTS, top_k, renormalise=normalised), HIDDEN),
        "experts": Experts(config, EXPERTS),
    }
    if shared:
        made["shared"] = SharedExpert(config)
    with torch.no_grad():
        for (name, ours), (_, theirs) in zip(
            _flat(made), _as_ours(block, lambda w: w.detach()), strict=True
        ):
            assert ours.shape == theirs.shape, name
            ours.copy_(theirs)
    return made


def _flat(made: dict[str, nn.Module]) -> list[tuple[str, Tensor]]:
    return [(f"{m}.{n}", p) for m in made for n, p in made[m].named_parameters()]


def _as_ours(block: Any, pick: Any) -> list[tuple[str, Tensor]]:
    """Return the block's weights, or their gradients, in the form and order of ours."""
    found = [
        ("router", pick(block.gate.weight)),
        ("in", pick(block.experts.gate_up_proj).transpose(1, 2)),
        ("out", pick(block.experts.down_proj).transpose(1, 2)),
    ]
    if hasattr(block, "shared_expert"):
        mlp = block.shared_expert
        both = torch.cat([pick(mlp.gate_proj.weight), pick(mlp.up_proj.weight)])
        found += [("shared in", both.T), ("shared out", pick(mlp.down_proj.weight).T)]
        found.append(("shared gate", pick(block.shared_expert_gate.weight).squeeze(0)))
    return found


CASES = [
    ("mixtral", 2, True),
    ("mixtral", 3, True),
    ("qwen2", 2, True),
    ("qwen2", 4, False),
    ("qwen2", 1, False),
]


@pytest.mark.parametrize(("kind", "top_k", "normalised"), CASES)
def test_output_and_gradients_are_those_of_transformers(
    kind: str, top_k: int, normalised: bool
) -> None:
    block = _block(kind, top_k, normalised)
    ours: Any = _ours(block, kind, top_k, normalised)
    x = torch.randn(2, 19, HIDDEN)
    head = torch.randn(2, 19, HIDDEN)
    theirs_x, ours_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    wanted = block(theirs_x)
    found = whole_layer(ours_x.flatten(0, 1), ours["router"], ours["experts"], ours.get("shared"))
    torch.testing.assert_close(found.view_as(x), wanted, rtol=1e-5, atol=1e-5)
    (wanted * head).sum().backward()
    (found.view_as(x) * head).sum().backward()
    torch.testing.assert_close(ours_x.grad, theirs_x.grad, rtol=1e-5, atol=1e-5)
    found_grads = {name: weight.grad for name, weight in _flat(ours)}
    wanted_grads = [gradient for _, gradient in _as_ours(block, lambda w: w.grad)]
    torch.testing.assert_close(
        found_grads, dict(zip(found_grads, wanted_grads, strict=True)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_their_balance_loss_is_k_times_ours(top_k: int, padded: bool) -> None:
    theirs = _import("mixtral.modeling_mixtral").load_balancing_loss_func
    valid = torch.rand(2, 16) < 0.7 if padded else None
    logits = torch.randn(32, EXPERTS, requires_grad=True)
    mask = None if valid is None else valid.flatten()
    routing = route(logits, RouterConfig(EXPERTS, top_k), valid_T=mask)
    counts = load(routing)[0]
    ours = balance_loss(routing.probabilities_TE, counts[:-1], counts[-1], top_k)
    attention = None if valid is None else valid.long()
    same = theirs((logits,), EXPERTS, top_k, attention)
    torch.testing.assert_close(top_k * ours, same)
    gradients = [torch.autograd.grad(v, logits)[0] for v in (top_k * ours, same)]
    torch.testing.assert_close(*gradients)
