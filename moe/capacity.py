"""Which choices are carried out when an expert takes only so many tokens.

The decision is a pure function of choices and weights. Whose tokens compete is up to the caller:
those of one rank (sub-sequence), or those of all ranks that hold the sequence, gathered in the
order of the sequence (full-sequence).
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from moe.config import By
from moe.errors import RoutingError

__all__ = ["capacity", "keep"]


def capacity(tokens: int, top_k: int, experts: int, factor: float) -> int:
    """Return how many tokens an expert takes: ceil(factor * tokens * top_k / experts).

    It is never above the number of tokens, since a token goes to an expert at most once. `factor`
    means its decimal digits: 1.1 times 10 tokens is 11, not a rounding error more.

    Args:
        tokens: that compete.
        top_k: choices of each.
        experts: how many there are in all.
        factor: capacity over mean load.

    Example:
        >>> capacity(16, 2, 8, 0.5), capacity(16, 2, 8, 0.6), capacity(10, 1, 1, 1.1)
        (2, 3, 10)
    """
    return min(tokens, math.ceil(Fraction(repr(float(factor))) * tokens * top_k / experts))


def keep(experts_TK: Tensor, weights_TK: Tensor, num_experts: int, limit: int, by: By) -> Tensor:
    """Return which choices are within every expert's capacity.

    By position, an expert serves the first tokens that chose it, in the order of the rows; by
    probability, those of the largest weights, ties to the earlier token. Both are stable: the same
    rows give the same answer on every device.

    Args:
        experts_TK: chosen experts; -1 (padding) is never kept and takes nobody's place.
        weights_TK: their weights; not used by position.
        num_experts: E.
        limit: of tokens per expert, from `capacity`.
        by: the policy.

    Returns:
        bool of shape (tokens, choices), without a gradient.

    Example:
        >>> experts, weights = torch.tensor([[0], [0], [0]]), torch.tensor([[0.1], [0.9], [0.5]])
        >>> keep(experts, weights, 1, 2, "probability").flatten().tolist()
        [False, True, True]
        >>> keep(experts, weights, 1, 2, "position").flatten().tolist()
        [True, True, False]
    """
    if limit < 0:
        raise RoutingError(f"limit={limit} is not a number of tokens; give 0 or more")
    chosen = torch.where(experts_TK >= 0, experts_TK, num_experts).flatten()
    order = torch.arange(chosen.numel(), device=chosen.device)
    if by == "probability":
        order = weights_TK.detach().flatten().argsort(descending=True, stable=True)
    # the second sort is stable, so within an expert the order of the first one stands
    order = order[chosen[order].argsort(stable=True)]
    sizes = torch.zeros(num_experts + 1, dtype=torch.int64, device=chosen.device)
    sizes.scatter_add_(0, chosen, torch.ones_like(chosen))
    starts = sizes.cumsum(0) - sizes
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(order.numel(), device=order.device) - starts[chosen[order]]
    return ((ranks < limit) & (chosen < num_experts)).view_as(experts_TK)
