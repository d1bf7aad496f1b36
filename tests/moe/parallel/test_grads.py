"""Families of parameters: what is summed over whom, how long it is, and how it is clipped."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from moe.errors import LayoutError
from moe.parallel import grads
from moe.parallel.dims import ParallelDims
from moe.parallel.grads import (
    Family,
    GradientRegistry,
    clip_grad_norm_,
    grad_norm,
    reduce_gradients,
)
from moe.parallel.groups import build_groups, single
from tests.helpers.worlds import World

FAMILIES = {
    "dense": Family.DENSE,
    "expert": Family.EXPERT,
    "router": Family.ROUTER,
    "norm": Family.REPLICATED,
}
DIMS = ParallelDims(4, tp=2, ep=2)  # dp 2, edp 2; EDP pairs (0, 2), (1, 3), as do those of DP
CROSSED = ParallelDims(4, cp=2, pp=2, etp=2)


def _parameters() -> nn.ParameterDict:
    return nn.ParameterDict({name: nn.Parameter(torch.zeros(2, 3)) for name in FAMILIES})


def _registered(parameters: nn.ParameterDict) -> GradientRegistry:
    return GradientRegistry.of(parameters.named_parameters(), FAMILIES)


def _sums_over_the_ranks_with_copies(dims: ParallelDims) -> None:
    groups = build_groups(dims)
    parameters = _parameters()
    for number, parameter in enumerate(parameters.values()):
        parameter.grad = torch.full((2, 3), 10.0**groups.rank * (number + 1))
    reduce_gradients(_registered(parameters), groups)
    for number, (name, parameter) in enumerate(parameters.items()):
        ranks = groups[FAMILIES[name].group].ranks
        expected = sum(10.0**rank for rank in ranks) * (number + 1) / (dims.dp * dims.cp)
        torch.testing.assert_close(parameter.grad, torch.full((2, 3), expected))
    groups.close()


def _norm_counts_every_coordinate_once(dims: ParallelDims) -> None:
    groups = build_groups(dims)
    parameters = _parameters()
    squares = 0.0
    for number, (name, parameter) in enumerate(parameters.items()):
        copies = dims.groups(FAMILIES[name].group)
        held = next(i for i, ranks in enumerate(copies) if groups.rank in ranks)
        parameter.grad = torch.full((2, 3), number + held + 1.0)
        squares += sum(6 * (number + i + 1.0) ** 2 for i in range(len(copies)))
    registry = _registered(parameters)
    norm = clip_grad_norm_(registry, groups, 1.0)
    assert math.isclose(float(norm), math.sqrt(squares), rel_tol=1e-6)
    assert math.isclose(float(grad_norm(registry, groups)), 1.0, rel_tol=1e-6)
    assert math.isclose(float(clip_grad_norm_(registry, groups, 9.0)), 1.0, rel_tol=1e-6)
    assert math.isclose(float(grad_norm(registry, groups)), 1.0, rel_tol=1e-6), "left as it was"
    groups.close()


def _idle_on_one_rank() -> None:
    groups = build_groups(DIMS)
    parameters = _parameters()
    if groups.rank == 1:
        parameters["norm"].grad = torch.ones(2, 3)
    reduce_gradients(_registered(parameters), groups)
    assert all(parameter.grad is not None for parameter in parameters.values())
    torch.testing.assert_close(parameters["norm"].grad, torch.full((2, 3), 0.5))
    groups.close()


def _half_precision_is_added_in_single() -> None:
    groups = build_groups(ParallelDims(4))
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    parameter.grad = torch.tensor([256.0 if groups.rank == 0 else 1.0], dtype=torch.bfloat16)
    other = nn.Parameter(torch.zeros(1))
    other.grad = torch.ones(1)
    named = {"half": parameter, "single": other}
    registry = GradientRegistry.of(named.items(), dict.fromkeys(named, Family.DENSE))
    reduce_gradients(registry, groups, scale=1.0)
    assert parameter.grad.dtype is torch.bfloat16
    # one after the other in bfloat16, each 1 would be rounded away; 259 is rounded to 260
    assert parameter.grad.item() == 260.0
    assert other.grad.item() == 4.0
    groups.close()


def _not_finite_anywhere() -> None:
    groups = build_groups(DIMS)
    parameters = _parameters()
    for parameter in parameters.values():
        parameter.grad = torch.ones(2, 3)
    if groups.rank == 2:
        parameters["expert"].grad[0, 0] = torch.nan
    norm = clip_grad_norm_(_registered(parameters), groups, 0.1)
    assert norm.isnan()
    assert parameters["dense"].grad.eq(1).all()
    groups.close()


@pytest.mark.dist
@pytest.mark.parametrize("dims", [DIMS, CROSSED], ids=["tp2-ep2", "cp2-pp2-etp2"])
def test_gradients_are_summed_over_their_copies_and_divided_by_dp_and_cp(
    world4: World, dims: ParallelDims
) -> None:
    world4.run(_sums_over_the_ranks_with_copies, dims)


@pytest.mark.dist
@pytest.mark.parametrize("dims", [DIMS, CROSSED], ids=["tp2-ep2", "cp2-pp2-etp2"])
def test_the_norm_counts_every_coordinate_once_whatever_its_mapping(
    world4: World, dims: ParallelDims
) -> None:
    world4.run(_norm_counts_every_coordinate_once, dims)


@pytest.mark.dist
def test_a_parameter_idle_on_some_ranks_gets_the_others_gradient(world4: World) -> None:
    world4.run(_idle_on_one_rank)


@pytest.mark.dist
def test_half_precision_gradients_are_added_in_float32(world4: World) -> None:
    world4.run(_half_precision_is_added_in_single)


@pytest.mark.dist
def test_a_norm_that_is_not_finite_is_told_everywhere_and_changes_nothing(world4: World) -> None:
    world4.run(_not_finite_anywhere)


def test_the_scale_replaces_the_mean_over_parts() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.ones(3)
    registry = GradientRegistry.of([("p", parameter)], {"p": Family.DENSE})
    reduce_gradients(registry, single(), scale=0.25)
    assert parameter.grad.tolist() == [0.25] * 3


def test_many_gradients_are_reduced_a_bounded_number_of_bytes_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grads, "BUCKET_BYTES", 32)
    layer = nn.ParameterList([nn.Parameter(torch.zeros(n)) for n in (3, 5, 40, 1, 1)])
    for number, parameter in enumerate(layer):
        parameter.grad = torch.full_like(parameter, number + 1.0)
    names = [name for name, _ in layer.named_parameters()]
    registry = GradientRegistry.of(
        layer.named_parameters(), dict.fromkeys(names, Family.REPLICATED)
    )
    sizes = [sum(g.nbytes for g in bucket) for bucket in grads._buckets(list(layer))]
    reduce_gradients(registry, single(), scale=2.0)
    assert sizes == [32, 160, 8]
    assert [p.grad[0].item() for p in layer] == [2.0, 4.0, 6.0, 8.0, 10.0]


def test_what_is_not_trained_is_not_reduced() -> None:
    frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
    registry = GradientRegistry.of([("p", frozen)], {"p": Family.DENSE})
    reduce_gradients(registry, single())
    assert frozen.grad is None
    assert float(grad_norm(registry, single())) == 0.0


def test_no_gradient_at_all_is_not_clipped_to_nan() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.zeros(3)
    registry = GradientRegistry.of([("p", parameter)], {"p": Family.DENSE})
    assert float(clip_grad_norm_(registry, single(), 0.0)) == 0.0
    assert parameter.grad.tolist() == [0.0] * 3


def test_every_parameter_needs_a_family_and_every_family_a_parameter() -> None:
    named = list(_parameters().named_parameters())
    with pytest.raises(LayoutError, match=r"none was given for \['router'\]"):
        GradientRegistry.of(named, {n: f for n, f in FAMILIES.items() if n != "router"})
    with pytest.raises(LayoutError, match=r"no parameters \['bias'\]"):
        GradientRegistry.of(named, {**FAMILIES, "bias": Family.DENSE})
