"""Tokens to expert order and back.

`row_order` decides where every row goes (integers only); `permute` and `unpermute` move the rows,
each the other's transpose. Both are deterministic: a token's rows are added in the order of its
choices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe.errors import RoutingError
from moe.kernels import kernels

__all__ = [
    "RowOrder",
    "choose_weights",
    "expert_major",
    "pad_to_capacity",
    "pad_to_multiple",
    "permute",
    "row_order",
    "unpermute",
]


@dataclass(frozen=True, slots=True)
class RowOrder:
    """Which choice of which token each of N rows holds; rows of the same expert are neighbours."""

    slot_N: Tensor
    """Choice of each row, int64: ``token * K + k``; -1: padding, a row of zeros."""

    source_N: Tensor
    """Token of each row, int64; -1: padding."""

    position_TK: Tensor
    """Row of each choice, int64; -1: dropped."""

    counts_E: Tensor
    """Rows of each expert, int64, padding included."""


def row_order(experts_TK: Tensor, kept_TK: Tensor | None, num_experts: int) -> RowOrder:
    """Sort choices by expert, those of the same expert in the order of the tokens.

    Args:
        experts_TK: chosen experts.
        kept_TK: which choices get a row; None: all, which saves a wait for the device.
        num_experts: E; without `kept_TK`, every choice is in [0, E).

    Example:
        >>> order = row_order(torch.tensor([[1, 0], [0, 2]]), None, 3)
        >>> order.source_N.tolist(), order.counts_E.tolist()
        ([0, 1, 0, 1], [2, 1, 1])
    """
    tokens, choices = experts_TK.shape
    key = experts_TK if kept_TK is None else torch.where(kept_TK, experts_TK, num_experts)
    # narrow keys sort faster, on every device
    key = key.flatten().to(torch.int16 if num_experts < 2**15 else torch.int32)
    key, slot_N = key.sort(stable=True)
    experts = torch.arange(num_experts, dtype=key.dtype, device=key.device)
    ends_E = torch.searchsorted(key, experts, right=True)
    counts_E = ends_E.diff(prepend=ends_E.new_zeros(1))
    rows = tokens * choices if kept_TK is None else int(counts_E.sum())
    slot_N = slot_N[:rows].contiguous()
    position = slot_N.new_full((tokens * choices,), -1)
    position[slot_N] = torch.arange(rows, device=slot_N.device)
    source_N = slot_N.div(max(choices, 1), rounding_mode="floor")
    return RowOrder(slot_N, source_N, position.view(tokens, choices), counts_E)


def pad_to_capacity(order: RowOrder, capacity: int) -> RowOrder:
    """Give every expert exactly `capacity` rows, those too many being zero.

    Args:
        order: of which no expert has more rows.
        capacity: rows per expert.

    Raises:
        RoutingError: an expert has more.

    Example:
        >>> order = row_order(torch.tensor([[1], [1]]), None, 2)
        >>> pad_to_capacity(order, 2).source_N.tolist()
        [-1, -1, 0, 1]
    """
    most = int(order.counts_E.max()) if order.counts_E.numel() else 0
    if most > capacity:
        raise RoutingError(
            f"an expert has {most} rows, more than the capacity of {capacity}; drop first (keep)"
        )
    wanted_E = torch.full_like(order.counts_E, capacity)
    return _spread(order, wanted_E, capacity * wanted_E.numel())


def pad_to_multiple(order: RowOrder, multiple: int) -> RowOrder:
    """Fill every expert's rows up with zeros to a multiple, as block-wise formats need it.

    Args:
        order: any order.
        multiple: of rows, such as 16; experts without a row stay without.

    Example:
        >>> order = row_order(torch.tensor([[1], [1], [0]]), None, 2)
        >>> pad_to_multiple(order, 2).source_N.tolist()
        [2, -1, 0, 1]
    """
    wanted_E = (order.counts_E + multiple - 1).div(multiple, rounding_mode="floor") * multiple
    return _spread(order, wanted_E, int(wanted_E.sum()))


def _spread(order: RowOrder, wanted_E: Tensor, total: int) -> RowOrder:
    """Move rows apart, so that expert e has ``wanted_E[e]`` of them."""
    device = wanted_E.device
    rows = torch.arange(order.slot_N.numel(), device=device)
    shift_E = (wanted_E.cumsum(0) - wanted_E) - (order.counts_E.cumsum(0) - order.counts_E)
    moved_N = rows + shift_E.repeat_interleave(order.counts_E, output_size=rows.numel())
    slot_N = torch.full((total,), -1, dtype=torch.int64, device=device)
    source_N = slot_N.clone()
    slot_N[moved_N], source_N[moved_N] = order.slot_N, order.source_N
    # one entry more than there are choices: the one that padding's -1 writes to
    position = torch.full((order.position_TK.numel() + 1,), -1, dtype=torch.int64, device=device)
    position[order.slot_N] = moved_N
    return RowOrder(slot_N, source_N, position[:-1].view_as(order.position_TK), wanted_E)


def expert_major(counts_RL: Tensor) -> tuple[Tensor, Tensor]:
    """Return how to bring rows that lie by source rank and expert into the order of experts.

    Args:
        counts_RL: rows from each of R ranks for each of L local experts.

    Returns:
        The index with which to select rows, so that those of an expert are neighbours, by rank;
        and the rows per expert.

    Example:
        >>> index, counts = expert_major(torch.tensor([[2, 3], [1, 4]]))
        >>> index.tolist(), counts.tolist()
        ([0, 1, 5, 2, 3, 4, 6, 7, 8, 9], [3, 7])
    """
    experts = torch.arange(counts_RL.shape[1], device=counts_RL.device)
    expert_N = experts.repeat(counts_RL.shape[0]).repeat_interleave(counts_RL.flatten())
    return expert_N.argsort(stable=True), counts_RL.sum(dim=0)


def permute(x_TD: Tensor, order: RowOrder) -> Tensor:
    """Copy tokens into the rows of an order.

    Args:
        x_TD: tokens.
        order: of these tokens.

    Returns:
        rows_ND; differentiable once.

    Example:
        >>> order = row_order(torch.tensor([[1], [0]]), None, 2)
        >>> permute(torch.tensor([[5.0], [6.0]]), order).flatten().tolist()
        [6.0, 5.0]
    """
    _check_tokens("permute", x_TD.shape[0], order.position_TK.shape[0], "tokens")
    rows_ND: Tensor = _Permute.apply(x_TD, order.source_N, order.position_TK)
    return rows_ND


def unpermute(rows_ND: Tensor, order: RowOrder, weights_N: Tensor | None = None) -> Tensor:
    """Add each token's rows, weighted; the rows of padding are left out, and dropped ones missing.

    Args:
        rows_ND: rows of an order.
        order: the one they were permuted with.
        weights_N: factor of each row, such as from `choose_weights`; None: one.

    Returns:
        x_TD in the dtype of the rows, summed in float32; differentiable once.

    Example:
        >>> order = row_order(torch.tensor([[1, 0]]), None, 2)
        >>> unpermute(torch.tensor([[5.0], [6.0]]), order, torch.tensor([0.5, 2.0])).tolist()
        [[14.5]]
    """
    _check_tokens("unpermute", rows_ND.shape[0], order.source_N.numel(), "rows")
    x_TD: Tensor = _Unpermute.apply(rows_ND, weights_N, order.source_N, order.position_TK)
    return x_TD


def choose_weights(weights_TK: Tensor, order: RowOrder) -> Tensor:
    """Return the weight of each row, 0 for padding; differentiable.

    Args:
        weights_TK: weights of the choices.
        order: of these tokens.
    """
    # every choice is a token of width one that has one row at most
    weights_N1: Tensor = _Permute.apply(
        weights_TK.reshape(-1, 1), order.slot_N, order.position_TK.reshape(-1, 1)
    )
    return weights_N1.squeeze(1)


def _check_tokens(what: str, given: int, wanted: int, unit: str) -> None:
    if given != wanted:
        raise RoutingError(f"{what} got {given} {unit}, but the order is one of {wanted} {unit}")


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, source_N: Tensor, position_TK: Tensor) -> Tensor:
        ctx.save_for_backward(position_TK)
        return kernels(x_TD.device).gather_rows(x_TD, source_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None]:
        (position_TK,) = ctx.saved_tensors
        return kernels(grad_ND.device).sum_rows(grad_ND, position_TK), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_ND: Tensor,
        weights_N: Tensor | None,
        source_N: Tensor,
        position_TK: Tensor,
    ) -> Tensor:
        needs_rows = weights_N is not None and ctx.needs_input_grad[1]
        ctx.save_for_backward(rows_ND if needs_rows else None, weights_N, source_N)
        return kernels(rows_ND.device).sum_rows(rows_ND, position_TK, weights_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        rows_ND, weights_N, source_N = ctx.saved_tensors
        chosen = kernels(grad_TD.device)
        grad_rows = grad_weights = None
        if ctx.needs_input_grad[0]:
            grad_rows = chosen.gather_rows(grad_TD, source_N, weights_N)
        if rows_ND is not None:
            grad_weights = chosen.dot_rows(grad_TD, rows_ND, source_N).to(weights_N.dtype)
        return grad_rows, grad_weights, None, None
