"""Tied rows choose whole groups; other patterns, and decisions in half precision, do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from moe.config import Activation, RouterConfig
from moe.router import Router, route
from moe.upcycling.config import UpcycleConfig
from moe.upcycling.methods import generator
from moe.upcycling.routers import centroids, first_rows, split_groups, tied
from moe.upcycling.scaling import Factors, factors

HIDDEN, INNER, SHARDS, REPLICAS, TOKENS = 32, 64, 4, 4, 512
EXPERTS = SHARDS * REPLICAS


def _ffn(x: Tensor, w: dict[str, Tensor], kind: Activation, f: Factors) -> Tensor:
    up = x @ (w["up"] * f.up).T
    if kind == "squared_relu":
        inner = up.relu().square()
    else:
        inner = functional.silu(x @ (w["gate"] * f.gate).T) * up
    return inner @ (w["down"] * f.down).T


def _error(rows: Tensor, top_k: int, kind: Activation, f: Factors) -> float:
    """Return the relative error of a mixture of shards, renormalised, against the whole FFN."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, HIDDEN, generator=draw)
    w = {m: torch.randn(INNER, HIDDEN, generator=draw) * 0.2 for m in ("gate", "up")}
    w["down"] = torch.randn(HIDDEN, INNER, generator=draw) * 0.2
    whole = _ffn(x, w, kind, Factors(1, 1, 1))
    r = route(x @ rows.T, RouterConfig(EXPERTS, top_k, renormalise=True))
    width = INNER // SHARDS
    parts = []
    for s in range(SHARDS):
        cut = slice(s * width, (s + 1) * width)
        shard = {"gate": w["gate"][cut], "up": w["up"][cut], "down": w["down"][:, cut]}
        parts.append(_ffn(x, shard, kind, f))
    of_shard = torch.stack(parts)[r.experts_TK % SHARDS, torch.arange(TOKENS)[:, None]]
    mixture = (r.weights_TK[..., None] * of_shard).sum(dim=1)
    return float((mixture - whole).norm() / whole.norm())


def _rows(count: int) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("top_k", [SHARDS, 2 * SHARDS])
@pytest.mark.parametrize("scaling", ["exact", "paper"])
def test_the_cube_root_is_exact_for_squared_relu(top_k: int, scaling: str) -> None:
    f = factors(scaling, SHARDS, "squared_relu")
    assert _error(tied(_rows(REPLICAS), SHARDS), top_k, "squared_relu", f) < 1e-5


def test_the_square_root_on_up_and_down_is_exact_for_swiglu() -> None:
    rows = tied(_rows(REPLICAS), SHARDS)
    assert _error(rows, SHARDS, "swiglu", factors("exact", SHARDS)) < 1e-5
    assert _error(rows, SHARDS, "swiglu", factors("down", SHARDS)) < 1e-5
    assert _error(rows, SHARDS, "swiglu", factors("paper", SHARDS)) > 0.02


def test_rows_that_are_not_tied_lose_the_function() -> None:
    assert _error(_rows(EXPERTS), SHARDS, "swiglu", factors("exact", SHARDS)) > 0.3


def test_rows_tied_per_shard_instead_of_per_replica_lose_the_function() -> None:
    rows = _rows(SHARDS).repeat(REPLICAS, 1)
    assert _error(rows, SHARDS, "swiglu", factors("exact", SHARDS)) > 0.5


@pytest.mark.parametrize("top_k", [SHARDS, 2 * SHARDS])
def test_each_token_gets_each_shard_equally_often(top_k: int) -> None:
    x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(3))
    config = RouterConfig(EXPERTS, top_k, renormalise=True)
    chosen = route(x @ tied(_rows(REPLICAS), SHARDS).T, config).experts_TK
    assert split_groups(chosen, SHARDS) == 0


def test_ties_in_bfloat16_never_split_a_group_where_logits_are_float32() -> None:
    rows = _rows(REPLICAS).bfloat16()
    rows[2] = rows[1]  # two replicas that always tie
    rows[3] = rows[1]
    rows[3, 0] += 2**-7  # and one whose logits collide with theirs only in bfloat16
    x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(4)).bfloat16()
    top_k = 2 * SHARDS
    router = Router(RouterConfig(EXPERTS, top_k), HIDDEN, dtype=torch.bfloat16)
    router.load_state_dict({"weight_ED": tied(rows, SHARDS)})
    assert split_groups(router(x).experts_TK, SHARDS) == 0
    in_half = (x @ tied(rows, SHARDS).T).topk(top_k).indices
    assert split_groups(in_half, SHARDS) > 0


@pytest.mark.parametrize("init", ["normal", "uniform"])
def test_drawn_rows_have_the_asked_deviation_and_follow_seed_and_layer(init: str) -> None:
    config = UpcycleConfig(64, 2, router_init=init, router_std=0.05, seed=3)
    rows = first_rows(config, 256, 0, None)
    assert rows.std().item() == pytest.approx(0.05, rel=0.03)
    assert abs(rows.mean().item()) < 0.002
    assert torch.equal(rows, first_rows(config, 256, 0, None))
    assert not torch.equal(rows, first_rows(config, 256, 1, None))


def test_centroids_find_the_directions_of_the_inputs() -> None:
    draw = generator(0, "test")
    directions = torch.eye(8)[:3]
    x = directions.repeat(50, 1) * 5 + torch.randn(150, 8, generator=draw) * 0.1
    found = centroids(x, 3, draw)
    assert found.norm(dim=1).tolist() == pytest.approx([1.0] * 3, abs=1e-5)
    # k-means may start with two of one kind, yet every centroid lies among the inputs
    assert (found @ directions.T).amax(dim=1).min() > 0.6
