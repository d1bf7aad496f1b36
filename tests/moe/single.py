"""A whole layer on one rank, put together by hand, and its definition, one token after another."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from moe.capacity import keep
from moe.config import By
from moe.experts import Experts, SharedExpert
from moe.permute import choose_weights, permute, row_order, unpermute
from moe.router import Router, Routing


def dropped(routing: Routing, limit: int, by: By) -> Routing:
    """Return a routing with only the choices that fit."""
    num_experts = routing.probabilities_TE.shape[1]
    kept = keep(routing.experts_TK, routing.weights_TK, num_experts, limit, by)
    return replace(routing, kept_TK=kept)


def layer(x_TD: Tensor, routing: Routing, experts: Experts, *, weigh_inside: bool = True) -> Tensor:
    """Return the output of the routed experts."""
    order = row_order(routing.experts_TK, routing.kept_TK, experts.w_in_LDG.shape[0])
    weights_N = choose_weights(routing.weights_TK, order)
    rows_ND = permute(x_TD, order)
    if weigh_inside:
        return unpermute(experts(rows_ND, order.counts_E, weights_N), order)
    return unpermute(experts(rows_ND, order.counts_E), order, weights_N)


def whole_layer(
    x_TD: Tensor, router: Router, experts: Experts, shared: SharedExpert | None = None
) -> Tensor:
    """Route, and add the shared expert."""
    y_TD = layer(x_TD, router(x_TD), experts)
    return y_TD if shared is None else y_TD + shared(x_TD)


def token_loop(x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """Return what `layer` has to return, token by token and choice by choice."""
    outputs = []
    for t, x_D in enumerate(x_TD):
        y_D = 0 * x_D
        for k in range(routing.experts_TK.shape[1]):
            if routing.kept_TK[t, k]:
                e = int(routing.experts_TK[t, k])
                h = x_D @ experts.w_in_LDG[e]
                if experts.config.gated:
                    gate, up = h.chunk(2)
                    act = functional.silu(gate) * up
                else:
                    act = functional.relu(h) ** 2
                y_D = y_D + routing.weights_TK[t, k] * (act @ experts.w_out_LFD[e])
        outputs.append(y_D)
    return torch.stack(outputs) if outputs else torch.zeros_like(x_TD)
