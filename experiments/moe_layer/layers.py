"""What a layer costs on one device, part by part, beside the plain loop and `transformers`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from experiments.moe_layer.blocks import ours, plain_loop, step, theirs
from experiments.moe_layer.shapes import Shape
from experiments.moe_layer.timing import measure
from moe.kernels import kernels
from moe.layer import MoeLayer
from moe.permute import choose_weights, permute, row_order, unpermute

__all__ = ["Paths", "parts", "time_layers"]

Paths = dict[str, Callable[[], object]]


def time_layers(shape: Shape, device: torch.device, dtype: torch.dtype, repeats: int) -> Any:
    """Return the times of all paths, forwards and backwards, and how far results are apart."""
    torch.manual_seed(0)
    layer = ours(shape, device, dtype)
    x_TD, head_TD = (
        torch.randn(shape.tokens, shape.hidden, device=device).to(dtype) for _ in range(2)
    )
    blocks: dict[str, nn.Module] = {"layer": layer, "layer, plain loop": plain_loop(layer, shape)}
    for implementation in ("eager", "grouped_mm"):
        block = theirs(layer, shape, implementation)
        if block is not None:
            blocks[f"transformers, {implementation}"] = block
    paths: Paths = {name: step(block, x_TD, head_TD) for name, block in blocks.items()}
    paths |= parts(layer, shape, x_TD)
    outputs = {name: paths[name]() for name in blocks}
    times = measure(paths, device, repeats)
    return {
        "tokens": shape.tokens,
        "flop": {"layer": shape.layer_flop, "experts": shape.expert_flop},
        "kernels": kernels(device).NAME,
        "times": times,
        "apart": {name: _apart(y, outputs["layer"]) for name, y in outputs.items()},
    }


def _apart(found: Any, wanted: Any) -> float:
    """Return the distance of two outputs over the length of one."""
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def parts(layer: MoeLayer, shape: Shape, x_TD: Tensor) -> Paths:
    """Return the layer's parts, each forwards and backwards, with the routing of a real pass."""
    with torch.no_grad():
        routing = layer.router(x_TD)
    experts, weights_TK = layer.experts, routing.weights_TK
    order = row_order(routing.experts_TK, routing.kept_TK, shape.experts)
    rows_ND = permute(x_TD, order)
    weights_N = choose_weights(weights_TK, order)

    def router() -> None:
        layer.zero_grad(set_to_none=True)
        found = layer.router(x_TD)
        found.weights_TK.backward(weights_TK)

    def sort() -> None:
        row_order(routing.experts_TK, routing.kept_TK, shape.experts)

    def forth() -> Tensor:
        x = x_TD.detach().requires_grad_()
        permute(x, order).backward(rows_ND)
        return x

    def back() -> None:
        rows = rows_ND.detach().requires_grad_()
        unpermute(rows, order).backward(x_TD)

    def gemm() -> None:
        layer.zero_grad(set_to_none=True)
        rows = rows_ND.detach().requires_grad_()
        experts(rows, order.counts_E, weights_N).backward(rows_ND)

    return {
        "router": router,
        "order of rows": sort,
        "permute": forth,
        "unpermute": back,
        "experts": gemm,
        "copy of the rows": rows_ND.clone,
        **_moves(x_TD, rows_ND, order.source_N, order.position_TK),
    }


def _moves(x_TD: Tensor, rows_ND: Tensor, source_N: Tensor, position_TK: Tensor) -> Paths:
    """Return the two kernels alone, forwards."""
    chosen = kernels(x_TD.device)
    return {
        "gather kernel": lambda: chosen.gather_rows(x_TD, source_N),
        "sum kernel": lambda: chosen.sum_rows(rows_ND, position_TK),
    }
