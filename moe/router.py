"""Tokens choose experts: logits to choices, weights and probabilities.

A mask has one meaning everywhere in this package: True is a real token, False is padding. A padding
token goes nowhere: expert -1, weight 0, not kept, probabilities 0, and it counts for no loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe.config import RouterConfig
from moe.errors import RoutingError

__all__ = ["Router", "Routing", "add_in_backward", "moved_bias", "route", "tokens_per_expert"]


@dataclass(frozen=True, slots=True)
class Routing:
    """Where every token goes, with which weight; T tokens, k choices, E experts."""

    experts_TK: Tensor
    """Chosen experts, int64, best first; -1 for padding."""

    weights_TK: Tensor
    """Weights of the choices, float32 (float64 in a float64 model); differentiable."""

    kept_TK: Tensor
    """Whether a choice is carried out, bool; all True for real tokens when nothing is dropped."""

    probabilities_TE: Tensor
    """Each token's scores as a distribution over all experts, for losses; differentiable."""

    logits_TE: Tensor
    """What the router computed, in the dtype of the weights; differentiable."""

    valid_T: Tensor | None = None
    """True for a real token, False for padding, bool; None: all tokens are real."""


def route(
    logits_TE: Tensor,
    config: RouterConfig,
    bias_E: Tensor | None = None,
    valid_T: Tensor | None = None,
) -> Routing:
    """Choose each token's experts; `RouterConfig` has the equations.

    Ties go to the expert of the lower number, so that no kernel's order shows in the result.

    Args:
        logits_TE: finite logits, shape (tokens, experts), float32 or float64.
        config: how to choose and to weigh.
        bias_E: added to the scores for the choice alone.
        valid_T: True for real tokens, False for padding; None: all are real.

    Returns:
        The routing, nothing dropped.

    Raises:
        RoutingError: the shapes do not fit.

    Example:
        >>> r = route(torch.tensor([[0.0, 3.0, 1.0]]), RouterConfig(3, 2, renormalise=True))
        >>> r.experts_TK.tolist(), [round(w, 3) for w in r.weights_TK[0].tolist()]
        ([[1, 2]], [0.881, 0.119])
    """
    _check_shapes(logits_TE, config, bias_E, valid_T)
    if config.score == "sigmoid":
        scores_TE = logits_TE.sigmoid()
        probabilities_TE = scores_TE / scores_TE.sum(dim=-1, keepdim=True).clamp_min(1e-20)
    else:
        scores_TE = probabilities_TE = logits_TE.softmax(dim=-1)
    with torch.no_grad():
        if bias_E is None:
            # scores grow with the logits, but equal logits may differ in the last bit of a score
            experts_TK = _choose(logits_TE, scores_TE, config)
        else:
            experts_TK = _choose(scores_TE + bias_E, scores_TE + bias_E, config)
    weights_TK = _weigh(logits_TE, scores_TE, experts_TK, config)
    kept_TK = torch.ones_like(experts_TK, dtype=torch.bool)
    if valid_T is not None:
        padding_T1 = ~valid_T.unsqueeze(1)
        experts_TK = experts_TK.masked_fill(padding_T1, -1)
        weights_TK = weights_TK.masked_fill(padding_T1, 0.0)
        probabilities_TE = probabilities_TE.masked_fill(padding_T1, 0.0)
        kept_TK = kept_TK & valid_T.unsqueeze(1)
    return Routing(experts_TK, weights_TK, kept_TK, probabilities_TE, logits_TE, valid_T)


def _check_shapes(
    logits_TE: Tensor, config: RouterConfig, bias_E: Tensor | None, valid_T: Tensor | None
) -> None:
    if logits_TE.dim() != 2 or logits_TE.shape[1] != config.num_experts:
        raise RoutingError(
            f"logits have shape {tuple(logits_TE.shape)}; needed is (tokens, {config.num_experts})"
        )
    if bias_E is not None and bias_E.shape != (config.num_experts,):
        raise RoutingError(
            f"the bias has shape {tuple(bias_E.shape)}; needed is ({config.num_experts},)"
        )
    if valid_T is not None and (
        valid_T.shape != logits_TE.shape[:1] or valid_T.dtype != torch.bool
    ):
        raise RoutingError(
            f"the mask has shape {tuple(valid_T.shape)} and type {valid_T.dtype}; needed is "
            f"({logits_TE.shape[0]},) of torch.bool, True for real tokens"
        )


def _choose(keys_TE: Tensor, scores_TE: Tensor, config: RouterConfig) -> Tensor:
    """Return the k largest keys of the groups with the largest scores, largest first."""
    if config.groups is not None:
        count, kept = config.groups
        scores_TGM = scores_TE.unflatten(1, (count, -1))
        per_group = min(max(1, config.top_k // kept), scores_TGM.shape[2])
        worth_TG = scores_TGM.topk(per_group, dim=2).values.sum(dim=2)
        best_TG = worth_TG.argsort(dim=1, descending=True, stable=True)[:, :kept]
        out_TG = torch.ones_like(worth_TG, dtype=torch.bool).scatter_(1, best_TG, False)
        keys_TE = keys_TE.masked_fill(out_TG.repeat_interleave(scores_TGM.shape[2], 1), -torch.inf)
    return keys_TE.argsort(dim=1, descending=True, stable=True)[:, : config.top_k].contiguous()


def _weigh(
    logits_TE: Tensor, scores_TE: Tensor, experts_TK: Tensor, config: RouterConfig
) -> Tensor:
    if config.score == "topk-softmax":
        weights_TK = logits_TE.gather(1, experts_TK).softmax(dim=-1)
    else:
        weights_TK = scores_TE.gather(1, experts_TK)
    if config.renormalise:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True).clamp_min(1e-20)
    return weights_TK if config.scale == 1.0 else weights_TK * config.scale


def tokens_per_expert(routing: Routing) -> Tensor:
    """Count the choices of real tokens for each expert, whether or not they are dropped later.

    Args:
        routing: of T tokens.

    Returns:
        int64 counts of shape (experts,), which sum to ``top_k`` times the real tokens.
    """
    num_experts = routing.probabilities_TE.shape[1]
    # the bin for -1 comes first and is cut off; a plain sum, since bincount waits for the device
    bins = torch.zeros(num_experts + 1, dtype=torch.int64, device=routing.experts_TK.device)
    chosen = routing.experts_TK.flatten() + 1
    return bins.scatter_add_(0, chosen, torch.ones_like(chosen))[1:]


def moved_bias(bias_E: Tensor, counts_E: Tensor, rate: float) -> Tensor:
    """Return the bias after one step towards an even load: b + rate * sign(mean(n) - n).

    Args:
        bias_E: current bias.
        counts_E: choices per expert since the last step, summed over all ranks.
        rate: size of the step.

    Example:
        >>> moved_bias(torch.zeros(3), torch.tensor([4, 1, 1]), 0.1).tolist()
        [-0.10000000149011612, 0.10000000149011612, 0.10000000149011612]
    """
    counts_E = counts_E.to(bias_E.dtype)
    return bias_E + rate * (counts_E.mean() - counts_E).sign()


def add_in_backward(through: Tensor, total: Tensor, amount: Tensor) -> None:
    """Add `amount` to `total` in place when a gradient passes through a tensor.

    What is counted so is counted once a step: forward passes without a gradient do not count,
    and neither do those repeated under activation checkpointing, whose graph is only read.

    Args:
        through: tensor of the forward pass; one that needs no gradient never counts.
        total: what is added to.
        amount: what is added, of the same shape.
    """
    if through.requires_grad:
        through.register_hook(partial(_add, total, amount))


def _add(total: Tensor, amount: Tensor, gradient: Tensor) -> None:
    with torch.no_grad():
        total.add_(amount)


class Router(nn.Module):
    """A linear map from tokens to logits, and the choice made from them.

    Logits are computed in float32 whatever the dtype of the tokens (float64 for float64). The
    expert bias stays in float32 when the module is cast to half precision.

    Args:
        config: how tokens choose.
        hidden: width of a token, D.
        device: where the weight lives.
        dtype: of the weight; float32 unless told otherwise.

    Example:
        >>> router = Router(RouterConfig(4, 2), hidden=8)
        >>> router(torch.zeros(3, 8)).experts_TK.tolist()  # all scores tie
        [[0, 1], [0, 1], [0, 1]]
    """

    weight_ED: nn.Parameter
    bias_E: Tensor | None
    counts_E: Tensor | None

    def __init__(
        self,
        config: RouterConfig,
        hidden: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.config = config
        weight_ED = torch.empty(config.num_experts, hidden, device=device, dtype=dtype)
        self.weight_ED = nn.Parameter(nn.init.normal_(weight_ED, std=hidden**-0.5))
        bias_E = counts_E = None
        if config.expert_bias:
            bias_E = torch.zeros(config.num_experts, device=device)
            counts_E = torch.zeros(config.num_experts, device=device, dtype=torch.int64)
        self.register_buffer("bias_E", bias_E)
        self.register_buffer("counts_E", counts_E, persistent=False)

    def forward(self, x_TD: Tensor, valid_T: Tensor | None = None) -> Routing:
        """Route tokens.

        Args:
            x_TD: tokens, shape (tokens, hidden).
            valid_T: True for real tokens, False for padding; None: all are real.

        Raises:
            RoutingError: a real token's logits are not finite; shapes do not fit.
        """
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        x_TD = x_TD.to(dtype)
        if valid_T is not None:  # what padding holds, NaN included, must not reach a gradient
            x_TD = x_TD.masked_fill(~valid_T.unsqueeze(1), 0.0)
        if self.training and self.config.jitter:
            # torch's own generator, which activation checkpointing rewinds before it repeats
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(
                1 - self.config.jitter, 1 + self.config.jitter
            )
        # no autocast: half precision changes which experts are chosen
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = functional.linear(x_TD, self.weight_ED.to(dtype))
        _refuse_non_finite(logits_TE)
        routing = route(logits_TE, self.config, self.bias_E, valid_T)
        if self.counts_E is not None and self.training:
            add_in_backward(routing.weights_TK, self.counts_E, tokens_per_expert(routing))
        return routing

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        bias_E = self.bias_E
        super()._apply(fn, recurse)
        # steps of the bias are far below what half precision tells apart
        if bias_E is not None and self.bias_E is not None:
            exact = torch.promote_types(self.bias_E.dtype, torch.float32)
            if self.bias_E.dtype != exact:
                self.bias_E = bias_E.to(self.bias_E.device)
        return self

    @torch.no_grad()
    def update_bias(self, rate: float, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """Move the bias by the load since the last call, and forget the load.

        Call it once an optimizer step, after the last backward pass; see `moved_bias`.

        Args:
            rate: size of the step, such as 0.001.
            reduce: returns the sum of an int64 tensor over all ranks that share this router; None
                on one rank.

        Raises:
            RoutingError: the router has no bias.
        """
        if self.bias_E is None or self.counts_E is None:
            raise RoutingError("this router has no expert bias; set RouterConfig.expert_bias")
        counts_E = self.counts_E if reduce is None else reduce(self.counts_E)
        self.bias_E.copy_(moved_bias(self.bias_E, counts_E, rate))
        self.counts_E.zero_()


def _refuse_non_finite(logits_TE: Tensor) -> None:
    finite_T = torch.isfinite(logits_TE.detach()).all(dim=1)
    if not bool(finite_T.all()):
        bad = (~finite_T).nonzero().flatten()
        raise RoutingError(
            f"the router's logits are not finite for {bad.numel()} of {finite_T.numel()} tokens, "
            f"the first of them token {int(bad[0])}; look for NaN or Inf in the layer's input and "
            "in its weights"
        )
