"""The definitions: rows between token order and expert order, and activations, in plain torch.

T tokens of width D, N rows, K choices a token. -1 means nothing: a row without a token is zero, and
a choice without a row adds nothing. Sums run over the choices in order, in float32 (float64 for
float64), and are rounded once; nothing depends on the order in which threads arrive.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "NAME",
    "activate_rows",
    "activate_rows_back",
    "dot_rows",
    "gather_rows",
    "sum_rows",
]

NAME = "torch"


def gather_rows(x_TD: Tensor, source_N: Tensor, weights_N: Tensor | None = None) -> Tensor:
    """Return row_n = w_n x[source_n].

    Args:
        x_TD: tokens.
        source_N: token of each row, int64; -1: the row is zero.
        weights_N: factor of each row; None: one.

    Example:
        >>> gather_rows(torch.tensor([[1.0], [2.0]]), torch.tensor([1, -1, 0])).flatten().tolist()
        [2.0, 0.0, 1.0]
    """
    if x_TD.shape[0] == 0:
        return x_TD.new_zeros(source_N.numel(), x_TD.shape[1])
    rows_ND = x_TD.index_select(0, source_N.clamp_min(0))
    if weights_N is not None:
        rows_ND = (_wide(rows_ND) * weights_N.unsqueeze(1)).to(x_TD.dtype)
    return _without(rows_ND, source_N)


def sum_rows(rows_ND: Tensor, position_TK: Tensor, weights_N: Tensor | None = None) -> Tensor:
    """Return x_t = sum_k w[position_tk] rows[position_tk].

    Args:
        rows_ND: rows.
        position_TK: row of each choice, int64; -1: none.
        weights_N: factor of each row; None: one.

    Example:
        >>> rows = torch.tensor([[1.0], [2.0], [3.0]])
        >>> sum_rows(rows, torch.tensor([[0, 2], [-1, 1]])).flatten().tolist()
        [4.0, 2.0]
    """
    tokens, width = position_TK.shape[0], rows_ND.shape[1]
    sums_TD = rows_ND.new_zeros(tokens, width, dtype=_wide_type(rows_ND))
    if rows_ND.shape[0] == 0:
        return sums_TD.to(rows_ND.dtype)
    for position_T in position_TK.unbind(dim=1):
        some_TD = rows_ND.index_select(0, position_T.clamp_min(0))
        if weights_N is not None:
            some_TD = _wide(some_TD) * weights_N[position_T.clamp_min(0)].unsqueeze(1)
        sums_TD += _without(some_TD, position_T)
    return sums_TD.to(rows_ND.dtype)


def dot_rows(x_TD: Tensor, rows_ND: Tensor, source_N: Tensor) -> Tensor:
    """Return d_n = x[source_n] . rows_n, 0 for a row without a token.

    Args:
        x_TD: tokens.
        rows_ND: rows.
        source_N: token of each row, int64; -1: none.

    Returns:
        Float32 (float64 for float64) of shape (N,).

    Example:
        >>> x, rows = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]])
        >>> dot_rows(x, rows, torch.tensor([0, -1])).tolist()
        [11.0, 0.0]
    """
    tokens_ND = gather_rows(x_TD, source_N)
    dots_N = (_wide(tokens_ND) * _wide(rows_ND)).sum(dim=1)
    return dots_N.masked_fill(source_N < 0, 0.0)


def activate_rows(h_NG: Tensor, weights_N: Tensor | None = None, *, gated: bool = True) -> Tensor:
    """Return w_n silu(gate_n) * up_n, or w_n relu(h_n)^2, rounded once.

    Args:
        h_NG: gate and up side by side; without a gate, h.
        weights_N: factor of each row; None: one.
        gated: which of the two.

    Example:
        >>> activate_rows(torch.tensor([[-1.0, 2.0]]), torch.tensor([0.5]), gated=False).tolist()
        [[0.0, 2.0]]
    """
    h = _wide(h_NG)
    if gated:
        gate, up = h.chunk(2, dim=1)
        a_NF = functional.silu(gate).mul_(up)
    else:
        a_NF = functional.relu(h).square()
    if weights_N is not None:
        a_NF.mul_(weights_N.unsqueeze(1))
    return a_NF.to(h_NG.dtype)


def activate_rows_back(
    grad_NF: Tensor, h_NG: Tensor, weights_N: Tensor | None = None, *, gated: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of `activate_rows` for h and for the weights.

    Args:
        grad_NF: gradient of its result.
        h_NG: its input.
        weights_N: its weights; None: one, and no gradient for them.
        gated: as it was.
    """
    h, grad = _wide(h_NG), _wide(grad_NF)
    grad_h = torch.empty_like(h)
    # in place where it can be: on a CPU, fresh memory costs more than the arithmetic
    if gated:
        (gate, up), (of_gate, of_up) = h.chunk(2, dim=1), grad_h.chunk(2, dim=1)
        silu = functional.silu(gate)
        torch.mul(grad, silu, out=of_up)
        dots_N = (of_up * up).sum(dim=1) if weights_N is not None else None
        outer = torch.mul(grad, up, out=silu)
        torch.ops.aten.silu_backward.grad_input(outer, gate, grad_input=of_gate)
    else:
        root = functional.relu(h)
        torch.mul(grad, root, out=grad_h)
        dots_N = (grad_h * root).sum(dim=1) if weights_N is not None else None
        grad_h.mul_(2)
    if weights_N is None or dots_N is None:
        return grad_h.to(h_NG.dtype), None
    grad_h.mul_(weights_N.unsqueeze(1))
    return grad_h.to(h_NG.dtype), dots_N.to(weights_N.dtype)


def _without(rows_ND: Tensor, where_N: Tensor) -> Tensor:
    """Set rows of -1 to zero, whatever they hold."""
    absent_N = where_N < 0
    return rows_ND.masked_fill(absent_N.unsqueeze(1), 0.0) if bool(absent_N.any()) else rows_ND


def _wide_type(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _wide(x: Tensor) -> Tensor:
    return x.to(_wide_type(x))
