"""Ring attention: outputs and gradients are those of one rank with the whole sequences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from moe.errors import CollectiveError, LayoutError
from moe.parallel.context import positions_of, take_tokens
from moe.parallel.dims import ParallelDims
from moe.parallel.groups import Group, build_groups
from moe.parallel.ring import Visibility, ring_attention
from tests.helpers.worlds import World

BATCH, HEADS, KINDS, SIZE = 2, 6, 2, 5

DOCUMENTS = {"one document": None, "packed": (5, 1, 7), "a document per token": (1,)}
"""Lengths of the documents, over and over; the second sequence starts in the middle of them."""


def _documents(lengths: tuple[int, ...] | None, length: int) -> Tensor | None:
    if lengths is None:
        return None
    numbers = [n for n in range(2 * length) for _ in range(lengths[n % len(lengths)])]
    return torch.tensor([numbers[:length], numbers[3 : 3 + length]])


def _inputs(length: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(length)
    shapes = [(BATCH, length, heads, SIZE) for heads in (HEADS, KINDS, KINDS, HEADS)]
    return [torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes]


def _whole(inputs: list[Tensor], visibility: Visibility) -> tuple[Tensor, ...]:
    """Return outputs and gradients by torch's own attention with a dense mask."""
    q, k, v = (x.clone().requires_grad_() for x in inputs[:3])
    apart = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
    seen = (apart >= 0) & (apart < (visibility.window or q.shape[1]))
    mask = seen.expand(BATCH, 1, -1, -1)
    if visibility.documents_BT is not None:
        documents = visibility.documents_BT
        mask = mask & (documents[:, None, :, None] == documents[:, None, None])
    q_BHSD, k_BGSD, v_BGSD = (x.transpose(1, 2) for x in (q, k, v))
    out = scaled_dot_product_attention(q_BHSD, k_BGSD, v_BGSD, attn_mask=mask, enable_gqa=True)
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
    visibility = Visibility(window, _documents(lengths, length))
    own = [take_tokens(x, group.index, group.size).to(dtype) for x in inputs]
    q, k, v = (x.requires_grad_() for x in own[:3])
    out = ring_attention(q, k, v, group, visibility)
    assert out.dtype == dtype
    out.backward(own[3])
    found = [out.detach(), q.grad, k.grad, v.grad]
    expected = _whole([x.to(dtype).double() for x in inputs], visibility)
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
    positions = positions_of(4, groups["cp"].index, 2)
    v = positions.float().view(1, 2, 1, 1)
    k = v * 10  # the latest key has all the weight
    out = ring_attention(q, k, v, groups["cp"])
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
        ring_attention(q, q, q, groups["cp"])
    return True


@pytest.mark.dist
def test_a_rank_that_does_not_come_is_told_of() -> None:
    with World(2) as world:
        assert all(world.run(_one_rank_stays_away))


def test_what_does_not_fit_is_refused() -> None:
    q = torch.zeros(2, 3, 4, 5)
    with pytest.raises(LayoutError, match=r"cannot attend to keys \[2, 2, 4, 5\]"):
        ring_attention(q, q[:, :2], q[:, :2], Group())
    with pytest.raises(LayoutError, match="4 heads of queries cannot share 3 heads of keys"):
        ring_attention(q, q[:, :, :3], q[:, :, :3], Group())
    with pytest.raises(LayoutError, match="those of the whole sequences"):
        ring_attention(q, q, q, Group(), Visibility(documents_BT=torch.zeros(2, 2)))
    with pytest.raises(LayoutError, match="window=0 is not valid"):
        Visibility(window=0)
