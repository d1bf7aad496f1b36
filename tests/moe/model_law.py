"""The law for whole models: what each rank compares with the one-rank run.

The batch of the world is DP micro-batches. One rank sees them one after another, the loss is the
mean over all labelled tokens, and one AdamW step follows. Every mapping has to give that loss,
every gradient, its norm, and the weights after the step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from moe.config import CapacityConfig, ExpertConfig, LossConfig, MoeConfig, RouterConfig
from moe.experts import shard_experts
from moe.model import Model
from moe.model_config import AttentionConfig, FeedForwardConfig, ModelConfig, RopeConfig
from moe.parallel.context import take_tokens
from moe.parallel.dims import ParallelDims
from moe.parallel.grads import GradientRegistry, grad_norm, reduce_gradients
from moe.parallel.groups import ProcessGroups, build_groups
from moe.places import Places
from moe.vocabulary import UNLABELLED

__all__ = ["CASES", "violations"]

VOCABULARY, HIDDEN, ROWS, TOKENS = 24, 16, 2, 8
RTOL = 1e-5
SEED = 5


@dataclass(frozen=True)
class Case:
    """One model and one kind of batch."""

    config: ModelConfig
    packed: bool = False


ATTENTION = AttentionConfig(4, 4, head_dim=4)
ROPE = RopeConfig(500.0, "llama3", 4.0, original_positions=8)
FULL = AttentionConfig(8, 4, 4, ROPE, qkv_bias=True, qk_norm=True, window=3, window_from=1)
DROPPING = MoeConfig(
    RouterConfig(4, 2),
    ExpertConfig(HIDDEN, 8),
    capacity=CapacityConfig(0.7, "full-sequence", "position"),
)
MIXTURE = MoeConfig(
    RouterConfig(4, 2, renormalise=True),
    ExpertConfig(HIDDEN, 8, shared=8, shared_gate=True),
    LossConfig(balance=0.3, z=0.1),
)

CASES = {
    "dense": Case(
        ModelConfig(VOCABULARY, HIDDEN, 2, ATTENTION, FeedForwardConfig(inner=24), tied=True)
    ),
    "mixture": Case(
        ModelConfig(VOCABULARY, HIDDEN, 2, FULL, FeedForwardConfig(12, MIXTURE, (1,))), packed=True
    ),
    "dropping": Case(
        ModelConfig(VOCABULARY, HIDDEN, 2, ATTENTION, FeedForwardConfig(12, DROPPING)), packed=True
    ),
}


@cache
def _batch(name: str, replica: int) -> tuple[Tensor, Places, Tensor]:
    """Return tokens, where they stand, and labels of one micro-batch."""
    generator = torch.Generator().manual_seed(100 + replica)
    ids = torch.randint(VOCABULARY, (ROWS, TOKENS + 1), generator=generator)
    labels = ids[:, 1:].clone()
    labels[0, replica : 2 * replica + 2] = UNLABELLED
    ids = ids[:, :-1].contiguous()
    if not CASES[name].packed:
        return ids, Places.whole(ROWS, TOKENS), labels
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 1, 2, 2, 2, 2, 2]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 0, 0, 1, 2, 3, 4]])
    valid = torch.tensor([[True] * TOKENS, [True] * 6 + [False] * 2])
    labels = labels.masked_fill(~valid, UNLABELLED)
    return ids, Places(positions, documents, valid), labels


def _part(name: str, groups: ProcessGroups) -> tuple[Tensor, Places, Tensor]:
    """Return what this rank gets of its micro-batch."""
    replica, cp = groups.dims.coordinates(groups.rank)["dp"], groups["cp"]
    ids, places, labels = _batch(name, replica)
    if cp.size == 1:
        return ids, places, labels
    told = (places.positions_BS, places.documents_BS, places.valid_BS)
    taken = [None if x is None else take_tokens(x, cp.index, cp.size) for x in told]
    assert taken[0] is not None
    own = Places(taken[0], *taken[1:])
    return take_tokens(ids, cp.index, cp.size), own, take_tokens(labels, cp.index, cp.size)


def _labelled(name: str, dp: int) -> int:
    return sum(int((_batch(name, replica)[2] != UNLABELLED).sum()) for replica in range(dp))


@dataclass(frozen=True)
class Expected:
    """What one rank computes."""

    logits: list[Tensor]
    losses: list[Tensor]
    shares: dict[str, Tensor]
    gradients: dict[str, Tensor]
    norm: Tensor
    stepped: dict[str, Tensor]


@cache
def _expected(name: str, dp: int) -> Expected:
    model = Model(CASES[name].config, seed=SEED)
    outs = [model(*_batch(name, replica)) for replica in range(dp)]
    with torch.no_grad():
        logits = [model(*_batch(name, replica)[:2]).logits for replica in range(dp)]
    losses = [out.token_losses_BS.sum() * dp / _labelled(name, dp) for out in outs]
    totals = [model.total_loss(loss, out.stage) for loss, out in zip(losses, outs, strict=True)]
    torch.stack(totals).mean().backward()
    gradients = {n: _gradient(p).clone() for n, p in model.named_parameters()}
    norm = torch.stack([g.double().square().sum() for g in gradients.values()]).sum().sqrt()
    _step(model)
    stepped = {n: p.detach() for n, p in model.named_parameters()}
    kinds = outs[0].stage.losses
    shares = {k: torch.stack([o.stage.losses[k] for o in outs]).mean().detach() for k in kinds}
    losses = [o.token_losses_BS.detach() for o in outs]
    return Expected(logits, losses, shares, gradients, norm, stepped)


def _step(model: nn.Module) -> None:
    # an epsilon that gradients which are zero but for rounding do not outgrow
    torch.optim.AdamW(model.parameters(), lr=0.1, eps=1e-2).step()


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def violations(dims: ParallelDims, names: tuple[str, ...]) -> list[str]:
    """Return what differs from the one-rank run on this rank, under one mapping."""
    groups = build_groups(dims)
    try:
        return [
            f"{dims} {name}: {what} is off by {off:.1e}"
            for name in names
            for what, actual, expected in _pairs(groups, name)
            if (off := _difference(actual, expected)) > RTOL
        ]
    finally:
        groups.close()


def _pairs(groups: ProcessGroups, name: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    dims, case = groups.dims, CASES[name]
    expected, replica = _expected(name, dims.dp), dims.coordinates(groups.rank)["dp"]
    model = Model(case.config, groups, seed=SEED)
    ids, places, labels = _part(name, groups)
    cp = groups["cp"]
    with torch.no_grad():
        whole = expected.logits[replica]
        yield "logits", model(ids, places).logits, take_tokens(whole, cp.index, cp.size)
    out = model(ids, places, labels)
    whole = expected.losses[replica]
    yield "losses", out.token_losses_BS, take_tokens(whole, cp.index, cp.size)
    loss = out.token_losses_BS.sum() * dims.dp * dims.cp / _labelled(name, dims.dp)
    for kind, share in out.stage.losses.items():
        yield kind, _summed(share, groups), expected.shares[kind]
    model.total_loss(loss, out.stage).backward()
    registry = GradientRegistry.of(model.named_parameters(), model.families())
    reduce_gradients(registry, groups)
    for own, parameter in model.named_parameters():
        yield f"gradient of {own}", _gradient(parameter), _cut(model, own, expected.gradients[own])
    yield "norm", grad_norm(registry, groups), expected.norm
    _step(model)
    for own, parameter in model.named_parameters():
        yield f"{own} after a step", parameter, _cut(model, own, expected.stepped[own])


def _summed(tensor: Tensor, groups: ProcessGroups) -> Tensor:
    total = tensor.detach().clone()
    torch.distributed.all_reduce(total, group=groups["world"].handle)
    return total


def _cut(model: Model, name: str, full: Tensor) -> Tensor:
    """Return this rank's part of a tensor of the one-rank model."""
    groups, cuts = model.groups, model.cuts()
    if name in cuts:
        cut, tp = cuts[name], groups["tp"]
        return full if cut is None else full.chunk(tp.size, dim=cut)[tp.index]
    layer, _, own = name.partition(".feed_forward.")
    if not own.startswith("experts."):
        return full
    experts = model.mixtures()[f"{layer}.feed_forward"].experts
    local, etp = experts.w_in_LDG.shape[0], groups["etp"]
    mine = range(groups["ep"].index * local, (groups["ep"].index + 1) * local)
    own = own.removeprefix("experts.")
    return shard_experts(full, own, experts.config, mine, etp.size, etp.index)


def _difference(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape, f"{actual.shape} for {expected.shape}"
    largest = expected.abs().max().double().clamp_min(1e-12)
    difference = (actual.detach().double() - expected.double()).abs().max() / largest
    return float(difference.nan_to_num(float("inf")))
