"""Triton kernels; `moe.kernels.reference` has the definitions. One program a row or token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "NAME",
    "activate_rows",
    "activate_rows_back",
    "dot_rows",
    "gather_rows",
    "sum_rows",
]

NAME = "triton"

WIDEST_BLOCK = 4096


def gather_rows(x_TD: Tensor, source_N: Tensor, weights_N: Tensor | None = None) -> Tensor:
    """Copy, and weigh, one token into each row.

    Args:
        x_TD: tokens.
        source_N: token of each row, int64; -1: the row is zero.
        weights_N: factor of each row; None: one.
    """
    x_TD, count, width = x_TD.contiguous(), source_N.numel(), x_TD.shape[1]
    if not count or not x_TD.numel():
        return x_TD.new_zeros(count, width)
    rows_ND = torch.empty(count, width, dtype=x_TD.dtype, device=x_TD.device)
    weighted = weights_N is not None
    weights = weights_N.contiguous() if weights_N is not None else x_TD
    source_N = source_N.contiguous()
    _gather[(count,)](x_TD, source_N, weights, rows_ND, width, weighted, **_tile(width))
    return rows_ND


def sum_rows(rows_ND: Tensor, position_TK: Tensor, weights_N: Tensor | None = None) -> Tensor:
    """Add, weighted, each token's rows.

    Args:
        rows_ND: rows.
        position_TK: row of each choice, int64; -1: none.
        weights_N: factor of each row; None: one.
    """
    rows_ND, position_TK = rows_ND.contiguous(), position_TK.contiguous()
    (tokens, choices), width = position_TK.shape, rows_ND.shape[1]
    if not tokens or not rows_ND.numel():
        return rows_ND.new_zeros(tokens, width)
    x_TD = torch.empty(tokens, width, dtype=rows_ND.dtype, device=rows_ND.device)
    weighted = weights_N is not None
    weights = weights_N.contiguous() if weights_N is not None else rows_ND
    _sum[(tokens,)](rows_ND, position_TK, weights, x_TD, width, choices, weighted, **_tile(width))
    return x_TD


def dot_rows(x_TD: Tensor, rows_ND: Tensor, source_N: Tensor) -> Tensor:
    """Multiply each row with its token.

    Args:
        x_TD: tokens.
        rows_ND: rows.
        source_N: token of each row, int64; -1: none.
    """
    x_TD, rows_ND, source_N = x_TD.contiguous(), rows_ND.contiguous(), source_N.contiguous()
    count, width = rows_ND.shape
    wide = torch.promote_types(rows_ND.dtype, torch.float32)
    if not rows_ND.numel() or not x_TD.numel():
        return rows_ND.new_zeros(count, dtype=wide)
    dots_N = torch.empty(count, dtype=wide, device=rows_ND.device)
    _dot[(count,)](x_TD, rows_ND, source_N, dots_N, width, **_tile(width))
    return dots_N


def activate_rows(h_NG: Tensor, weights_N: Tensor | None = None, *, gated: bool = True) -> Tensor:
    """Apply the activation, and weigh the rows.

    Args:
        h_NG: gate and up side by side; without a gate, h.
        weights_N: factor of each row; None: one.
        gated: ``silu(gate) * up`` or ``relu(h)^2``.
    """
    h_NG, count, width = h_NG.contiguous(), h_NG.shape[0], h_NG.shape[1] // (2 if gated else 1)
    a_NF = torch.empty(count, width, dtype=h_NG.dtype, device=h_NG.device)
    if a_NF.numel():
        weighted = weights_N is not None
        weights = weights_N.contiguous() if weights_N is not None else h_NG
        _activate[(count,)](h_NG, weights, a_NF, width, weighted, gated, **_tile(width))
    return a_NF


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
    grad_NF, h_NG = grad_NF.contiguous(), h_NG.contiguous()
    (count, width), grad_h = grad_NF.shape, torch.empty_like(h_NG)
    grad_weights = None if weights_N is None else torch.empty_like(weights_N).contiguous()
    if grad_NF.numel():
        weights = weights_N.contiguous() if weights_N is not None else h_NG
        _activate_back[(count,)](
            grad_NF,
            h_NG,
            weights,
            grad_h,
            h_NG if grad_weights is None else grad_weights,
            width,
            weights_N is not None,
            gated,
            **_tile(width),
        )
    return grad_h, grad_weights


def _tile(width: int) -> dict[str, int]:
    """Return a block of a row that one program holds, and its warps: 16-byte accesses each."""
    block = max(16, min(WIDEST_BLOCK, triton.next_power_of_2(width)))
    # fused products and sums are named since Triton's default is about to change
    return {"BLOCK": block, "num_warps": max(1, min(8, block // 256)), "enable_fp_fusion": True}


@triton.jit
def _gather(
    x: tl.tensor,
    source: tl.tensor,
    weights: tl.tensor,
    rows: tl.tensor,
    width: int,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    n = tl.program_id(0).to(tl.int64)
    token = tl.load(source + n)
    there = tl.where(token >= 0, width, 0)
    for start in range(0, width, BLOCK):
        d = start + tl.arange(0, BLOCK)
        value = tl.load(x + token * width + d, mask=d < there, other=0.0)
        if WEIGHTED:
            value = (value * tl.load(weights + n)).to(rows.dtype.element_ty)
            value = tl.where(d < there, value, 0.0)
        tl.store(rows + n * width + d, value, mask=d < width)


@triton.jit
def _sum(
    rows: tl.tensor,
    position: tl.tensor,
    weights: tl.tensor,
    x: tl.tensor,
    width: int,
    CHOICES: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    t = tl.program_id(0).to(tl.int64)
    WIDE: tl.constexpr = tl.float64 if rows.dtype.element_ty == tl.float64 else tl.float32
    for start in range(0, width, BLOCK):
        d = start + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], dtype=WIDE)
        for k in tl.static_range(CHOICES):
            n = tl.load(position + t * CHOICES + k)
            there = tl.where(n >= 0, width, 0)
            value = tl.load(rows + n * width + d, mask=d < there, other=0.0).to(WIDE)
            if WEIGHTED:
                value = value * tl.load(weights + tl.maximum(n, 0))
                value = tl.where(d < there, value, 0.0)
            total += value
        tl.store(x + t * width + d, total.to(x.dtype.element_ty), mask=d < width)


@triton.jit
def _dot(
    x: tl.tensor,
    rows: tl.tensor,
    source: tl.tensor,
    dots: tl.tensor,
    width: int,
    BLOCK: tl.constexpr,
) -> None:
    n = tl.program_id(0).to(tl.int64)
    token = tl.load(source + n)
    there = tl.where(token >= 0, width, 0)
    total = tl.zeros([BLOCK], dtype=dots.dtype.element_ty)
    for start in range(0, width, BLOCK):
        d = start + tl.arange(0, BLOCK)
        left = tl.load(x + token * width + d, mask=d < there, other=0.0).to(total.dtype)
        total += left * tl.load(rows + n * width + d, mask=d < there, other=0.0).to(total.dtype)
    tl.store(dots + n, tl.sum(total))


@triton.jit
def _activate(
    h: tl.tensor,
    weights: tl.tensor,
    a: tl.tensor,
    width: int,
    WEIGHTED: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    n = tl.program_id(0).to(tl.int64)
    WIDE: tl.constexpr = tl.float64 if h.dtype.element_ty == tl.float64 else tl.float32
    for start in range(0, width, BLOCK):
        d = start + tl.arange(0, BLOCK)
        if GATED:
            gate = tl.load(h + n * 2 * width + d, mask=d < width, other=0.0).to(WIDE)
            up = tl.load(h + (n * 2 + 1) * width + d, mask=d < width, other=0.0).to(WIDE)
            value = gate / (1 + tl.exp(-gate)) * up
        else:
            root = tl.maximum(tl.load(h + n * width + d, mask=d < width, other=0.0).to(WIDE), 0.0)
            value = root * root
        if WEIGHTED:
            value = value * tl.load(weights + n)
        tl.store(a + n * width + d, value.to(a.dtype.element_ty), mask=d < width)


@triton.jit
def _activate_back(
    grad: tl.tensor,
    h: tl.tensor,
    weights: tl.tensor,
    grad_h: tl.tensor,
    grad_weights: tl.tensor,
    width: int,
    WEIGHTED: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    n = tl.program_id(0).to(tl.int64)
    WIDE: tl.constexpr = tl.float64 if h.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros([BLOCK], dtype=WIDE)
    for start in range(0, width, BLOCK):
        d = start + tl.arange(0, BLOCK)
        outer = tl.load(grad + n * width + d, mask=d < width, other=0.0).to(WIDE)
        inner = outer
        if WEIGHTED:
            inner = outer * tl.load(weights + n).to(WIDE)
        if GATED:
            first, second = h + n * 2 * width + d, h + (n * 2 + 1) * width + d
            gate = tl.load(first, mask=d < width, other=0.0).to(WIDE)
            up = tl.load(second, mask=d < width, other=0.0).to(WIDE)
            share = 1 / (1 + tl.exp(-gate))
            silu = gate * share
            plain = silu * up
            of_gate = inner * up * share * (1 + gate - silu)
            kind = grad_h.dtype.element_ty
            tl.store(grad_h + n * 2 * width + d, of_gate.to(kind), mask=d < width)
            tl.store(grad_h + (n * 2 + 1) * width + d, (inner * silu).to(kind), mask=d < width)
        else:
            root = tl.maximum(tl.load(h + n * width + d, mask=d < width, other=0.0).to(WIDE), 0.0)
            plain = root * root
            value = (inner * 2 * root).to(grad_h.dtype.element_ty)
            tl.store(grad_h + n * width + d, value, mask=d < width)
        total += outer * plain
    if WEIGHTED:
        tl.store(grad_weights + n, tl.sum(total).to(grad_weights.dtype.element_ty))
