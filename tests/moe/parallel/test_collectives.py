"""Collectives over rows: what arrives, which gradients flow back, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe.errors import CollectiveError
from moe.parallel.collectives import (
    all_gather_rows,
    all_reduce_sum,
    all_to_all_rows,
    exchange_counts,
    gather_counts,
    largest,
    reduce_scatter_rows,
    start_all_to_all_rows,
)
from moe.parallel.dims import ParallelDims
from moe.parallel.groups import Group, build_groups
from tests.helpers.worlds import World

COUNTS = ((2, 0, 1, 3), (0, 0, 0, 0), (1, 4, 0, 2), (5, 1, 1, 0))
"""COUNTS[r][s]: rows that rank r has for rank s; rank 1 has none for anybody."""

WIDTH = 3


def _rows(sender: int, receiver: int) -> Tensor:
    """Return rows that say who sent them to whom, and which of them they are."""
    rows = torch.arange(COUNTS[sender][receiver], dtype=torch.float64)[:, None]
    return 100.0 * sender + 10.0 * receiver + rows + torch.arange(WIDTH) / 8


def _everyone(size: int) -> Group:
    return build_groups(ParallelDims(world=size))["world"]


def _all_to_all_moves_rows() -> None:
    group = _everyone(4)
    me, counts = group.index, [row[group.index] for row in COUNTS]
    sent = torch.cat([_rows(me, to) for to in range(4)]).requires_grad_()
    received = all_to_all_rows(sent, COUNTS[me], counts, group)
    torch.testing.assert_close(received, torch.cat([_rows(by, me) for by in range(4)]))
    weight = 1 + me
    (received * weight).sum().backward()
    weights = torch.cat([torch.full((COUNTS[me][to], WIDTH), 1.0 + to) for to in range(4)])
    torch.testing.assert_close(sent.grad, weights.double())


def _two_flights_overlap() -> None:
    group = _everyone(4)
    me, counts = group.index, [row[group.index] for row in COUNTS]
    sent = torch.cat([_rows(me, to) for to in range(4)]).requires_grad_()
    first = start_all_to_all_rows(sent, COUNTS[me], counts, group)
    second = start_all_to_all_rows(2 * sent, COUNTS[me], counts, group)
    meanwhile = (sent * sent).sum()
    total = (first.wait() + second.then(lambda rows: 3 * rows).wait()).sum() + meanwhile
    total.backward()
    torch.testing.assert_close(sent.grad, 7 + 2 * sent.detach())


def _nobody_waits_before_it_must() -> None:
    """Rank 1 takes part only when rank 0 says that it has gone on, forwards and backwards."""
    groups = build_groups(ParallelDims(world=4, tp=2), ["tp"])
    word = torch.zeros(1)
    if groups.rank > 1:
        groups.close()
        return
    x = torch.ones(2, WIDTH, requires_grad=True)
    if groups.rank == 1:
        dist.recv(word, 0)
    pending = start_all_to_all_rows(x, [1, 1], [1, 1], groups["tp"])
    meanwhile = 2 * x
    if groups.rank == 0:
        dist.send(word, 1)
    rows = pending.wait()

    def tell(_: Tensor) -> None:
        dist.send(word, 1)

    def hear(_: Tensor) -> None:
        dist.recv(word, 0)

    if groups.rank == 0:
        meanwhile.register_hook(tell)
    else:
        rows.register_hook(hear)
    (rows.sum() + meanwhile.sum()).backward()
    torch.testing.assert_close(x.grad, torch.full((2, WIDTH), 3.0))
    groups.close()


def _gather_and_scatter_are_a_pair(dtype: torch.dtype) -> None:
    group = _everyone(4)
    me, counts = group.index, [2, 0, 3, 1]
    own = torch.full((counts[me], WIDTH), me + 1.0, dtype=dtype, requires_grad=True)
    gathered = all_gather_rows(own, counts, group)
    expected = torch.cat([torch.full((c, WIDTH), r + 1.0) for r, c in enumerate(counts)])
    torch.testing.assert_close(gathered, expected.to(dtype))
    gathered.mul(me + 1).sum().backward()
    torch.testing.assert_close(own.grad, torch.full_like(own, 10.0))  # 1 + 2 + 3 + 4

    whole = (torch.arange(6.0)[:, None] + 10 * me + torch.zeros(WIDTH)).to(dtype).requires_grad_()
    scattered = reduce_scatter_rows(whole, counts, group)
    first = sum(counts[:me])
    expected = 4 * torch.arange(first, first + counts[me])[:, None] + 60 + torch.zeros(WIDTH)
    torch.testing.assert_close(scattered, expected.to(dtype))
    scattered.mul(me + 1).sum().backward()
    expected = torch.cat([torch.full((c, WIDTH), r + 1.0) for r, c in enumerate(counts)])
    torch.testing.assert_close(whole.grad, expected.to(dtype))


def _scattered_bf16_is_summed_exactly() -> None:
    group = _everyone(4)
    parts = torch.tensor([[256.0], [1.0], [1.0], [1.0]], dtype=torch.bfloat16)
    own = parts[group.index].repeat(4, 1)
    scattered = reduce_scatter_rows(own, [1, 1, 1, 1], group)
    # one after the other in bfloat16, each 1 would be rounded away
    assert scattered.item() == 260.0, scattered


def _sum_has_the_sum_as_its_gradient() -> None:
    group = _everyone(4)
    x = torch.tensor([1.0, 2.0]) * (group.index + 1)
    x.requires_grad_()
    total = all_reduce_sum(x, group)
    torch.testing.assert_close(total, torch.tensor([10.0, 20.0]))
    (total * (group.index + 1)).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([10.0, 10.0]))


def _counts_are_transposed() -> None:
    group = _everyone(4)
    table = torch.tensor(COUNTS)
    assert exchange_counts(table[group.index][:, None], group)[:, 0].equal(table[:, group.index])
    assert gather_counts(table[group.index], group).equal(table)
    assert largest([group.index % 3, -group.index], group, torch.device("cpu")) == [2, 0]


def _wrong_counts_are_refused() -> list[str]:
    group = _everyone(4)
    messages = []
    x = torch.zeros(3, WIDTH)
    for call in (
        lambda: all_to_all_rows(x, [1, 1, 1, 1], [1, 1, 1, 1], group),
        lambda: all_gather_rows(x, [2, 2, 2, 2], group),
        lambda: reduce_scatter_rows(x, [1, 2], group),
    ):
        with pytest.raises(CollectiveError) as refusal:
            call()
        messages.append(str(refusal.value))
    return messages


def _a_rank_that_left_is_noticed() -> str:
    # a group of its own, with a short patience, so that the world stays usable
    half = build_groups(ParallelDims(world=4, tp=2), ["tp"], timeout_s=0.5)
    try:
        if dist.get_rank() != 0:
            all_reduce_sum(torch.zeros(1), half["tp"])
    except CollectiveError as error:
        return str(error)
    finally:
        dist.barrier()
        half.close()
    return ""


CHECKS = (
    _all_to_all_moves_rows,
    _two_flights_overlap,
    _nobody_waits_before_it_must,
    _scattered_bf16_is_summed_exactly,
    _sum_has_the_sum_as_its_gradient,
    _counts_are_transposed,
)


@pytest.mark.dist
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.strip("_"))
def test_rows_and_gradients_arrive(world4: World, check: object) -> None:
    world4.run(check)


@pytest.mark.dist
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gathering_and_scattering_are_each_others_gradient(
    world4: World, dtype: torch.dtype
) -> None:
    world4.run(_gather_and_scatter_are_a_pair, dtype)


@pytest.mark.dist
def test_counts_that_do_not_fit_are_refused_before_anything_is_sent(world4: World) -> None:
    for messages in world4.run(_wrong_counts_are_refused):
        assert "all-to-all of 3 rows among 4 ranks with counts [1, 1, 1, 1]" in messages[0]
        assert "all-gather of 3 rows" in messages[1]
        assert "reduce-scatter of 3 rows" in messages[2]


@pytest.mark.dist
def test_a_rank_that_does_not_take_part_is_noticed_within_the_timeout(world4: World) -> None:
    told = world4.run(_a_rank_that_left_is_noticed)
    assert "among ranks [0, 1] failed on rank 1" in told[1]
    assert told[0] == told[2] == told[3] == ""


def test_a_group_of_one_passes_everything_through() -> None:
    x, alone = torch.randn(3, WIDTH, requires_grad=True), Group()
    assert all_to_all_rows(x, [3], [3], alone) is x
    assert all_gather_rows(x, [3], alone) is x
    assert reduce_scatter_rows(x, [3], alone) is x
    assert all_reduce_sum(x, alone) is x
    counts = torch.tensor([[3, 4]])
    assert exchange_counts(counts, alone) is counts
    assert gather_counts(counts[0], alone).equal(counts)
