"""Every rank gets all tokens and picks its experts' rows: simple, wasteful, the others' oracle."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe.dispatch.base import Dispatched, Plan
from moe.parallel.collectives import (
    Pending,
    all_gather_rows,
    gather_counts,
    reduce_scatter_rows,
)
from moe.parallel.groups import Group, ProcessGroups
from moe.permute import RowOrder, choose_weights, permute, row_order, unpermute

__all__ = ["AllGatherDispatcher", "GatherPlan"]


@dataclass(frozen=True, slots=True)
class GatherPlan(Plan):
    """A plan for tokens that all go everywhere."""

    tokens: tuple[int, ...]
    """Tokens of each rank."""

    picked: RowOrder
    """The local experts' rows out of everybody's tokens."""


class AllGatherDispatcher:
    """Gather tokens over ETP x EP, work on the own experts' part, reduce-scatter the sums.

    A row of padding is not sent: it is not a token.

    Args:
        groups: of the mapping.
        num_experts: of the layer, over all ranks.
    """

    def __init__(self, groups: ProcessGroups, num_experts: int) -> None:
        self.group: Group = groups["ep_etp"]
        self.num_local = groups.dims.local_experts(num_experts)
        self.first = groups["ep"].index * self.num_local

    def plan(self, order: RowOrder) -> GatherPlan:
        """Gather everybody's choices."""
        experts_TK = _experts_of(order)
        own = torch.tensor([len(experts_TK)], device=experts_TK.device)
        tokens = tuple(gather_counts(own, self.group).flatten().tolist())
        everyones_TK = all_gather_rows(experts_TK, tokens, self.group)
        here_TK = everyones_TK - self.first
        mine_TK = (here_TK >= 0) & (here_TK < self.num_local)
        picked = row_order(here_TK, mine_TK, self.num_local)
        return GatherPlan(order, picked.counts_E, tokens, picked)

    def start_dispatch(
        self, x_TD: Tensor, weights_TK: Tensor, plan: GatherPlan
    ) -> Pending[Dispatched]:
        """Gather everybody's tokens and weights; pick the local experts' rows."""
        x_AD = all_gather_rows(x_TD, plan.tokens, self.group)
        weights_AK = all_gather_rows(weights_TK, plan.tokens, self.group)
        dispatched = Dispatched(
            permute(x_AD, plan.picked), plan.counts_L, choose_weights(weights_AK, plan.picked)
        )
        return Pending(lambda: dispatched)

    def start_combine(self, y_ND: Tensor, weights_TK: Tensor, plan: GatherPlan) -> Pending[Tensor]:
        """Add up everybody's tokens over the local experts, then over the ranks."""
        y_AD = unpermute(y_ND, plan.picked)
        y_TD = reduce_scatter_rows(y_AD, plan.tokens, self.group)
        return Pending(lambda: y_TD)


def _experts_of(order: RowOrder) -> Tensor:
    """Return the expert of each choice, -1 where it was dropped."""
    experts = torch.arange(order.counts_E.numel(), device=order.counts_E.device)
    expert_N = experts.repeat_interleave(order.counts_E)
    real_N = order.slot_N >= 0
    experts_TK = torch.full_like(order.position_TK, -1)
    experts_TK.view(-1)[order.slot_N[real_N]] = expert_N[real_N]
    return experts_TK
