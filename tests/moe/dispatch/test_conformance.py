"""Every dispatcher brings every row to its expert and its sum back to its token, under all loads.

Expert e computes (e + 1) x + e, so that a row that meets another expert shows; every token of every
rank is another one, so that a row that comes back to another token shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from moe.capacity import capacity, keep
from moe.dispatch import Dispatched, Dispatcher, combine, dispatch, make_dispatcher
from moe.errors import LayoutError
from moe.parallel.dims import ParallelDims
from moe.parallel.groups import NAMES, Group, ProcessGroups, build_groups
from moe.permute import RowOrder, pad_to_capacity, pad_to_multiple, row_order
from tests.helpers.worlds import World

EXPERTS, WIDTH, TOP = 8, 3, 2
TOKENS = 16


@dataclass(frozen=True)
class Load:
    """What one rank has to dispatch."""

    x_TD: Tensor
    experts_TK: Tensor
    weights_TK: Tensor
    kept_TK: Tensor


def _load(experts_TK: Tensor, rank: int, kept_TK: Tensor | None = None) -> Load:
    generator = torch.Generator().manual_seed(rank)
    tokens, choices = experts_TK.shape
    x_TD = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64) + 10 * rank
    weights_TK = torch.rand(tokens, choices, generator=generator, dtype=torch.float64) + 0.1
    kept_TK = torch.ones_like(experts_TK, dtype=torch.bool) if kept_TK is None else kept_TK
    return Load(x_TD, experts_TK, weights_TK, kept_TK)


def _pairs(first_T: Tensor) -> Tensor:
    """Return two different experts for each token."""
    return torch.stack([first_T % EXPERTS, (first_T + 3) % EXPERTS], dim=1)


def _balanced(rank: int) -> Load:
    return _load(_pairs(torch.arange(TOKENS) + rank), rank)


def _at_random(rank: int) -> Load:
    generator = torch.Generator().manual_seed(100 + rank)
    experts = torch.rand(TOKENS, EXPERTS, generator=generator).argsort(dim=1)
    return _load(experts[:, :TOP].contiguous(), rank)


def _one_hot_expert(rank: int) -> Load:
    return _load(torch.tensor([[5, (rank + 1) % 4]]).repeat(TOKENS, 1), rank)


def _one_hot_rank(rank: int) -> Load:
    return _load(torch.tensor([[7, 6]]).repeat(TOKENS, 1), rank)


def _ragged_sources(rank: int) -> Load:
    return _load(_pairs(torch.arange((0, 9, 1, 30)[rank % 4]) * 5), rank)


def _one_source(rank: int) -> Load:
    return _load(_pairs(torch.arange(TOKENS * (rank == 2))), rank)


def _nothing(rank: int) -> Load:
    return _load(torch.zeros(0, TOP, dtype=torch.int64), rank)


def _one_choice_each(rank: int) -> Load:
    return _load(torch.arange(TOKENS)[:, None] * 3 % EXPERTS, rank)


def _some_dropped(rank: int) -> Load:
    load = _at_random(rank)
    kept = torch.arange(TOKENS * TOP).view(TOKENS, TOP) % 3 != rank % 3
    kept[4] = False
    return _load(load.experts_TK, rank, kept)


def _all_dropped(rank: int) -> Load:
    load = _balanced(rank)
    return _load(load.experts_TK, rank, torch.zeros_like(load.experts_TK, dtype=torch.bool))


LOADS: dict[str, Callable[[int], Load]] = {
    "balanced": _balanced,
    "at random": _at_random,
    "one hot expert": _one_hot_expert,
    "one hot rank": _one_hot_rank,
    "ragged sources": _ragged_sources,
    "one source": _one_source,
    "nothing": _nothing,
    "one choice each": _one_choice_each,
    "some dropped": _some_dropped,
    "all dropped": _all_dropped,
}

Expert = Callable[[Dispatched], Tensor]


def _experts(groups: ProcessGroups) -> Expert:
    """Return the local experts; their ETP ranks return unequal parts of each result."""
    num_local = EXPERTS // groups["ep"].size
    etp = groups["etp"]
    part = 2 * (etp.index + 1) / (etp.size * (etp.size + 1))

    def compute(d: Dispatched) -> Tensor:
        numbers = torch.arange(num_local) + groups["ep"].index * num_local
        counts = torch.as_tensor(d.counts_L)
        assert len(counts) == num_local
        assert int(counts.sum()) == len(d.rows_ND)
        e_N1 = numbers.repeat_interleave(counts)[:, None]
        y_ND = (e_N1 + 1) * d.rows_ND + e_N1
        return part * (y_ND if d.weights_N is None else y_ND * d.weights_N[:, None])

    return compute


def _dispatchers(groups: ProcessGroups) -> Iterator[tuple[str, Dispatcher]]:
    yield "alltoall", make_dispatcher(groups, EXPERTS, "alltoall")
    yield "alltoall, weights", make_dispatcher(groups, EXPERTS, "alltoall", weights_travel=True)
    yield "allgather", make_dispatcher(groups, EXPERTS, "allgather")
    yield "auto", make_dispatcher(groups, EXPERTS)
    if groups["ep_etp"].size == 1:
        yield "local", make_dispatcher(groups, EXPERTS, "local")


def _check(name: str, dispatcher: Dispatcher, expert: Expert, load: Load, order: RowOrder) -> None:
    """Compare the output and both gradients with their definitions."""
    x = load.x_TD.clone().requires_grad_()
    w = load.weights_TK.clone().requires_grad_()
    g_TD = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)
    dispatched, plan = dispatch(dispatcher, x, w, order)
    y_TD = combine(dispatcher, expert(dispatched), w, plan)
    (y_TD * g_TD).sum().backward()

    e_TK1 = load.experts_TK[..., None].double()
    made_TKD = ((e_TK1 + 1) * load.x_TD[:, None] + e_TK1) * load.kept_TK[..., None]
    expected = (load.weights_TK[..., None] * made_TKD).sum(1)
    torch.testing.assert_close(y_TD, expected, msg=lambda m: f"{name}: y: {m}")
    factors = (load.weights_TK * load.kept_TK * (load.experts_TK + 1)).sum(1, keepdim=True)
    torch.testing.assert_close(x.grad, factors * g_TD, msg=lambda m: f"{name}: x: {m}")
    expected = (made_TKD * g_TD[:, None]).sum(2)
    torch.testing.assert_close(w.grad, expected, msg=lambda m: f"{name}: weights: {m}")


def _every_load(dims: ParallelDims) -> None:
    groups = build_groups(dims)
    expert = _experts(groups)
    for kind, dispatcher in _dispatchers(groups):
        for name, make in LOADS.items():
            load = make(groups.rank)
            order = row_order(load.experts_TK, load.kept_TK, EXPERTS)
            _check(f"{kind}, {name}", dispatcher, expert, load, order)
    groups.close()


def _dropped(load: Load, limit: int) -> Load:
    kept_TK = keep(load.experts_TK, load.weights_TK, EXPERTS, limit, "probability")
    return Load(load.x_TD, load.experts_TK, load.weights_TK, kept_TK)


def _capacities(dims: ParallelDims) -> None:
    groups = build_groups(dims)
    expert, sources = _experts(groups), groups["ep_etp"].size
    for factor, limit, pad in ((0.5, 2, False), (0.6, 3, True), (100.0, TOKENS, True)):
        assert capacity(TOKENS, TOP, EXPERTS, factor) == limit
        load = _dropped(_one_hot_expert(groups.rank), limit)
        order = row_order(load.experts_TK, load.kept_TK, EXPERTS)
        order = pad_to_capacity(order, limit) if pad else order
        for kind, dispatcher in _dispatchers(groups):
            _check(f"{kind}, {factor}", dispatcher, expert, load, order)
        arrived, _ = dispatch(
            make_dispatcher(groups, EXPERTS, "alltoall"), load.x_TD, load.weights_TK, order
        )
        counts = torch.as_tensor(arrived.counts_L).tolist()
        if pad:
            assert counts == [limit * sources] * len(counts), counts
        assert max(counts) <= limit * sources, counts
    groups.close()


def _multiples_of_16(dims: ParallelDims) -> None:
    groups = build_groups(dims)
    load = _at_random(groups.rank)
    order = pad_to_multiple(row_order(load.experts_TK, load.kept_TK, EXPERTS), 16)
    for kind, dispatcher in _dispatchers(groups):
        _check(kind, dispatcher, _experts(groups), load, order)
    dispatcher = make_dispatcher(groups, EXPERTS, "alltoall")
    arrived, _ = dispatch(dispatcher, load.x_TD, load.weights_TK, order)
    assert all(count % 16 == 0 for count in torch.as_tensor(arrived.counts_L).tolist())
    groups.close()


def _identity(dims: ParallelDims) -> None:
    """Identity experts with weights of 1 / k, gradient the tokens: all comes back as it went."""
    groups = build_groups(dims)
    load = _at_random(groups.rank)
    x = load.x_TD.clone().requires_grad_()
    w = torch.full_like(load.weights_TK, 1 / TOP)
    for _, dispatcher in _dispatchers(groups):
        order = row_order(load.experts_TK, None, EXPERTS)
        arrived, plan = dispatch(dispatcher, x, w, order)
        rows = arrived.rows_ND
        rows = rows if arrived.weights_N is None else rows * arrived.weights_N[:, None]
        y = combine(dispatcher, rows, w, plan) / groups["etp"].size
        torch.testing.assert_close(y, x)
        (gradient,) = torch.autograd.grad(y, x, x.detach())
        torch.testing.assert_close(gradient, load.x_TD)
    groups.close()


MAPPINGS = (
    ParallelDims(4, ep=4),
    ParallelDims(4, tp=4, ep=2),
    ParallelDims(4, etp=4),
    ParallelDims(4, tp=2, ep=2, etp=2),
    ParallelDims(4, tp=4, etp=2),
    ParallelDims(4, pp=2, ep=2),
)
IDS = ["ep4", "tp4-ep2", "etp4", "tp2-ep2-etp2", "tp4-etp2", "pp2-ep2"]
CHECKS = (_every_load, _capacities, _multiples_of_16, _identity)


@pytest.mark.dist
@pytest.mark.parametrize("dims", MAPPINGS, ids=IDS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.strip("_"))
def test_rows_meet_their_experts_and_sums_their_tokens(
    world4: World, check: Callable[[ParallelDims], None], dims: ParallelDims
) -> None:
    world4.run(check, dims)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.strip("_"))
def test_one_rank_needs_no_process_group(check: Callable[[ParallelDims], None]) -> None:
    check(ParallelDims())


def test_the_local_dispatcher_is_refused_where_experts_are_elsewhere() -> None:
    pair = Group((0, 1), 0)
    elsewhere = ProcessGroups(ParallelDims(2, ep=2), 0, dict.fromkeys(NAMES, pair))
    with pytest.raises(LayoutError, match=r"lie on ep\*etp = 2\*1 ranks"):
        make_dispatcher(elsewhere, EXPERTS, "local")
