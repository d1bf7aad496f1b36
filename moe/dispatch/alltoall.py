"""Each row travels to the ranks of its expert and nowhere else.

The way of a token, forwards; the gradient takes it backwards, gather and scatter exchanged:

    permute -> all-to-all over EP -> all-gather over ETP -> sort by local expert -> experts
    -> unsort -> reduce-scatter over ETP -> all-to-all over EP -> unpermute

Rows lie by [etp][ep][local expert] when they have arrived, since in the mapping ETP is the inner
axis and its ranks hold the same experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe.dispatch.base import Dispatched, Plan
from moe.parallel.collectives import (
    Pending,
    all_gather_rows,
    exchange_counts,
    gather_counts,
    reduce_scatter_rows,
    start_all_to_all_rows,
)
from moe.parallel.groups import ProcessGroups
from moe.permute import RowOrder, choose_weights, expert_major, permute, unpermute

__all__ = ["AllToAllDispatcher", "ExchangePlan"]


@dataclass(frozen=True, slots=True)
class ExchangePlan(Plan):
    """A plan for rows that go to the ranks of their experts."""

    send_counts: tuple[int, ...]
    """Rows for each rank of the EP group."""

    receive_counts: tuple[int, ...]
    """Rows from each rank of the EP group."""

    shared_counts: tuple[int, ...]
    """Rows that each rank of the ETP group has received."""

    by_expert: RowOrder | None
    """Sorts what has arrived by local expert; None with one local expert."""


class AllToAllDispatcher:
    """The dispatcher of MoE Parallel Folding.

    Args:
        groups: of the mapping.
        num_experts: of the layer, over all ranks.
        weights_travel: send each row's weight along and let the experts apply it, which spares the
            memory of the rows that came back. Otherwise the weights stay, are applied to the rows
            that come back, and nothing but rows and counts is sent.
    """

    def __init__(
        self, groups: ProcessGroups, num_experts: int, *, weights_travel: bool = False
    ) -> None:
        self.ep, self.etp = groups["ep"], groups["etp"]
        self.num_local = groups.dims.local_experts(num_experts)
        self.weights_travel = weights_travel

    def plan(self, order: RowOrder) -> ExchangePlan:
        """Exchange counts: EP x L of them over EP, then the same over ETP."""
        sent_PL = order.counts_E.view(self.ep.size, self.num_local)
        received_PL = exchange_counts(sent_PL, self.ep)
        arrived_RL = gather_counts(received_PL, self.etp).flatten(0, 1)
        per_peer = torch.cat([sent_PL.sum(1), arrived_RL.sum(1)]).tolist()  # the one wait
        arrived = per_peer[self.ep.size :]
        by_etp = [
            tuple(arrived[start : start + self.ep.size])
            for start in range(0, len(arrived), self.ep.size)
        ]
        by_expert, counts_L = _sorting(arrived_RL)
        return ExchangePlan(
            order=order,
            counts_L=counts_L,
            send_counts=tuple(per_peer[: self.ep.size]),
            receive_counts=by_etp[self.etp.index],
            shared_counts=tuple(map(sum, by_etp)),
            by_expert=by_expert,
        )

    def start_dispatch(
        self, x_TD: Tensor, weights_TK: Tensor, plan: ExchangePlan
    ) -> Pending[Dispatched]:
        """Send rows over EP; share and sort them when they have arrived."""
        rows = self._start(permute(x_TD, plan.order), plan)
        if not self.weights_travel:
            return rows.then(lambda r: Dispatched(self._shared(r, plan), plan.counts_L, None))
        weights = self._start(choose_weights(weights_TK, plan.order)[:, None], plan)
        return rows.then(
            lambda r: Dispatched(
                self._shared(r, plan), plan.counts_L, self._shared(weights.wait(), plan)[:, 0]
            )
        )

    def start_combine(
        self, y_ND: Tensor, weights_TK: Tensor, plan: ExchangePlan
    ) -> Pending[Tensor]:
        """Add up the parts over ETP, send rows back over EP, add up those of each token."""
        if plan.by_expert is not None:
            y_ND = unpermute(y_ND, plan.by_expert)
        mine_ND = reduce_scatter_rows(y_ND, plan.shared_counts, self.etp)
        back = start_all_to_all_rows(mine_ND, plan.receive_counts, plan.send_counts, self.ep)
        weights_N = None if self.weights_travel else choose_weights(weights_TK, plan.order)
        return back.then(lambda rows_ND: unpermute(rows_ND, plan.order, weights_N))

    def _start(self, rows_ND: Tensor, plan: ExchangePlan) -> Pending[Tensor]:
        return start_all_to_all_rows(rows_ND, plan.send_counts, plan.receive_counts, self.ep)

    def _shared(self, rows_ND: Tensor, plan: ExchangePlan) -> Tensor:
        rows_ND = all_gather_rows(rows_ND, plan.shared_counts, self.etp)
        return rows_ND if plan.by_expert is None else permute(rows_ND, plan.by_expert)


def _sorting(arrived_RL: Tensor) -> tuple[RowOrder | None, Tensor]:
    """Return the order by local expert of rows that lie by source and expert, and its counts."""
    if arrived_RL.shape[1] == 1:
        return None, arrived_RL.sum(0)
    index_N, counts_L = expert_major(arrived_RL)
    place_N = torch.empty_like(index_N)
    place_N[index_N] = torch.arange(index_N.numel(), device=index_N.device)
    return RowOrder(index_N, index_N, place_N[:, None], counts_L), counts_L
