"""The sharded optimizer: steps, norms and states are those of one that is not sharded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from moe.errors import CheckpointError, LayoutError
from moe.parallel import sharded
from moe.parallel.dims import ParallelDims
from moe.parallel.grads import Family, GradientRegistry, clip_grad_norm_, reduce_gradients
from moe.parallel.groups import build_groups, single
from moe.parallel.sharded import MASTER, ShardedOptimizer
from tests.helpers.worlds import World

FAMILIES = {
    "dense": Family.DENSE,
    "expert": Family.EXPERT,
    "router": Family.ROUTER,
    "norm": Family.REPLICATED,
    "bias": Family.DENSE,
}
SHAPES = {"dense": (3, 5), "expert": (2, 2, 3), "router": (7, 1), "norm": (5,), "bias": (1,)}
MAPPINGS = {
    "one": ParallelDims(1),
    "dp4": ParallelDims(4),
    "tp2-ep2": ParallelDims(4, tp=2, ep=2),
    "cp2-pp2-etp2": ParallelDims(4, cp=2, pp=2, etp=2),
}
MAX_NORM = 3.0


def _adamw(groups: list[dict[str, object]]) -> Optimizer:
    return AdamW(groups, lr=0.1, weight_decay=0.5)


def _sgd(groups: list[dict[str, object]]) -> Optimizer:
    return SGD(groups, lr=0.1, momentum=0.9)


BUILDERS = {"adamw": _adamw, "sgd": _sgd}


def _parameters(dims: ParallelDims, rank: int) -> nn.ParameterDict:
    """Make parameters of which copies are equal, and those of other ranks are not."""
    made = {}
    for name, shape in SHAPES.items():
        copies = dims.groups(FAMILIES[name].group)
        held = next(i for i, ranks in enumerate(copies) if rank in ranks)
        draw = torch.Generator().manual_seed(31 * held + len(name))
        made[name] = nn.Parameter(torch.randn(shape, generator=draw))
    return nn.ParameterDict(made)


def _gradients(rank: int, step: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1000 * rank + step)
    return {n: torch.randn(s, generator=draw) for n, s in SHAPES.items()}


def _agrees(dims: ParallelDims, builder: str, bucket: int, steps: int = 3) -> None:
    groups = build_groups(dims)
    ours, plain = (_parameters(dims, groups.rank) for _ in range(2))
    registries = [GradientRegistry.of(p.named_parameters(), FAMILIES) for p in (ours, plain)]
    sharded.BUCKET_ENTRIES, before = bucket, sharded.BUCKET_ENTRIES
    optimizer = ShardedOptimizer(registries[0], groups, BUILDERS[builder])
    sharded.BUCKET_ENTRIES = before
    decayed = [p for p in plain.values() if p.dim() >= 2]
    others = [p for p in plain.values() if p.dim() < 2]
    expected = BUILDERS[builder]([{"params": decayed}, {"params": others, "weight_decay": 0.0}])
    for step in range(steps):
        for half in range(2):
            for name, gradient in _gradients(groups.rank, 2 * step + half).items():
                ours[name].grad = gradient
                earlier = plain[name].grad if half else None
                plain[name].grad = gradient.clone() if earlier is None else earlier + gradient
            optimizer.collect()
        assert all(p.grad is None for p in ours.values())
        reduce_gradients(registries[1], groups)
        optimizer.reduce()
        norms = optimizer.clip(MAX_NORM), clip_grad_norm_(registries[1], groups, MAX_NORM)
        torch.testing.assert_close(*norms, rtol=1e-6, atol=0)
        optimizer.step()
        expected.step()
        for name in SHAPES:
            torch.testing.assert_close(ours[name], plain[name], rtol=1e-5, atol=1e-6)
    states = dict(optimizer.state())
    assert states.keys() == SHAPES.keys()
    for name, state in states.items():
        kept = {MASTER: plain[name].detach(), **expected.state[plain[name]]}
        assert state.keys() == {k for k, v in kept.items() if isinstance(v, Tensor)}
        for key, value in state.items():
            torch.testing.assert_close(value, kept[key], rtol=1e-5, atol=1e-6)
    groups.close()


def _goes_on(dims: ParallelDims) -> None:
    """Three steps, or two and one more after saving and loading, give the same bits."""
    groups = build_groups(dims)
    ours = _parameters(dims, groups.rank)
    registry = GradientRegistry.of(ours.named_parameters(), FAMILIES)
    optimizer = ShardedOptimizer(registry, groups, _adamw)
    saved: dict[str, dict[str, Tensor]] = {}
    for step in range(3):
        if step == 2:
            saved = {n: {k: v.clone() for k, v in s.items()} for n, s in optimizer.state()}
        _step(optimizer, ours, groups.rank, step)
    expected = {name: p.detach().clone() for name, p in ours.items()}
    with torch.no_grad():
        for parameter in ours.values():
            parameter.fill_(7.0)
    again = ShardedOptimizer(registry, groups, _adamw)
    again.load_state(saved.__getitem__)
    for name, parameter in ours.items():
        assert parameter.equal(saved[name][MASTER])
    _step(again, ours, groups.rank, 2)
    for name, parameter in ours.items():
        assert parameter.equal(expected[name]), name
    groups.close()


def _step(optimizer: ShardedOptimizer, parameters: nn.ParameterDict, rank: int, step: int) -> None:
    for name, gradient in _gradients(rank, step).items():
        parameters[name].grad = gradient
    optimizer.collect()
    optimizer.reduce()
    optimizer.step()


@pytest.mark.parametrize("bucket", [1, 1 << 20])
@pytest.mark.parametrize("builder", BUILDERS)
def test_one_rank_steps_as_the_inner_optimizer(builder: str, bucket: int) -> None:
    _agrees(ParallelDims(1), builder, bucket)


@pytest.mark.dist
@pytest.mark.parametrize("name", [n for n in MAPPINGS if n != "one"])
@pytest.mark.parametrize("bucket", [1, 16, 1 << 20])
def test_ranks_step_as_if_each_stepped_all_it_holds(world4: World, name: str, bucket: int) -> None:
    world4.run(_agrees, MAPPINGS[name], "adamw", bucket)


@pytest.mark.dist
@pytest.mark.parametrize("name", [n for n in MAPPINGS if n != "one"])
def test_a_state_that_was_saved_goes_on_with_the_same_bits(world4: World, name: str) -> None:
    world4.run(_goes_on, MAPPINGS[name])


def test_progress_below_the_precision_of_a_parameter_is_not_lost() -> None:
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    registry = GradientRegistry.of([("p", parameter)], {"p": Family.DENSE})
    optimizer = ShardedOptimizer(registry, single(), lambda g: SGD(g, lr=2.0**-10))
    for _ in range(4):
        parameter.grad = torch.ones(3, dtype=torch.bfloat16)
        optimizer.collect()
        optimizer.reduce()
        optimizer.step()
    state = dict(optimizer.state())["p"][MASTER]
    assert state.eq(1 - 2.0**-8).all()
    assert parameter.dtype is torch.bfloat16
    assert parameter.eq(1 - 2.0**-8).all()


def test_gradients_in_half_precision_are_added_in_single() -> None:
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    registry = GradientRegistry.of([("p", parameter)], {"p": Family.DENSE})
    optimizer = ShardedOptimizer(registry, single(), lambda g: SGD(g, lr=1.0))
    for value in (256.0, 1.0, 1.0, 1.0):  # in bfloat16 each 1 would be rounded away
        parameter.grad = torch.tensor([value], dtype=torch.bfloat16)
        optimizer.collect()
    optimizer.reduce()
    assert float(optimizer.clip(1e9)) == 259.0


def test_a_gradient_that_is_not_finite_is_told_of_and_left() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    registry = GradientRegistry.of([("p", parameter)], {"p": Family.DENSE})
    optimizer = ShardedOptimizer(registry, single(), lambda g: SGD(g, lr=1.0))
    parameter.grad = torch.tensor([1.0, torch.inf])
    optimizer.collect()
    optimizer.reduce()
    assert not optimizer.clip(1.0).isfinite()


def test_states_that_do_not_fit_are_named() -> None:
    parameters = nn.ParameterDict({"a": nn.Parameter(torch.zeros(2, 2)), "b": torch.zeros(1, 2)})
    families = dict.fromkeys(parameters, Family.DENSE)
    registry = GradientRegistry.of(parameters.named_parameters(), families)
    optimizer = ShardedOptimizer(registry, single(), _adamw)
    good = {"a": {MASTER: torch.ones(2, 2)}, "b": {MASTER: torch.ones(1, 2)}}
    for name, state, words in (
        ("b", {}, "the state of b holds .. and no 'master'"),
        ("a", {MASTER: torch.ones(4)}, r"the state of a is of shape \[4\], the parameter of"),
        ("b", {MASTER: torch.ones(1, 2), "exp_avg": torch.ones(1, 2)}, "different optimizers"),
    ):
        with pytest.raises(CheckpointError, match=words):
            optimizer.load_state({**good, name: state}.__getitem__)
    with pytest.raises(LayoutError, match="nothing to train"):
        ShardedOptimizer(GradientRegistry(()), single(), _adamw)
