"""Embedding, logits and cross-entropy with the vocabulary cut over the TP group.

No rank ever has the logits of the whole vocabulary unless they are asked for: the loss needs, for
each token, the largest logit, the sum of the exponentials and the label's logit, and only these are
exchanged.

Shapes: B rows, T tokens of a rank, S of its TP group, N = B S, D width of a token, V entries of the
vocabulary on this rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from moe.norm import RMSNorm
from moe.parallel.collectives import all_reduce_largest, all_reduce_sum
from moe.parallel.groups import Group
from moe.parallel.tensor import gather_last, gather_sequence, own_slice, scatter_sequence

__all__ = ["UNLABELLED", "Embedding", "Head", "cross_entropy"]

UNLABELLED = -100
"""Label of a token that is not predicted, as elsewhere in torch."""


class Embedding(nn.Module):
    """A rank's rows of the embedding.

    Args:
        vocabulary: entries over all ranks.
        hidden: width of a token, D.
        group: the TP group.
        device: where the weight lives.
        dtype: of the weight.

    Raises:
        LayoutError: the vocabulary does not divide over the group.

    Example:
        >>> from moe.parallel.groups import Group
        >>> Embedding(10, 4, Group())(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 4])
    """

    def __init__(
        self,
        vocabulary: int,
        hidden: int,
        group: Group,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.group, own = group, own_slice("vocabulary", vocabulary, group)
        self.first = own.start
        self.w_VD = _weight(own, hidden, device, dtype)

    def forward(self, ids_BS: Tensor) -> Tensor:
        """Return x_BTD, this rank's piece of the embedded sequences.

        Args:
            ids_BS: the same on the whole TP group.
        """
        if self.group.size == 1:
            return functional.embedding(ids_BS, self.w_VD)
        own_BS, mine_BS = _own(ids_BS, self.first, len(self.w_VD))
        part_BSD = functional.embedding(own_BS, self.w_VD)
        return scatter_sequence(part_BSD.masked_fill(~mine_BS.unsqueeze(-1), 0.0), self.group)

    def cuts(self) -> dict[str, int | None]:
        """Return along which dimension each parameter is cut over the TP group."""
        return {"w_VD": 0}


class Head(nn.Module):
    """The last norm, and a rank's rows of the output projection.

    Args:
        vocabulary: entries over all ranks.
        hidden: width of a token, D.
        eps: of the norm.
        group: the TP group.
        own_weight: False where the weight is the embedding's and is given to each call.
        device: where the weights live.
        dtype: of the weights.

    Raises:
        LayoutError: the vocabulary does not divide over the group.
    """

    w_VD: nn.Parameter | None

    def __init__(
        self,
        vocabulary: int,
        hidden: int,
        eps: float,
        group: Group,
        own_weight: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.group, own = group, own_slice("vocabulary", vocabulary, group)
        self.first = own.start
        self.norm = RMSNorm(hidden, eps, device, dtype)
        weight = _weight(own, hidden, device, dtype) if own_weight else None
        self.register_parameter("w_VD", weight)

    def forward(self, x_BTD: Tensor, tokens: int, w_VD: Tensor | None = None) -> Tensor:
        """Return logits_BSV of this rank's entries for all tokens of the TP group.

        Args:
            x_BTD: this rank's piece of the sequences.
            tokens: S.
            w_VD: the embedding's weight, where the head has none.
        """
        weight_VD = self.w_VD if w_VD is None else w_VD
        assert weight_VD is not None, "a head without a weight is given the embedding's"
        x_BSD = gather_sequence(self.norm(x_BTD), tokens, self.group)
        return functional.linear(x_BSD, weight_VD)

    def whole(self, logits_BSV: Tensor) -> Tensor:
        """Return the logits of the whole vocabulary, the same on every rank of the TP group."""
        return gather_last(logits_BSV, self.group)

    def losses(self, logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
        """Return the loss of every token, the same on every rank; see `cross_entropy`."""
        labels_N = labels_BS.reshape(-1)
        losses_N = cross_entropy(logits_BSV.flatten(0, 1), labels_N, self.first, self.group)
        return losses_N.view(labels_BS.shape)

    def cuts(self) -> dict[str, int | None]:
        """Return along which dimension each parameter is cut over the TP group."""
        cuts: dict[str, int | None] = {"norm.weight_D": None}
        return cuts if self.w_VD is None else {**cuts, "w_VD": 0}


def cross_entropy(logits_NV: Tensor, labels_N: Tensor, first: int, group: Group) -> Tensor:
    """Return logsumexp(logits) - logit[label] of each token over the vocabulary of a group.

    Computed in float32 at least. The result is the same on every rank and counts once: a loss made
    of it is not multiplied by the number of ranks.

    Args:
        logits_NV: of this rank's entries.
        labels_N: numbers in the whole vocabulary, or `UNLABELLED`, for which the loss is 0.
        first: number of this rank's first entry.
        group: the ranks that share the vocabulary.

    Example:
        >>> from moe.parallel.groups import Group
        >>> logits = torch.tensor([[0.0, 0.0], [5.0, 1.0]])
        >>> losses = cross_entropy(logits, torch.tensor([1, -100]), 0, Group())
        >>> [round(loss, 4) for loss in losses.tolist()]
        [0.6931, 0.0]
    """
    losses_N: Tensor = _CrossEntropy.apply(logits_NV, labels_N, first, group)
    return losses_N


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor, first: int, group: Group) -> Tensor:
        exact_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
        own_N, mine_N = _own(labels_N, first, logits_NV.shape[1])
        top_N = all_reduce_largest(exact_NV.max(dim=1).values, group)
        shifted_NV = exact_NV - top_N.unsqueeze(1)
        picked_N = shifted_NV.gather(1, own_N.unsqueeze(1)).squeeze(1).masked_fill(~mine_N, 0.0)
        parts_NV = shifted_NV.exp_()
        sums_N, picked_N = all_reduce_sum(torch.stack((parts_NV.sum(dim=1), picked_N)), group)
        unlabelled_N = labels_N == UNLABELLED
        ctx.save_for_backward(parts_NV.div_(sums_N.unsqueeze(1)), own_N, mine_N, unlabelled_N)
        ctx.dtype = logits_NV.dtype
        return (sums_N.log() - picked_N).masked_fill(unlabelled_N, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_N: Tensor) -> tuple[Tensor, None, None, None]:
        probabilities_NV, own_N, mine_N, unlabelled_N = ctx.saved_tensors
        gradient_N1 = gradient_N.masked_fill(unlabelled_N, 0.0).unsqueeze(1)
        gradient_NV = probabilities_NV * gradient_N1
        hit_N1 = -gradient_N1.masked_fill(~mine_N.unsqueeze(1), 0.0)
        gradient_NV.scatter_add_(1, own_N.unsqueeze(1), hit_N1)
        return gradient_NV.to(ctx.dtype), None, None, None


def _own(ids: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Return numbers among this rank's entries, 0 where they are not, and where they are."""
    own = ids - first
    mine = (own >= 0) & (own < count)
    return own.masked_fill(~mine, 0), mine


def _weight(
    own: slice, hidden: int, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Parameter:
    weight = torch.empty(own.stop - own.start, hidden, device=device, dtype=dtype)
    return nn.Parameter(nn.init.normal_(weight, std=hidden**-0.5))
