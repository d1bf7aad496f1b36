"""Drop what exceeds the experts' capacity, with the ranks whose tokens compete.

Sub-sequence: the tokens of one rank compete among themselves, and nobody is asked. Full-sequence:
all tokens of the sequences compete, wherever they are; every rank that holds a piece gathers the
choices, takes the same decision, and keeps its part of it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moe.capacity import capacity, keep
from moe.config import CapacityConfig
from moe.parallel.collectives import all_gather_rows, gather_counts
from moe.parallel.groups import Group
from moe.router import Routing

__all__ = ["drop"]


def drop(
    routing: Routing,
    config: CapacityConfig,
    sequence: Group,
    order_T: Tensor | None = None,
    *,
    sequences: int = 1,
) -> tuple[Routing, int]:
    """Return the routing without the choices that no expert has room for.

    The capacity counts all tokens, padding too, so that it does not depend on the data; padding
    takes no place.

    Args:
        routing: of this rank's tokens, equally long pieces of `sequences` sequences.
        config: capacity, whose tokens compete, and how.
        sequence: ranks that hold the pieces, in the order of these unless `order_T` tells another.
        order_T: ascending along each sequence, int64; on all ranks of the group or on none.
        sequences: B.

    Returns:
        The routing, and how many rows per expert this rank can have at most: the capacity, or with
        full-sequence dropping the smaller of the capacity and this rank's tokens. This is what
        `CapacityConfig.pad` fills up to.

    Example:
        >>> from moe.config import RouterConfig
        >>> from moe.router import route
        >>> routing = route(torch.tensor([[2.0, 1.0], [1.0, 0.0]]), RouterConfig(2, 1))
        >>> routing, limit = drop(routing, CapacityConfig(1.0), Group())
        >>> routing.kept_TK.tolist(), limit
        ([[True], [False]], 1)
    """
    experts_TK, weights_TK = routing.experts_TK, routing.weights_TK.detach()
    num_experts = routing.probabilities_TE.shape[1]
    tokens, top_k = experts_TK.shape
    if config.scope == "sub-sequence":
        limit = capacity(tokens, top_k, num_experts, config.factor)
        kept_TK = keep(experts_TK, weights_TK, num_experts, limit, config.by)
        return replace(routing, kept_TK=kept_TK & routing.kept_TK), limit
    own = torch.tensor([tokens], device=experts_TK.device)
    counts = gather_counts(own, sequence).flatten().tolist()
    limit = capacity(sum(counts), top_k, num_experts, config.factor)
    in_order = _by_sequence(counts, sequences, experts_TK.device)
    if order_T is not None:
        along = all_gather_rows(order_T, counts, sequence)[in_order].view(sequences, -1)
        in_order = (
            in_order.view(sequences, -1).gather(1, along.argsort(dim=1, stable=True)).flatten()
        )
    kept_TK = torch.empty(sum(counts), top_k, dtype=torch.bool, device=experts_TK.device)
    kept_TK[in_order] = keep(
        all_gather_rows(experts_TK, counts, sequence)[in_order],
        all_gather_rows(weights_TK, counts, sequence)[in_order],
        num_experts,
        limit,
        config.by,
    )
    first = sum(counts[: sequence.index])
    mine_TK = kept_TK[first : first + tokens] & routing.kept_TK
    return replace(routing, kept_TK=mine_TK), min(limit, tokens)


def _by_sequence(counts: list[int], sequences: int, device: torch.device) -> Tensor:
    """Return the order by sequence, then by rank, of tokens that lie by rank, then by sequence."""
    numbers = torch.arange(sequences, device=device)
    own = [numbers.repeat_interleave(count // sequences) for count in counts]
    return torch.cat(own).argsort(stable=True)
