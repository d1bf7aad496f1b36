"""Tensor parallelism with sequence parallelism: what changes hands around a sharded layer.

Between layers a rank of the TP group has a piece of each sequence, consecutive pieces in the order
of the ranks. A sharded layer gathers the pieces, works on all tokens with its slice of the weights,
and gives back the sum of what all slices make, each rank getting its own piece:

    x_BTD -> gather_sequence -> x_BSD -> slice of the layer -> y_BSD -> scatter_sequence -> y_BTD

Pieces need not be equally long. What is whole on every rank of the group afterwards (logits, the
loss) counts once: its gradient is the same on all of them, and each goes on with its own slice.

Shapes: B rows, S tokens of each on the whole group, T on this rank, D width of a token, V entries
of this rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe.errors import LayoutError
from moe.parallel.collectives import all_gather_rows, reduce_scatter_rows
from moe.parallel.groups import Group

__all__ = [
    "gather_last",
    "gather_sequence",
    "own_share",
    "own_slice",
    "scatter_sequence",
    "shares",
]


def shares(total: int, parts: int) -> list[int]:
    """Return sizes as even as can be, larger ones first.

    Example:
        >>> shares(7, 3)
        [3, 2, 2]
    """
    size, longer = divmod(total, parts)
    return [size + (part < longer) for part in range(parts)]


def own_share(total: int, group: Group) -> slice:
    """Return which of so many tokens a rank of the group has.

    Args:
        total: tokens of the whole group, S.
        group: the TP group.
    """
    sizes = shares(total, group.size)
    first = sum(sizes[: group.index])
    return slice(first, first + sizes[group.index])


def own_slice(name: str, width: int, group: Group) -> slice:
    """Return which part of an evenly cut dimension a rank of the group has.

    Args:
        name: of the dimension, for people.
        width: of all parts together.
        group: the ranks that share it.

    Raises:
        LayoutError: the dimension cannot be cut evenly.
    """
    if width % group.size:
        raise LayoutError(f"{name}={width} does not divide over {group.size} ranks")
    part = width // group.size
    return slice(group.index * part, (group.index + 1) * part)


def gather_sequence(x_BTD: Tensor, tokens: int, group: Group) -> Tensor:
    """Return x_BSD, all pieces of each sequence; the gradient is summed and scattered.

    Args:
        x_BTD: this rank's piece.
        tokens: S.
        group: the TP group.
    """
    if group.size == 1:
        return x_BTD
    sizes = shares(tokens, group.size)
    return all_gather_rows(x_BTD.transpose(0, 1), sizes, group).transpose(0, 1)


def scatter_sequence(x_BSD: Tensor, group: Group) -> Tensor:
    """Return y_BTD, this rank's piece of the sum over the group; the gradient is gathered.

    Args:
        x_BSD: this rank's part of the sum.
        group: the TP group.
    """
    if group.size == 1:
        return x_BSD
    sizes = shares(x_BSD.shape[1], group.size)
    return reduce_scatter_rows(x_BSD.transpose(0, 1), sizes, group).transpose(0, 1)


def gather_last(x: Tensor, group: Group) -> Tensor:
    """Return the slices of the last dimension side by side, the same on every rank.

    Each rank goes on with the same result, so that the gradient counts once and is only cut.

    Args:
        x: this rank's slice, as wide on every rank.
        group: the TP group.
    """
    if group.size == 1:
        return x
    whole: Tensor = _GatherLast.apply(x, group)
    return whole


class _GatherLast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group, ctx.width = group, x.shape[-1]
        widths = [ctx.width] * group.size
        return all_gather_rows(x.movedim(-1, 0), widths, group).movedim(0, -1).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.narrow(-1, ctx.group.index * ctx.width, ctx.width).contiguous(), None
