"""The layer on one rank and on several: zero tokens, bad input, repetition, first weights."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moe
from moe.config import (
    CapacityConfig,
    ConfigError,
    ExpertConfig,
    LossConfig,
    MoeConfig,
    RouterConfig,
)
from moe.errors import CollectiveError, LayoutError, MoeError, RoutingError
from moe.experts import shard_experts
from moe.layer import Execution, MoeLayer
from moe.parallel.dims import ParallelDims
from moe.parallel.grads import Family, GradientRegistry, reduce_gradients
from moe.parallel.groups import build_groups
from tests.helpers.worlds import World

EXPERTS, HIDDEN = 8, 8
CONFIG = MoeConfig(
    RouterConfig(EXPERTS, 2, renormalise=True),
    ExpertConfig(HIDDEN, 16, shared=8, shared_gate=True),
    LossConfig(balance=0.3, z=0.1),
)
NO_TOKENS = MoeConfig(CONFIG.router, ExpertConfig(HIDDEN, 16), CONFIG.losses)
DIMS = ParallelDims(4, tp=2, ep=4)
SHARED = ParallelDims(4, ep=2, etp=2)

EXECUTIONS = {
    "halves": Execution(halves=True),
    "experts again": Execution(recompute="experts"),
    "layer again": Execution(recompute="layer"),
    "halves again": Execution(halves=True, recompute="layer"),
    "alltoall": Execution("alltoall", weights_travel=True),
    "weights stay": Execution("alltoall"),
    "allgather": Execution("allgather"),
}


def _results(layer: MoeLayer, x: Tensor) -> dict[str, Tensor]:
    """Return the output and every gradient."""
    x = x.clone().requires_grad_()
    out = layer(x)
    loss = (out.y * torch.linspace(-1, 1, out.y.numel()).view_as(out.y)).sum()
    layer.total_loss(loss, out).backward()
    return {"y": out.y, "x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}


@pytest.mark.parametrize("name", EXECUTIONS)
def test_how_the_work_is_done_does_not_show(name: str) -> None:
    x = torch.randn(2, 5, HIDDEN)
    expected = _results(MoeLayer(CONFIG, seed=1), x)
    actual = _results(MoeLayer(CONFIG, execution=EXECUTIONS[name], seed=1), x)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def _no_tokens_anywhere(dims: ParallelDims, execution: Execution, capacity: CapacityConfig) -> None:
    groups = build_groups(dims)
    layer = MoeLayer(replace(NO_TOKENS, capacity=capacity), groups, execution, seed=1)
    x = torch.zeros(0, HIDDEN, requires_grad=True)
    out = layer(x)
    assert out.y.shape == (0, HIDDEN)
    layer.total_loss(out.y.sum(), out).backward()
    assert x.grad.shape == x.shape
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert not parameter.grad.any(), name
    assert not sum(out.losses.values())
    assert not out.counts_E.any()
    registry = GradientRegistry.of(layer.named_parameters(), layer.families())
    reduce_gradients(registry, groups)
    groups.close()


NOTHING_CASES = [
    (Execution(), None),
    (Execution(halves=True, recompute="layer", weights_travel=True), None),
    (Execution(recompute="experts"), CapacityConfig(1.0, pad=True)),
    (Execution("allgather"), CapacityConfig(1.0, "full-sequence")),
]


@pytest.mark.dist
@pytest.mark.parametrize(("execution", "capacity"), NOTHING_CASES, ids=["0", "1", "2", "3"])
@pytest.mark.parametrize("dims", [DIMS, SHARED], ids=["tp2-ep4", "ep2-etp2"])
def test_a_layer_without_tokens_gives_zero_gradients_not_none(
    world4: World, dims: ParallelDims, execution: Execution, capacity: CapacityConfig | None
) -> None:
    world4.run(_no_tokens_anywhere, dims, execution, capacity)


def test_one_rank_without_tokens_gives_zero_gradients_too() -> None:
    _no_tokens_anywhere(ParallelDims(), *NOTHING_CASES[0])
    _no_tokens_anywhere(ParallelDims(), *NOTHING_CASES[2])


def _one_bad_rank(kind: str) -> tuple[str, str]:
    groups = build_groups(DIMS)
    layer = MoeLayer(CONFIG, groups, seed=1)
    x, valid = torch.ones(3, HIDDEN), None
    if dist.get_rank() == 2:
        if kind == "NaN":
            x[1, 0] = torch.nan
        elif kind == "width":
            x = torch.ones(3, HIDDEN + 1)
        else:
            valid = torch.ones(4, dtype=torch.bool)
    try:
        layer(x, valid)
    except MoeError as error:
        told = type(error).__name__, str(error)
    else:
        told = "", ""
    assert layer(torch.ones(3, HIDDEN)).y.isfinite().all(), "nobody waits for what was not sent"
    groups.close()
    return told


@pytest.mark.dist
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("NaN", "rank 2: the router's logits are not finite for 1 of 3 tokens"),
        ("width", "rank 2: the tokens have shape (3, 9); needed is (tokens, 8) or"),
        ("mask", "rank 2: the mask has shape (4,); needed is (3,)"),
    ],
)
def test_bad_input_on_one_rank_is_refused_on_all_and_leaves_none_waiting(
    world4: World, kind: str, words: str
) -> None:
    told = world4.run(_one_bad_rank, kind)
    assert len(set(told)) == 1
    assert told[0][0] == "RoutingError"
    assert told[0][1].startswith(words)


def _lose_a_rank(folder: Path) -> None:
    groups = build_groups(ParallelDims(2, ep=2))
    layer = MoeLayer(CONFIG, groups, seed=1)
    layer(torch.ones(3, HIDDEN))
    if groups.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        layer(torch.ones(3, HIDDEN))
    except CollectiveError as error:
        (folder / "told").write_text(str(error))


@pytest.mark.dist
def test_a_rank_that_dies_ends_the_others_waiting(tmp_path: Path) -> None:
    with World(2) as world:
        world.grace_s = world.patience_s
        with pytest.raises(AssertionError, match="rank 1: ended"):
            world.run(_lose_a_rank, tmp_path)
    told = (tmp_path / "told").read_text()
    assert "among ranks [0, 1] failed on rank 0; another rank ended or does not answer" in told


def _refused_layer(num_experts: int, inner: int) -> str:
    groups = build_groups(ParallelDims(4, ep=2, etp=2))
    config = MoeConfig(RouterConfig(num_experts, 2), ExpertConfig(HIDDEN, inner))
    with pytest.raises(LayoutError) as refusal:
        MoeLayer(config, groups)
    groups.close()
    return str(refusal.value)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("num_experts", "inner", "words"),
    [
        (7, 16, "7 experts cannot be shared out evenly over ep=2; nearest legal: 6 or 8 experts"),
        (8, 15, "the experts' inner width of 15 does not divide over etp=2 ranks"),
    ],
)
def test_experts_that_do_not_fit_the_mapping_are_refused_on_every_rank(
    world4: World, num_experts: int, inner: int, words: str
) -> None:
    told = world4.run(_refused_layer, num_experts, inner)
    assert len(set(told)) == 1
    assert told[0].startswith(words)


def test_more_choices_than_experts_are_refused() -> None:
    with pytest.raises(RoutingError, match="top_k=9 is above num_experts=8"):
        MoeConfig(RouterConfig(8, 9), ExpertConfig(HIDDEN, 16))


@pytest.mark.parametrize("wrong", [{"dispatcher": "deepep"}, {"recompute": "attention"}])
def test_unknown_ways_of_working_are_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="choose one of"):
        Execution(**wrong)


def test_halves_are_not_padded_to_the_capacity_of_the_whole() -> None:
    padded = replace(CONFIG, capacity=CapacityConfig(1.0, pad=True))
    with pytest.raises(ConfigError, match="halves"):
        MoeLayer(padded, execution=Execution(halves=True))


def _first_weights_are_slices(dims: ParallelDims) -> None:
    groups = build_groups(dims)
    whole, part = MoeLayer(CONFIG, seed=5), MoeLayer(CONFIG, groups, seed=5)
    local = EXPERTS // dims.ep
    mine = range(groups["ep"].index * local, (groups["ep"].index + 1) * local)
    for name, parameter in part.named_parameters():
        full: Tensor = whole.get_parameter(name)
        if name.startswith("experts."):
            own, etp = name.partition(".")[2], groups["etp"]
            full = shard_experts(full, own, CONFIG.experts, mine, etp.size, etp.index)
        assert parameter.equal(full), name
    groups.close()


@pytest.mark.dist
@pytest.mark.parametrize("dims", [DIMS, SHARED], ids=["tp2-ep4", "ep2-etp2"])
def test_first_weights_are_slices_of_the_same_model(world4: World, dims: ParallelDims) -> None:
    world4.run(_first_weights_are_slices, dims)


def test_first_weights_differ_between_experts_and_seeds_and_have_the_right_size() -> None:
    config = MoeConfig(RouterConfig(4, 2), ExpertConfig(64, 128, shared=32))
    first, same, other = (MoeLayer(config, seed=seed) for seed in (1, 1, 2))
    w = first.experts.w_in_LDG
    assert w.equal(same.experts.w_in_LDG)
    assert not w.equal(other.experts.w_in_LDG)
    assert not w[0].equal(w[1])
    widths = {"w_in_LDG": 64, "w_out_LFD": 128, "weight_ED": 64, "w_in_DG": 64, "w_out_FD": 32}
    for name, parameter in first.named_parameters():
        width = widths[name.rpartition(".")[2]]
        assert float(parameter.detach().std()) == pytest.approx(width**-0.5, rel=0.1), name
    torch.manual_seed(3)
    drawn = MoeLayer(config).router.weight_ED
    torch.manual_seed(3)
    assert MoeLayer(config).router.weight_ED.equal(drawn)


def test_a_repeated_forward_pass_routes_alike_and_counts_once() -> None:
    router = RouterConfig(EXPERTS, 2, score="sigmoid", expert_bias=True, jitter=0.3)
    losses = LossConfig(balance=0.3, scope="global")
    config = MoeConfig(router, ExpertConfig(HIDDEN, 16), losses)
    x = torch.randn(6, HIDDEN)
    found = {}
    for repeated in (False, True):
        torch.manual_seed(7)
        layer = MoeLayer(config, seed=1)

        def run(x: Tensor, layer: MoeLayer = layer) -> tuple[Tensor, Tensor]:
            out = layer(x)
            return out.y, out.losses["balance"]

        inputs = x.clone().requires_grad_()
        y, loss = checkpoint(run, inputs, use_reentrant=False) if repeated else run(inputs)
        (y.square().sum() + loss).backward()
        assert layer.running is not None
        assert int(layer.running.total_1E[0, -1]) == 6, "tokens were counted once"
        found[repeated] = [y, loss, inputs.grad, *(p.grad for p in layer.parameters())]
    torch.testing.assert_close(found[True], found[False])


def _bias_moves_with_everybodys_load() -> None:
    groups = build_groups(DIMS)
    router = RouterConfig(EXPERTS, 1, score="sigmoid", expert_bias=True)
    layer = MoeLayer(MoeConfig(router, ExpertConfig(HIDDEN, 16)), groups, seed=1)
    nn.init.zeros_(layer.router.weight_ED)
    with torch.no_grad():
        # rank r's tokens go to expert r: together even over the first four experts
        layer.router.weight_ED[groups.rank] = 1.0
    layer(torch.ones(5, HIDDEN)).y.sum().backward()
    layer.finish_step(bias_rate=0.5)
    assert layer.router.bias_E.tolist() == [-0.5] * 4 + [0.5] * 4
    layer.finish_step(bias_rate=0.5)
    assert layer.router.bias_E.tolist() == [-0.5] * 4 + [0.5] * 4, "the load was forgotten"
    groups.close()


@pytest.mark.dist
def test_the_expert_bias_moves_with_the_load_of_all_ranks(world4: World) -> None:
    world4.run(_bias_moves_with_everybodys_load)


def test_padding_goes_nowhere_and_reaches_no_gradient() -> None:
    layer = MoeLayer(NO_TOKENS, seed=1)
    x = torch.randn(2, 4, HIDDEN)
    valid = torch.tensor([[True, True, True, False], [True, False, False, False]])
    real = x[valid].requires_grad_()
    expected = layer(real)
    layer.total_loss(expected.y.sum(), expected).backward()
    gradients = {name: p.grad for name, p in layer.named_parameters()}

    layer.zero_grad()
    padded = x.clone().masked_fill(~valid[..., None], torch.nan).requires_grad_()
    out = layer(padded, valid)
    assert not out.y[~valid].any()
    torch.testing.assert_close(out.y[valid], expected.y)
    assert int(out.counts_E.sum()) == 8
    assert int(out.dropped) == 0
    layer.total_loss(out.y.sum(), out).backward()
    torch.testing.assert_close(padded.grad[valid], real.grad)
    torch.testing.assert_close({n: p.grad for n, p in layer.named_parameters()}, gradients)


def test_the_router_stays_exact_when_the_experts_do_not() -> None:
    layer = MoeLayer(CONFIG, dtype=torch.bfloat16)
    out = layer(torch.randn(3, HIDDEN, dtype=torch.bfloat16))
    assert out.y.dtype is torch.bfloat16
    assert layer.router.weight_ED.dtype is torch.float32
    assert out.losses["balance"].dtype is torch.float32
    assert layer.experts.w_in_LDG.dtype is layer.shared.w_in_DG.dtype is torch.bfloat16


def test_every_parameter_has_a_family() -> None:
    layer = MoeLayer(CONFIG)
    families = layer.families()
    GradientRegistry.of(layer.named_parameters(), families)
    assert families["router.weight_ED"] is Family.ROUTER
    assert families["experts.w_in_LDG"] is Family.EXPERT
    assert families["shared.gate_D"] is Family.REPLICATED


def test_public_names_of_the_package_are_there() -> None:
    for name in moe.__all__:
        assert getattr(moe, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'unknown'"):
        _ = moe.unknown
