"""No dispatch at all: every expert is here, whole."""

from __future__ import annotations

from torch import Tensor

from moe.dispatch.base import Dispatched, Plan
from moe.parallel.collectives import Pending
from moe.permute import RowOrder, choose_weights, permute, unpermute

__all__ = ["LocalDispatcher"]


class LocalDispatcher:
    """Sort tokens by expert; nothing is sent, and nothing waits for the device.

    Example:
        >>> import torch
        >>> from moe.dispatch.base import combine, dispatch
        >>> from moe.permute import row_order
        >>> order = row_order(torch.tensor([[1], [0]]), None, 2)
        >>> x, weights, here = torch.tensor([[5.0], [6.0]]), torch.ones(2, 1), LocalDispatcher()
        >>> sent, plan = dispatch(here, x, weights, order)
        >>> sent.rows_ND.tolist(), combine(here, sent.rows_ND, weights, plan).tolist()
        ([[6.0], [5.0]], [[5.0], [6.0]])
    """

    def plan(self, order: RowOrder) -> Plan:
        """Return the order as it is."""
        return Plan(order, order.counts_E)

    def start_dispatch(self, x_TD: Tensor, weights_TK: Tensor, plan: Plan) -> Pending[Dispatched]:
        """Sort tokens by expert."""
        weights_N = choose_weights(weights_TK, plan.order)
        dispatched = Dispatched(permute(x_TD, plan.order), plan.counts_L, weights_N)
        return Pending(lambda: dispatched)

    def start_combine(self, y_ND: Tensor, weights_TK: Tensor, plan: Plan) -> Pending[Tensor]:
        """Add up the rows of each token."""
        y_TD = unpermute(y_ND, plan.order)
        return Pending(lambda: y_TD)
