"""Auxiliary losses of the router, as shares that add up.

Normalisation, said once. A loss looks at the N real tokens of a scope (a pass, a sequence, a step),
which may lie on many ranks. Each rank gets a *share* of the loss: only the choices per expert and
the number of tokens are summed over the ranks of the scope (integers, no gradient), all else is its
own. The sum of the shares over these ranks is the loss of the scope, and the gradient of a rank's
share is that of the whole loss with respect to its own logits. Where a run has `parts` such scopes
side by side (data-parallel replicas), each share is divided by `parts`, so that the sum over all
ranks is the mean over the scopes. Strength hence depends neither on the mapping nor on
micro-batching, as long as gradients of accumulated passes are averaged like the main loss's.

With P_e the probabilities of expert e summed over the N tokens and n_e how many of the N k choices
went there, the load-balancing loss is

    E / (k N^2) * sum_e n_e P_e

which is 1 for an even load; `transformers` reports k times that.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe.config import LossConfig
from moe.errors import RoutingError
from moe.router import Routing, add_in_backward

__all__ = [
    "RunningLoad",
    "balance_loss",
    "load",
    "router_losses",
    "sequence_balance_loss",
    "z_loss",
]

Reduce = Callable[[Tensor], Tensor]


def load(routing: Routing, sequences: int = 1) -> Tensor:
    """Count choices per expert and real tokens, for each sequence.

    Args:
        routing: of T tokens, which are `sequences` equally long pieces, one after another.
        sequences: B.

    Returns:
        int64 of shape (B, E + 1): choices of real tokens per expert, then the real tokens.

    Raises:
        RoutingError: the tokens do not divide into so many sequences.
    """
    tokens, num_experts = routing.probabilities_TE.shape
    if sequences < 1 or tokens % sequences:
        raise RoutingError(f"{tokens} tokens do not divide into {sequences} sequences")
    device = routing.experts_TK.device
    bins_BE = torch.zeros(sequences, num_experts + 2, dtype=torch.int64, device=device)
    chosen = routing.experts_TK.reshape(sequences, -1) + 1  # padding's -1 falls into the first bin
    bins_BE.scatter_add_(1, chosen, torch.ones_like(chosen))
    if routing.valid_T is None:
        bins_BE[:, -1] = tokens // sequences
    else:
        bins_BE[:, -1] = routing.valid_T.reshape(sequences, -1).sum(dim=1)
    return bins_BE[:, 1:]


def balance_loss(
    probabilities_TE: Tensor,
    counts_E: Tensor,
    total_tokens: Tensor | int,
    top_k: int,
    counted_tokens: Tensor | int | None = None,
) -> Tensor:
    """Return this rank's share of the load-balancing loss of one scope.

    Args:
        probabilities_TE: of this rank's tokens, zero for padding.
        counts_E: choices per expert, summed over the ranks of the scope.
        total_tokens: real tokens, summed likewise.
        top_k: experts per token.
        counted_tokens: how many tokens `counts_E` comes from, where it covers earlier passes too.

    Returns:
        A scalar; 0 where there is no token.

    Example:
        >>> p = torch.full((6, 4), 0.25)
        >>> float(balance_loss(p, torch.tensor([3, 3, 3, 3]), 6, top_k=2))
        1.0
    """
    counted = total_tokens if counted_tokens is None else counted_tokens
    return _balance(probabilities_TE.sum(dim=0), counts_E, total_tokens, counted, top_k)


def sequence_balance_loss(
    probabilities_TE: Tensor, counts_BE: Tensor, tokens_B: Tensor, top_k: int
) -> Tensor:
    """Return this rank's share of the mean of the load-balancing losses of B sequences.

    Args:
        probabilities_TE: of this rank's tokens, equally long pieces of B sequences one after
            another; zero for padding.
        counts_BE: choices per expert, for each sequence summed over the ranks that hold it.
        tokens_B: real tokens of each sequence, summed likewise.
        top_k: experts per token.
    """
    sequences = counts_BE.shape[0]
    sums_BE = probabilities_TE.unflatten(0, (sequences, -1)).sum(dim=1)
    return _balance(sums_BE, counts_BE, tokens_B, tokens_B, top_k).mean()


def _balance(
    sums_E: Tensor, counts_E: Tensor, total: Tensor | int, counted: Tensor | int, top_k: int
) -> Tensor:
    """Compute E / k * sum_e (n_e / counted) (P_e / total) over the last dimension."""
    dtype, num_experts = sums_E.dtype, sums_E.shape[-1]
    # no tokens: the sums are zero, and so is the loss
    total, counted = (
        torch.as_tensor(n, device=sums_E.device).clamp_min(1).to(dtype) for n in (total, counted)
    )
    shares_E = (counts_E.to(dtype) * num_experts) / (counted * top_k).unsqueeze(-1)
    return (shares_E * sums_E).sum(dim=-1) / total


def z_loss(logits_TE: Tensor, total_tokens: Tensor | int, valid_T: Tensor | None = None) -> Tensor:
    """Return this rank's share of the mean over real tokens of logsumexp(logits)^2.

    Args:
        logits_TE: of this rank's tokens.
        total_tokens: real tokens, summed over the ranks of the scope.
        valid_T: True for real tokens, False for padding; None: all are real.
    """
    squares_T = logits_TE.logsumexp(dim=-1).square()
    if valid_T is not None:
        squares_T = squares_T.masked_fill(~valid_T, 0.0)
    total = torch.as_tensor(total_tokens, device=logits_TE.device).clamp_min(1)
    return squares_T.sum() / total.to(squares_T.dtype)


class RunningLoad:
    """The load of all passes since the optimizer's last step, for the scope ``global``.

    A pass is added when its gradient passes (see `add_in_backward`).

    Args:
        num_experts: E.
        device: where the counts live.
    """

    def __init__(self, num_experts: int, device: torch.device | str | None = None) -> None:
        self.total_1E = torch.zeros(1, num_experts + 1, dtype=torch.int64, device=device)

    def including(self, load_1E: Tensor, through: Tensor) -> Tensor:
        """Return the load with that of a pass, and remember the latter in its backward pass.

        Args:
            load_1E: of this pass, summed over all ranks.
            through: tensor of this pass that the loss depends on.
        """
        seen = self.total_1E + load_1E
        add_in_backward(through, self.total_1E, load_1E)
        return seen

    def reset(self) -> None:
        """Forget everything; call it after the optimizer's step."""
        self.total_1E.zero_()


def router_losses(
    routing: Routing,
    config: LossConfig,
    reduce: Reduce,
    *,
    sequences: int = 1,
    parts: int = 1,
    running: RunningLoad | None = None,
) -> dict[str, Tensor]:
    """Return this rank's shares of all losses that have a coefficient, coefficients included.

    Args:
        routing: of this rank's tokens, equally long pieces of `sequences` sequences.
        config: coefficients and scope.
        reduce: returns the sum of an int64 tensor over the ranks of the scope.
        sequences: B, of which this rank holds a piece each.
        parts: how many such groups of ranks there are side by side.
        running: load of earlier passes; needed by the scope ``global`` and by no other.

    Returns:
        Scalars by name: ``balance`` and ``z``.

    Raises:
        RoutingError: `running` is missing or not used.
    """
    if not config.balance and not config.z:
        return {}
    wanted = config.scope == "global" and config.balance > 0
    if wanted != (running is not None):
        raise RoutingError(
            f"the balance scope {config.scope!r} {'needs' if wanted else 'does not use'} a running "
            f"load; {'give' if wanted else 'leave out'} running"
        )
    load_BE = reduce(load(routing, sequences if config.scope == "sequence" else 1))
    tokens = load_BE[:, -1].sum()
    losses = {}
    if config.balance:
        share = _scoped(routing, load_BE, running)
        losses["balance"] = share * (config.balance / parts)
    if config.z:
        losses["z"] = z_loss(routing.logits_TE, tokens, routing.valid_T) * (config.z / parts)
    return losses


def _scoped(routing: Routing, load_BE: Tensor, running: RunningLoad | None) -> Tensor:
    p_TE, top_k = routing.probabilities_TE, routing.experts_TK.shape[1]
    if load_BE.shape[0] > 1:
        return sequence_balance_loss(p_TE, load_BE[:, :-1], load_BE[:, -1], top_k)
    seen_1E = load_BE if running is None else running.including(load_BE, p_TE)
    return balance_loss(p_TE, seen_1E[0, :-1], load_BE[0, -1], top_k, seen_1E[0, -1])
