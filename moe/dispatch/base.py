"""What a dispatcher is: the way of tokens to the ranks of their experts, and back.

A layer asks for four things, in this order: a `plan` for an order of rows (the only exchange of
integers), the rows of the local experts, and, when these have done their work, each token's sum.
A plan holds no tensor that has a gradient and is never changed; a dispatcher has neither parameters
nor state, so that one serves any number of micro-batches at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from moe.parallel.collectives import Pending
from moe.permute import RowOrder

__all__ = ["Dispatched", "Dispatcher", "Plan", "combine", "dispatch"]


@dataclass(frozen=True, slots=True)
class Plan:
    """How the rows of one set of tokens travel."""

    order: RowOrder
    """The rows of this rank's tokens, by expert, of all experts."""

    counts_L: Tensor | Sequence[int]
    """Rows that arrive for each local expert."""


@dataclass(frozen=True, slots=True)
class Dispatched:
    """What the local experts work on."""

    rows_ND: Tensor
    """Rows, those of a local expert side by side."""

    counts_L: Tensor | Sequence[int]
    """Rows of each local expert."""

    weights_N: Tensor | None
    """Factor of each row, to be applied by the experts; None where `combine` applies it."""


AnyPlan = TypeVar("AnyPlan", bound=Plan)


class Dispatcher(Protocol, Generic[AnyPlan]):
    """One way of dispatching; all ranks that share the experts call it alike."""

    def plan(self, order: RowOrder) -> AnyPlan:
        """Tell the other ranks how many rows go where.

        Args:
            order: the rows of this rank's tokens, by expert, of all experts.
        """
        ...

    def start_dispatch(
        self, x_TD: Tensor, weights_TK: Tensor, plan: AnyPlan
    ) -> Pending[Dispatched]:
        """Send tokens to the ranks of their experts.

        Args:
            x_TD: this rank's tokens.
            weights_TK: weights of their choices.
            plan: made for them.
        """
        ...

    def start_combine(self, y_ND: Tensor, weights_TK: Tensor, plan: AnyPlan) -> Pending[Tensor]:
        """Bring rows back and add up those of each token.

        Args:
            y_ND: what the experts made of the rows; under expert tensor parallelism, this rank's
                part of the sum.
            weights_TK: weights of the choices.
            plan: the one that the rows came with.

        Returns:
            y_TD; 0 for a token all of whose choices were dropped.
        """
        ...


def dispatch(
    dispatcher: Dispatcher[AnyPlan], x_TD: Tensor, weights_TK: Tensor, order: RowOrder
) -> tuple[Dispatched, AnyPlan]:
    """Plan, send, and wait."""
    plan = dispatcher.plan(order)
    return dispatcher.start_dispatch(x_TD, weights_TK, plan).wait(), plan


def combine(
    dispatcher: Dispatcher[AnyPlan], y_ND: Tensor, weights_TK: Tensor, plan: AnyPlan
) -> Tensor:
    """Send back, and wait."""
    return dispatcher.start_combine(y_ND, weights_TK, plan).wait()
