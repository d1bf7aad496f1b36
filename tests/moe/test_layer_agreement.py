"""What ranks have to have in common, and inputs at the edge: refused everywhere, or it works."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe.config import CapacityConfig, ExpertConfig, LossConfig, MoeConfig, RouterConfig
from moe.errors import MoeError, RoutingError
from moe.layer import Execution, MoeLayer
from moe.parallel.dims import ParallelDims
from moe.parallel.groups import build_groups
from tests.helpers.worlds import World

HIDDEN = 8
CONFIG = MoeConfig(
    RouterConfig(4, 2, renormalise=True),
    ExpertConfig(HIDDEN, 16, shared=8, shared_gate=True),
    LossConfig(balance=0.3, z=0.1),
)
BY_SEQUENCE = replace(CONFIG, losses=LossConfig(balance=0.3, scope="sequence"))
FULL = replace(CONFIG, capacity=CapacityConfig(1.0, "full-sequence"))


def _autocast_with_an_idle_rank() -> list[torch.dtype]:
    groups = build_groups(ParallelDims(2, ep=2))
    types = []
    for execution in (Execution(), Execution("allgather"), Execution(weights_travel=True)):
        layer = MoeLayer(CONFIG, groups, execution, seed=1)
        with torch.no_grad():
            # every token goes to the first two experts, and none to rank 1's
            layer.router.weight_ED.zero_()
        x = torch.ones(3, HIDDEN, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = layer(x)
        layer.total_loss(out.y.float().sum(), out).backward()
        assert x.grad is not None
        types += [out.y.dtype, x.grad.dtype]
    groups.close()
    return types


@pytest.mark.dist
def test_under_autocast_ranks_with_and_without_rows_agree_on_the_type(world2: World) -> None:
    for types in world2.run(_autocast_with_an_idle_rank):
        assert types == [torch.bfloat16, torch.float32] * 3


def _refused(kind: str) -> str:
    groups = build_groups(ParallelDims(2, tp=2, ep=2))
    odd, config, x = groups.rank == 1, CONFIG, torch.ones(2, 3, HIDDEN)
    valid: Tensor | None = None
    if kind == "sequence" or kind == "full":
        config = BY_SEQUENCE if kind == "sequence" else FULL
        x = x[:1] if odd else x
    elif kind == "settings" and odd:
        config = replace(CONFIG, losses=LossConfig(balance=0.2, z=0.1))
    elif kind == "type" and odd:
        x = x.bfloat16()
    elif kind == "integers" and odd:
        x = x.long()
    elif kind == "mask" and odd:
        valid = torch.ones(2, 3, dtype=torch.int64)
    elif kind == "types under autocast":
        x = x.bfloat16() if odd else x
    layer = MoeLayer(config, groups, seed=1)
    autocast = kind == "types under autocast" or (kind == "autocast" and odd)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            layer(x, valid)
    except MoeError as error:
        told = f"{type(error).__name__}: {error}"
    else:
        told = ""
    groups.close()
    return told


@pytest.mark.dist
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (
            "sequence",
            "RoutingError: the ranks differ in the number of sequences: 2 on rank 0 and 1",
        ),
        ("full", "RoutingError: the ranks differ in the number of sequences: 2 on rank 0 and 1"),
        ("settings", "LayoutError: the ranks differ in the layer's settings: digest"),
        ("type", "RoutingError: rank 1: the tokens are of torch.bfloat16, and the experts'"),
        ("integers", "RoutingError: rank 1: the tokens are of torch.int64; give one of"),
        ("mask", "RoutingError: rank 1: the mask is of torch.int64; give one of torch.bool"),
        (
            "types under autocast",
            "RoutingError: the ranks differ in the type of the tokens: torch.float32 on rank 0",
        ),
        (
            "autocast",
            "RoutingError: the ranks differ in the type that experts compute in: torch.float32 on",
        ),
    ],
)
def test_ranks_that_differ_are_refused_everywhere_before_anything_is_sent(
    world2: World, kind: str, words: str
) -> None:
    told = world2.run(_refused, kind)
    assert len(set(told)) == 1
    assert told[0].startswith(words)


def _without_sequences(dims: ParallelDims) -> None:
    groups = build_groups(dims)
    for scope in ("micro-batch", "sequence", "global"):
        for capacity in (
            None,
            CapacityConfig(1.0, pad=True),
            CapacityConfig(1.0, "full-sequence"),
            CapacityConfig(1.0, "full-sequence", "position", pad=True),
        ):
            config = replace(CONFIG, losses=LossConfig(0.3, scope, 0.1), capacity=capacity)
            layer = MoeLayer(config, groups, seed=1)
            x = torch.zeros(0, 5, HIDDEN, requires_grad=True)
            out = layer(x, torch.ones(0, 5, dtype=torch.bool))
            assert out.y.shape == x.shape
            layer.total_loss(out.y.sum(), out).backward()
            assert not sum(out.losses.values())
            for name, parameter in layer.named_parameters():
                assert parameter.grad is not None, name
                assert not parameter.grad.any(), name
    groups.close()


def test_a_batch_of_no_sequences_gives_zero_gradients() -> None:
    _without_sequences(ParallelDims())


@pytest.mark.dist
def test_a_batch_of_no_sequences_on_many_ranks_gives_zero_gradients(world2: World) -> None:
    world2.run(_without_sequences, ParallelDims(2, tp=2, ep=2))


@pytest.mark.parametrize("recompute", ["nothing", "layer"])
def test_padding_that_is_not_a_number_reaches_no_gradient_of_the_shared_expert(
    recompute: str,
) -> None:
    valid = torch.tensor([[True, True, False], [True, False, False]])
    x = torch.randn(2, 3, HIDDEN)
    found = []
    for filler in (0.0, torch.nan):
        layer = MoeLayer(CONFIG, execution=Execution(recompute=recompute), seed=1)
        padded = x.masked_fill(~valid[..., None], filler).requires_grad_()
        out = layer(padded, valid)
        layer.total_loss(out.y.square().sum(), out).backward()
        assert not out.y[~valid].any()
        found.append([out.y, padded.grad, *(p.grad for p in layer.parameters())])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def _copy(dims: ParallelDims) -> None:
    groups = build_groups(dims)
    layer = MoeLayer(FULL, groups, seed=1)
    twin = copy.deepcopy(layer)
    assert twin.groups is groups
    x = torch.ones(2, 3, HIDDEN)
    torch.testing.assert_close(twin(x).y, layer(x).y)
    with torch.no_grad():
        twin.experts.w_in_LDG.zero_()
    assert layer.experts.w_in_LDG.any(), "parameters are the copy's own"
    groups.close()


def test_a_layer_can_be_copied() -> None:
    _copy(ParallelDims())


@pytest.mark.dist
def test_a_copy_of_a_layer_talks_to_the_same_ranks(world2: World) -> None:
    world2.run(_copy, ParallelDims(2, ep=2))


def test_tokens_of_another_type_than_the_weights_are_refused_without_autocast() -> None:
    layer = MoeLayer(CONFIG, dtype=torch.bfloat16)
    with pytest.raises(RoutingError, match=r"torch.float32, and the experts' weights of torch.bfl"):
        layer(torch.ones(3, HIDDEN))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.ones(3, HIDDEN)).y.dtype is torch.bfloat16
