"""Causal attention over sequences that are spread over a ring of ranks.

Keys and values go round: each rank passes the block it has to the next one while it works on it,
so that no rank ever holds more than two blocks. What a block adds is merged through the logarithm
of the sum of exponentials, which makes the result, and the gradient, those of whole rows:

    lse = log sum_j exp(s_j);  out = sum_j exp(s_j - lse) v_j
    dv_j = p_j dout;  ds_j = p_j (<dout, v_j> - <dout, out>);  p_j = exp(s_j - lse)

In the backward pass blocks go round again, with their gradients, which come home at the end. Pairs
of chunks where no key is visible are skipped, which halves the work (see `moe.parallel.context`).

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

from moe.errors import LayoutError
from moe.parallel.collectives import Pending, start_shift
from moe.parallel.context import positions_of
from moe.parallel.groups import Group

__all__ = ["Visibility", "ring_attention"]


@dataclass(frozen=True, slots=True)
class Visibility:
    """Which keys a query sees: none that come later, and further limits.

    Args:
        window: keys that a query sees at most, itself included; None for all.
        documents_BT: number of the document of each token of the *whole* sequences, which a query
            does not see beyond; int64. None where a sequence is one document.

    Raises:
        LayoutError: the window is empty.
    """

    window: int | None = None
    documents_BT: Tensor | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise LayoutError(f"window={self.window} is not valid: a query sees at least itself")

    def none_of(self, queries: Tensor, keys: Tensor) -> bool:
        """Tell whether ascending positions of queries see nothing of ascending ones of keys."""
        too_late = int(keys[0]) > int(queries[-1])
        too_old = self.window is not None and int(queries[0]) - int(keys[-1]) >= self.window
        return too_late or too_old

    def mask(self, queries_Q: Tensor, keys_K: Tensor) -> Tensor | None:
        """Return what is visible, of shape ``(batch or 1, Q, K)``; None if all is.

        Args:
            queries_Q: positions, ascending.
            keys_K: positions, ascending.
        """
        apart_QK = queries_Q[:, None] - keys_K
        seen_1QK = (apart_QK >= 0)[None]
        if self.window is not None:
            seen_1QK = seen_1QK & (apart_QK < self.window)
        if self.documents_BT is not None:
            of_queries, of_keys = self.documents_BT[:, queries_Q], self.documents_BT[:, keys_K]
            return seen_1QK & (of_queries[:, :, None] == of_keys[:, None])
        return None if bool(seen_1QK.all()) else seen_1QK


def ring_attention(
    q_BSHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    group: Group,
    visibility: Visibility | None = None,
    *,
    scale: float | None = None,
) -> Tensor:
    """Attend to the tokens of all ranks of a group, each of which holds a head and a tail chunk.

    ``out = softmax(scale * q k^T) v`` over what is visible, in float32 at least.

    Args:
        q_BSHD: queries of this rank's tokens, in the order of `positions_of`; shape
            ``(batch, tokens, heads, size)``.
        k_BSGD: keys; ``heads`` is a multiple of their number of heads.
        v_BSGD: values, shaped as the keys.
        group: the ranks that hold the sequences, each with as many tokens.
        visibility: limits beside causality.
        scale: of the scores; 1 / sqrt(size) unless given.

    Returns:
        Shaped as the queries, of their type.

    Raises:
        LayoutError: shapes that do not fit; before anything is sent.
        CollectiveError: another rank failed.

    Note:
        Collective. Deterministic: blocks are merged in the order in which they come round.

    Example:
        >>> q = torch.randn(1, 5, 4, 8)
        >>> ring_attention(q, q[:, :, :2], q[:, :, :2], Group()).shape
        torch.Size([1, 5, 4, 8])
    """
    _check(q_BSHD, k_BSGD, v_BSGD)
    seen = visibility or Visibility()
    length = q_BSHD.shape[1] * group.size
    if seen.documents_BT is not None and seen.documents_BT.shape != (len(q_BSHD), length):
        raise LayoutError(
            f"documents of shape {list(seen.documents_BT.shape)} do not number the tokens of "
            f"{len(q_BSHD)} sequences of {length}; give those of the whole sequences"
        )
    factor = scale if scale is not None else q_BSHD.shape[-1] ** -0.5
    ring = _Ring(group, seen, length, factor)
    heads, kinds = q_BSHD.shape[2], k_BSGD.shape[2]
    q_BSGRD = q_BSHD.unflatten(2, (kinds, heads // kinds))
    out_BSGRD: Tensor = _RingAttention.apply(q_BSGRD, k_BSGD, v_BSGD, ring)
    return out_BSGRD.flatten(2, 3)


class _Pair(NamedTuple):
    """A chunk of this rank's queries and a chunk of the keys that are here."""

    queries: slice
    keys: slice
    mask: Tensor | None


@dataclass(frozen=True)
class _Ring:
    """What the forward and the backward pass have in common."""

    group: Group
    visibility: Visibility
    length: int
    scale: float

    def pairs(self, step: int, device: torch.device) -> Iterator[_Pair]:
        """Yield the pairs of chunks that see each other, when `step` blocks have come by."""
        size, index = self.group.size, self.group.index
        of_queries = positions_of(self.length, index, size).to(device)
        of_keys = positions_of(self.length, (index - step) % size, size).to(device)
        for queries in self._chunks():
            for keys in self._chunks():
                where = of_queries[queries], of_keys[keys]
                if not self.visibility.none_of(*where):
                    yield _Pair(queries, keys, self.visibility.mask(*where))

    def _chunks(self) -> list[slice]:
        held = self.length // self.group.size
        if self.group.size == 1:
            return [slice(0, held)] if held else []
        return [slice(0, held // 2), slice(held // 2, held)]

    def shift(self, tensors: list[Tensor]) -> Pending[list[Tensor]]:
        """Start passing tensors on to the next rank."""
        return start_shift(tensors, self.group)


def _scores(q_BQGRD: Tensor, k_BKGD: Tensor, pair: _Pair, scale: float) -> Tensor:
    """Return scores of shape ``(B, G, R, Q, K)``, minus infinity where nothing is visible."""
    s_BGRQK = torch.einsum("bqgrd,bkgd->bgrqk", q_BQGRD, k_BKGD) * scale
    if pair.mask is None:
        return s_BGRQK
    return s_BGRQK.masked_fill(~pair.mask[:, None, None], -math.inf)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: _Ring) -> Tensor:
        exact = torch.promote_types(q.dtype, torch.float32)
        q_BSGRD, here = q.to(exact), [k, v]
        top_BSGR = q_BSGRD.new_full(q.shape[:-1], torch.finfo(exact).min)
        sum_BSGR = torch.zeros_like(top_BSGR)
        out_BSGRD = torch.zeros_like(q_BSGRD)
        for step in range(ring.group.size):
            last = step == ring.group.size - 1
            coming = None if last else ring.shift(here)
            k_BSGD, v_BSGD = (x.to(exact) for x in here)
            for pair in ring.pairs(step, q.device):
                mine, theirs = pair.queries, pair.keys
                s_BGRQK = _scores(q_BSGRD[:, mine], k_BSGD[:, theirs], pair, ring.scale)
                top = torch.maximum(s_BGRQK.amax(-1).permute(0, 3, 1, 2), top_BSGR[:, mine])
                p_BGRQK = (s_BGRQK - top.permute(0, 2, 3, 1)[..., None]).exp_()
                old = (top_BSGR[:, mine] - top).exp_()
                add = torch.einsum("bgrqk,bkgd->bqgrd", p_BGRQK, v_BSGD[:, theirs])
                out_BSGRD[:, mine] = out_BSGRD[:, mine] * old[..., None] + add
                sum_BSGR[:, mine] = sum_BSGR[:, mine] * old + p_BGRQK.sum(-1).permute(0, 3, 1, 2)
                top_BSGR[:, mine] = top
            here = here if coming is None else coming.wait()
        out_BSGRD /= sum_BSGR[..., None]
        ctx.save_for_backward(q, k, v, out_BSGRD, top_BSGR + sum_BSGR.log())
        ctx.ring = ring
        return out_BSGRD.to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out_BSGRD, lse_BSGR = ctx.saved_tensors
        ring: _Ring = ctx.ring
        exact = out_BSGRD.dtype
        q_BSGRD, do_BSGRD, here = q.to(exact), gradient.to(exact), [k, v]
        delta_BSGR = (do_BSGRD * out_BSGRD).sum(-1)
        dq_BSGRD = torch.zeros_like(q_BSGRD)
        flying: Pending[list[Tensor]] | None = None
        for step in range(ring.group.size):
            last = step == ring.group.size - 1
            coming = None if last else ring.shift(here)
            k_BSGD, v_BSGD = (x.to(exact) for x in here)
            dk_BSGD, dv_BSGD = torch.zeros_like(k_BSGD), torch.zeros_like(v_BSGD)
            for pair in ring.pairs(step, q.device):
                mine, theirs = pair.queries, pair.keys
                s_BGRQK = _scores(q_BSGRD[:, mine], k_BSGD[:, theirs], pair, ring.scale)
                p_BGRQK = (s_BGRQK - lse_BSGR[:, mine].permute(0, 2, 3, 1)[..., None]).exp_()
                dv_BSGD[:, theirs] += torch.einsum("bgrqk,bqgrd->bkgd", p_BGRQK, do_BSGRD[:, mine])
                dp_BGRQK = torch.einsum("bqgrd,bkgd->bgrqk", do_BSGRD[:, mine], v_BSGD[:, theirs])
                dp_BGRQK -= delta_BSGR[:, mine].permute(0, 2, 3, 1)[..., None]
                ds_BGRQK = dp_BGRQK.mul_(p_BGRQK).mul_(ring.scale)
                dq_BSGRD[:, mine] += torch.einsum("bgrqk,bkgd->bqgrd", ds_BGRQK, k_BSGD[:, theirs])
                dk_BSGD[:, theirs] += torch.einsum("bgrqk,bqgrd->bkgd", ds_BGRQK, q_BSGRD[:, mine])
            # the gradients come one step behind their blocks, and home with a last step
            if flying is not None:
                carried = flying.wait()
                dk_BSGD, dv_BSGD = dk_BSGD + carried[0], dv_BSGD + carried[1]
            flying = ring.shift([dk_BSGD, dv_BSGD])
            here = here if coming is None else coming.wait()
        assert flying is not None, "a ring has at least one rank"
        dk, dv = flying.wait()
        return dq_BSGRD.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


def _check(q_BSHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor) -> None:
    (batch, tokens, heads, size), kinds = q_BSHD.shape, k_BSGD.shape[2]
    if k_BSGD.shape != v_BSGD.shape or k_BSGD.shape != (batch, tokens, kinds, size):
        raise LayoutError(
            f"queries of shape {list(q_BSHD.shape)} cannot attend to keys {list(k_BSGD.shape)} and "
            f"values {list(v_BSGD.shape)}"
        )
    if heads % kinds:
        raise LayoutError(f"{heads} heads of queries cannot share {kinds} heads of keys")
