"""Causal attention over sequences that are spread over a ring of ranks.

Keys and values go round: each rank passes the block it has to the next one while it works on it,
so that no rank ever holds more than two blocks. What a block adds is merged through the logarithm
of the sum of exponentials, which makes the result, and the gradient, those of whole rows:

    lse = log sum_j exp(s_j);  out = sum_j exp(s_j - lse) v_j
    dv_j = p_j dout;  ds_j = p_j (<dout, v_j> - <dout, out>);  p_j = exp(s_j - lse)

In the backward pass blocks go round again, with their gradients, which come home at the end. Where
tokens stand travels with them, and decides who sees whom (`moe.places.visible`). A rank's tokens
are taken in two halves, head and tail (`moe.parallel.context`); pairs of halves that do not see
each other are skipped, which saves half of the work.

Shapes: B rows, S tokens of a rank, J key heads, R query heads for each, H = J R, C width of a head;
Q and K tokens of a half, of queries and of keys.

References:
    Liu, Zaharia, Abbeel, "Ring Attention with Blockwise Transformers", 2023; the split into head
    and tail is Llama 3's (Dubey et al., 2024, section 3.3.2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe.parallel.collectives import Pending, start_shift
from moe.parallel.groups import Group
from moe.places import Places, visible

__all__ = ["RingCore"]


class RingCore:
    """Attend to the tokens of all ranks of a CP group: an `AttentionCore`.

    Scores and sums are in float32 at least.

    Args:
        group: the ranks that hold the sequences, each as many tokens of as many rows.

    Note:
        Collective. Deterministic: blocks are merged in the order in which they come round.

    Example:
        >>> q_BSHC = torch.randn(1, 5, 4, 8)
        >>> core = RingCore(Group())
        >>> core(q_BSHC, q_BSHC[:, :, :2], q_BSHC[:, :, :2], Places.whole(1, 5), None).shape
        torch.Size([1, 5, 4, 8])
    """

    def __init__(self, group: Group) -> None:
        self.group = group

    def __call__(
        self, q_BSHC: Tensor, k_BSJC: Tensor, v_BSJC: Tensor, places: Places, window: int | None
    ) -> Tensor:
        """Return what each token makes of those that it sees; see `AttentionCore`.

        Raises:
            CollectiveError: another rank failed.
        """
        kinds = k_BSJC.shape[2]
        documents_BS = places.documents
        if documents_BS is None:
            documents_BS = torch.zeros_like(places.positions_BS)
        ring = _Ring(self.group, places.positions_BS, documents_BS, window)
        q_BSJRC = q_BSHC.unflatten(2, (kinds, q_BSHC.shape[2] // kinds))
        out_BSJRC: Tensor = _RingAttention.apply(q_BSJRC, k_BSJC, v_BSJC, ring)
        return out_BSJRC.flatten(2, 3)


class _Pair(NamedTuple):
    """A half of this rank's queries and a half of the keys that are here."""

    queries: slice
    keys: slice
    hidden_B11QK: Tensor
    """Which keys are not visible."""


class _Block(NamedTuple):
    """Keys and values of one rank, and where they stand."""

    k_BSJC: Tensor
    v_BSJC: Tensor
    positions_BS: Tensor
    documents_BS: Tensor


@dataclass(frozen=True)
class _Ring:
    """What the forward and the backward pass have in common."""

    group: Group
    positions_BS: Tensor
    documents_BS: Tensor
    window: int | None

    def blocks(self, k_BSJC: Tensor, v_BSJC: Tensor) -> Iterator[_Block]:
        """Yield the blocks as they come by, this rank's own first, each while the next travels."""
        here = _Block(k_BSJC, v_BSJC, self.positions_BS, self.documents_BS)
        for step in range(self.group.size):
            coming = self.pass_on(list(here)) if step + 1 < self.group.size else None
            yield here
            if coming is not None:
                here = _Block(*coming.wait())

    def pairs(self, block: _Block) -> Iterator[_Pair]:
        """Yield the pairs of halves of which one sees some of the other."""
        for queries in self._halves():
            for keys in self._halves():
                where = self.positions_BS[:, queries], block.positions_BS[:, keys]
                whose = self.documents_BS[:, queries], block.documents_BS[:, keys]
                seen_BQK = visible(*where, *whose, self.window)
                if bool(seen_BQK.any()):
                    yield _Pair(queries, keys, ~seen_BQK[:, None, None])

    def pass_on(self, tensors: list[Tensor]) -> Pending[list[Tensor]]:
        """Begin to pass tensors to the next rank."""
        return start_shift(tensors, self.group)

    def _halves(self) -> list[slice]:
        tokens = self.positions_BS.shape[1]
        if self.group.size == 1:
            return [slice(0, tokens)]
        return [slice(0, tokens // 2), slice(tokens // 2, tokens)]


def _scores(q_BQJRC: Tensor, k_BKJC: Tensor, pair: _Pair, scale: float) -> Tensor:
    """Return scores s_BJRQK, minus infinity where nothing is visible."""
    s_BJRQK = torch.einsum("bqjrc,bkjc->bjrqk", q_BQJRC, k_BKJC).mul_(scale)
    return s_BJRQK.masked_fill_(pair.hidden_B11QK, -math.inf)


def _per_query(x_BSJR: Tensor) -> Tensor:
    """Return numbers of queries in the order in which scores have them, x_BJRQ1."""
    return x_BSJR.permute(0, 2, 3, 1).unsqueeze(-1)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: _Ring) -> Tensor:
        exact = torch.promote_types(q.dtype, torch.float32)
        scale = q.shape[-1] ** -0.5
        q_BSJRC = q.to(exact)
        # the smallest number, not infinity: what is not visible then weighs exp(-inf) = 0
        top_BSJR = q_BSJRC.new_full(q.shape[:-1], torch.finfo(exact).min)
        sum_BSJR = torch.zeros_like(top_BSJR)
        out_BSJRC = torch.zeros_like(q_BSJRC)
        for block in ring.blocks(k, v):
            k_BSJC, v_BSJC = block.k_BSJC.to(exact), block.v_BSJC.to(exact)
            for pair in ring.pairs(block):
                mine, theirs = pair.queries, pair.keys
                s_BJRQK = _scores(q_BSJRC[:, mine], k_BSJC[:, theirs], pair, scale)
                top_BQJR = torch.maximum(s_BJRQK.amax(-1).permute(0, 3, 1, 2), top_BSJR[:, mine])
                p_BJRQK = s_BJRQK.sub_(_per_query(top_BQJR)).exp_()
                kept_BQJR = (top_BSJR[:, mine] - top_BQJR).exp_()
                added = torch.einsum("bjrqk,bkjc->bqjrc", p_BJRQK, v_BSJC[:, theirs])
                out_BSJRC[:, mine] = out_BSJRC[:, mine] * kept_BQJR[..., None] + added
                added = p_BJRQK.sum(-1).permute(0, 3, 1, 2)
                sum_BSJR[:, mine] = sum_BSJR[:, mine] * kept_BQJR + added
                top_BSJR[:, mine] = top_BQJR
        out_BSJRC /= sum_BSJR[..., None]
        ctx.save_for_backward(q, k, v, out_BSJRC, top_BSJR + sum_BSJR.log())
        ctx.ring = ring
        return out_BSJRC.to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out_BSJRC, lse_BSJR = ctx.saved_tensors
        ring: _Ring = ctx.ring
        exact, scale = out_BSJRC.dtype, q.shape[-1] ** -0.5
        q_BSJRC, do_BSJRC = q.to(exact), gradient.to(exact)
        along_BSJR = (do_BSJRC * out_BSJRC).sum(-1)
        dq_BSJRC = torch.zeros_like(q_BSJRC)
        flying: Pending[list[Tensor]] | None = None
        for block in ring.blocks(k, v):
            k_BSJC, v_BSJC = block.k_BSJC.to(exact), block.v_BSJC.to(exact)
            dk_BSJC, dv_BSJC = torch.zeros_like(k_BSJC), torch.zeros_like(v_BSJC)
            for pair in ring.pairs(block):
                mine, theirs = pair.queries, pair.keys
                q_BQJRC, do_BQJRC = q_BSJRC[:, mine], do_BSJRC[:, mine]
                s_BJRQK = _scores(q_BQJRC, k_BSJC[:, theirs], pair, scale)
                p_BJRQK = s_BJRQK.sub_(_per_query(lse_BSJR[:, mine])).exp_()
                dv_BSJC[:, theirs] += torch.einsum("bjrqk,bqjrc->bkjc", p_BJRQK, do_BQJRC)
                dp_BJRQK = torch.einsum("bqjrc,bkjc->bjrqk", do_BQJRC, v_BSJC[:, theirs])
                dp_BJRQK -= _per_query(along_BSJR[:, mine])
                ds_BJRQK = dp_BJRQK.mul_(p_BJRQK).mul_(scale)
                dq_BSJRC[:, mine] += torch.einsum("bjrqk,bkjc->bqjrc", ds_BJRQK, k_BSJC[:, theirs])
                dk_BSJC[:, theirs] += torch.einsum("bjrqk,bqjrc->bkjc", ds_BJRQK, q_BQJRC)
            # gradients come one step behind their block, and home with one step more
            if flying is not None:
                carried = flying.wait()
                dk_BSJC, dv_BSJC = dk_BSJC + carried[0], dv_BSJC + carried[1]
            flying = ring.pass_on([dk_BSJC, dv_BSJC])
        assert flying is not None, "a ring has at least one rank"
        dk, dv = flying.wait()
        return dq_BSJRC.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None
