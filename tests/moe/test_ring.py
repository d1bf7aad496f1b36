"""Ring attention: outputs and gradients are those of one rank with the whole sequences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from moe.errors import CollectiveError
from moe.parallel.context import positions_of, take_tokens
from moe.parallel.dims import ParallelDims
from moe.parallel.groups import build_groups
from moe.places import Places, visible
from moe.ring import RingCore
from tests.helpers.worlds import World

BATCH, HEADS, KINDS, SIZE = 2, 6, 2, 5

DOCUMENTS = {"one document": None, "packed": (5, 1, 7), "a document per token": (1,)}
"""Lengths of the documents, over and over; the second sequence starts in the middle of them."""


def _places(lengths: tuple[int, ...] | None, length: int) -> Places:
    """Return places of whole rows; positions begin anew in each document."""
    if lengths is None:
        return Places(torch.arange(length).expand(BATCH, -1))
    spans = [(n, i) for n in range(2 * length) for i in range(lengths[n % len(lengths)])]
    numbers, inside = torch.tensor(spans[: 3 + length]).T
    documents_BT = torch.stack([numbers[:length], numbers[3:]])
    positions_BT = torch.stack([inside[:length], inside[3:]])
    valid_BT = torch.ones(BATCH, length, dtype=torch.bool)
    valid_BT[1, -2:] = False
    return Places(positions_BT, documents_BT, valid_BT)


def _inputs(length: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(length)
    shapes = [(BATCH, length, heads, SIZE) for heads in (HEADS, KINDS, KINDS, HEADS)]
    return [torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes]


def _whole(inputs: list[Tensor], places: Places, window: int | None) -> tuple[Tensor, ...]:
    """Return outputs and gradients by torch's own attention with a dense mask."""
    q, k, v = (x.clone().requires_grad_() for x in inputs[:3])
    where, whose = places.positions_BS, places.documents
    mask = visible(where, where, whose, whose, window)[:, None]
    q_BHSC, k_BJSC, v_BJSC = (x.transpose(1, 2) for x in (q, k, v))
    out = scaled_dot_product_attention(q_BHSC, k_BJSC, v_BJSC, attn_mask=mask, enable_gqa=True)
    out = out.transpose(1, 2)
    out.backward(inputs[3])
    assert q.grad is not None
    assert k.grad is not None
    assert v.grad is not None
    return out.detach(), q.grad, k.grad, v.grad


def _largest_error(
    length: int,
    lengths: tuple[int, ...] | None = None,
    window: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> float:
    """Return how far this rank's part is from the whole, relative to values of about 1."""
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    groups = build_groups(ParallelDims(world, cp=world), ["cp"])
    group, inputs = groups["cp"], _inputs(length)
    whole = _places(lengths, length)
    told = (whole.positions_BS, whole.documents_BS, whole.valid_BS)
    places = Places(
        *(x if x is None else take_tokens(x, group.index, group.size) for x in told)  # type: ignore[arg-type]
    )
    own = [take_tokens(x, group.index, group.size).to(dtype) for x in inputs]
    q, k, v = (x.requires_grad_() for x in own[:3])
    out = RingCore(group)(q, k, v, places, window)
    assert out.dtype == dtype
    out.backward(own[3])
    found = [out.detach(), q.grad, k.grad, v.grad]
    expected = _whole([x.to(dtype).double() for x in inputs], whole, window)
    errors = []
    for mine, all_of_them in zip(found, expected, strict=True):
        assert mine is not None
        part = take_tokens(all_of_them, group.index, group.size)
        errors.append(float((mine.double() - part).abs().max()))
    groups.close()
    return max(errors)


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("lengths", DOCUMENTS.values(), ids=DOCUMENTS)
def test_one_rank_agrees_with_torch(lengths: tuple[int, ...] | None, window: int | None) -> None:
    assert _largest_error(13, lengths, window) < 1e-12


@pytest.mark.dist
@pytest.mark.parametrize("window", [None, 1, 4, 9])
@pytest.mark.parametrize("lengths", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("chunk", [1, 3])
def test_four_ranks_agree_with_torch(
    world4: World, chunk: int, lengths: tuple[int, ...] | None, window: int | None
) -> None:
    assert max(world4.run(_largest_error, 8 * chunk, lengths, window)) < 1e-12


@pytest.mark.dist
@pytest.mark.parametrize("chunk", [1, 5])
def test_two_ranks_agree_with_torch(world2: World, chunk: int) -> None:
    assert max(world2.run(_largest_error, 4 * chunk)) < 1e-12


@pytest.mark.dist
def test_what_is_rounded_is_rounded_at_the_end(world4: World) -> None:
    assert max(world4.run(_largest_error, 24, None, None, torch.float32)) < 1e-6
    # bfloat16 has 8 bits: in and out once, with sums in float32 between
    assert max(world4.run(_largest_error, 24, None, None, torch.bfloat16)) < 2**-6


def _large_scores_do_not_overflow() -> bool:
    groups = build_groups(ParallelDims(2, cp=2), ["cp"])
    q = torch.full((1, 2, 1, 1), 300.0)
    positions = positions_of(4, groups["cp"].index, 2)[None]
    v = positions.float().view(1, 2, 1, 1)
    k = v * 10  # the latest key has all the weight
    out = RingCore(groups["cp"])(q, k, v, Places(positions), None)
    groups.close()
    return bool(torch.equal(out, v))


@pytest.mark.dist
def test_scores_of_thousands_are_survived(world2: World) -> None:
    assert all(world2.run(_large_scores_do_not_overflow))


def _one_rank_stays_away() -> bool:
    groups = build_groups(ParallelDims(2, cp=2), ["cp"], timeout_s=2.0)
    q = torch.ones(1, 2, 1, 1)
    if groups.rank == 1:
        return True
    with pytest.raises(CollectiveError, match="another rank ended or does not answer"):
        RingCore(groups["cp"])(q, q, q, Places(torch.arange(2)[None]), None)
    return True


@pytest.mark.dist
def test_a_rank_that_does_not_come_is_told_of() -> None:
    with World(2) as world:
        assert all(world.run(_one_rank_stays_away))
