"""The mixture-of-experts layer, the same under every mapping.

A rank gives the tokens it holds and gets back what the layer makes of them; where the experts are
is the dispatcher's business. Losses are returned, never attached to anything. A forward pass leaves
no trace in the layer, so it may be repeated (activation checkpointing) or interleaved with others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from moe.config import ConfigError, MoeConfig
from moe.dispatch import Dispatched, Dispatcher, Kind, Plan, make_dispatcher
from moe.dropping import drop
from moe.errors import LayoutError, RoutingError
from moe.experts import Experts, SharedExpert, compute_type
from moe.initial import draw_experts, draw_replicated
from moe.losses import RunningLoad, router_losses
from moe.parallel.agreement import Fact, together
from moe.parallel.collectives import all_reduce_sum
from moe.parallel.grads import Family
from moe.parallel.groups import ProcessGroups, single
from moe.permute import RowOrder, pad_to_capacity, row_order
from moe.router import Router, Routing, tokens_per_expert

__all__ = ["Execution", "LayerOutput", "MoeLayer", "Recompute"]

Recompute = Literal["nothing", "experts", "layer"]
"""What is computed again in the backward pass instead of being kept."""

SEEDS = 2**31
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, slots=True)
class Execution:
    """How a layer does its work; none of this changes what it computes.

    Args:
        dispatcher: see `moe.dispatch.Kind`; ``"allgather"`` is for checking the others.
        weights_travel: let the experts apply the weights also where that means sending them along
            with the rows; see `AllToAllDispatcher`.
        halves: dispatch the tokens as two halves, so that one travels while the experts work on
            the other.
        recompute: ``"experts"`` keeps what was dispatched and computes the experts again;
            ``"layer"`` keeps only the tokens and their routing, and dispatches again as well.

    Raises:
        ConfigError: there is no such dispatcher or no such way to recompute.
    """

    dispatcher: Kind = "auto"
    weights_travel: bool = False
    halves: bool = False
    recompute: Recompute = "nothing"

    def __post_init__(self) -> None:
        for name, choices in (("dispatcher", get_args(Kind)), ("recompute", get_args(Recompute))):
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} is not valid: choose one of "
                    f"{', '.join(map(repr, choices))}"
                )


@dataclass(frozen=True, slots=True)
class LayerOutput:
    """What a layer returns."""

    y: Tensor
    """Of the shape of the input."""

    losses: dict[str, Tensor]
    """This rank's shares of the auxiliary losses by name. The shares of all ranks of a pipeline
    stage add up to the loss (`moe.losses`); `MoeLayer.total_loss` adds them to a rank's own."""

    counts_E: Tensor
    """How many of this rank's choices each expert got, before any is dropped; int64."""

    dropped: Tensor
    """How many of them were dropped; int64 scalar."""


class MoeLayer(nn.Module):
    """Router, experts, and the way between them.

    Args:
        config: what the layer computes.
        groups: of the mapping; one rank unless given.
        execution: how it does it.
        device: where the weights live.
        dtype: of the experts' weights; the router's stay in float32 at least.
        seed: of the first weights, which are the same under every mapping; unless given, drawn
            from torch's generator, which then has to be in the same state on every rank.

    Raises:
        LayoutError: the experts or their inner width cannot be shared out; on every rank.

    Example:
        >>> from moe.config import ExpertConfig, RouterConfig
        >>> layer = MoeLayer(MoeConfig(RouterConfig(4, 2), ExpertConfig(8, 16)))
        >>> out = layer(torch.ones(2, 3, 8))  # two sequences of three tokens
        >>> out.y.shape, int(out.counts_E.sum()), int(out.dropped)
        (torch.Size([2, 3, 8]), 12, 0)
    """

    def __init__(
        self,
        config: MoeConfig,
        groups: ProcessGroups | None = None,
        execution: Execution | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.groups = groups = single() if groups is None else groups
        self.execution = execution = Execution() if execution is None else execution
        if execution.halves and config.capacity is not None and config.capacity.pad:
            raise ConfigError("halves=True cannot pad each half to the capacity of the whole")
        num_experts, hidden = config.router.num_experts, config.experts.hidden
        self.dispatcher: Dispatcher[Any] = make_dispatcher(
            groups, num_experts, execution.dispatcher, weights_travel=execution.weights_travel
        )
        self._digest = _digest(config, execution)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        exact = torch.promote_types(dtype, torch.float32)
        self.router = Router(config.router, hidden, device=device, dtype=exact)
        self.experts = Experts(
            config.experts,
            groups.dims.local_experts(num_experts),
            etp_size=groups["etp"].size,
            etp_index=groups["etp"].index,
            device=device,
            dtype=dtype,
        )
        self.shared: SharedExpert | None = None
        if config.experts.shared:
            self.shared = SharedExpert(config.experts, device=device, dtype=dtype)
        self.running: RunningLoad | None = None
        if config.losses.balance and config.losses.scope == "global":
            self.running = RunningLoad(num_experts, device=device)
        self.reset_parameters(int(torch.randint(SEEDS, ())) if seed is None else seed)

    def forward(
        self, x: Tensor, valid: Tensor | None = None, order: Tensor | None = None
    ) -> LayerOutput:
        """Route this rank's tokens to their experts and add up what these make of them.

        Args:
            x: tokens, shape (tokens, hidden) or (sequences, tokens of each, hidden): this rank's
                piece of every sequence, pieces in the order of the ranks of the group "sequence".
                In the type of the weights, or, under autocast, in one that all ranks share.
            valid: True for real tokens, False for padding, of x's shape without the last
                dimension, bool; None: all are real. Padding goes to no routed expert, and what the
                shared expert sees, and makes of it, is zero.
            order: int64 of the same shape, ascending along each sequence, where pieces are not
                consecutive; by position, full-sequence dropping keeps what comes first.

        Raises:
            RoutingError: the tokens have a wrong shape or type, or their logits NaN or Inf in them,
                on any rank of the stage; or ranks differ in what they have to have in common. On
                all its ranks, before anything is sent.
            LayoutError: ranks of the stage built the layer with different settings; likewise.
        """
        stage = self.groups["stage"]
        routing = together(lambda: self._route(x, valid), stage, x.device, self._facts(x))
        sequences = _sequences(x)
        counts_E = tokens_per_expert(routing)
        losses = self._losses(routing, sequences)
        # where every choice has a row, the device need not be asked how many there are
        all_kept, limit = valid is None, None
        if self.config.capacity is not None:
            group = self.groups["sequence"]
            order_T = None if order is None else order.reshape(-1)
            routing, limit = drop(
                routing, self.config.capacity, group, order_T, sequences=sequences
            )
            all_kept = False
        y_TD = self._work(x.reshape(-1, x.shape[-1]), routing, all_kept=all_kept, limit=limit)
        dropped = counts_E.sum() - routing.kept_TK.sum()
        return LayerOutput(y_TD.view(x.shape), losses, counts_E, dropped)

    def total_loss(self, loss: Tensor, outputs: LayerOutput) -> Tensor:
        """Return a rank's loss with the layer's auxiliary losses added at their full strength.

        `reduce_gradients` takes the mean over the DP x CP parts of the batch, and shares add up, so
        that each of them has to count DP x CP times.

        Args:
            loss: mean over the tokens of this rank's (dp, cp) part, see `moe.parallel.grads`.
            outputs: of this layer.
        """
        dims = self.groups.dims
        return loss + dims.dp * dims.cp * sum(outputs.losses.values(), torch.zeros_like(loss))

    def families(self) -> dict[str, Family]:
        """Return the family of every parameter by name, for a `GradientRegistry`."""
        kinds = {"experts": Family.EXPERT, "router": Family.ROUTER, "shared": Family.REPLICATED}
        return {name: kinds[name.partition(".")[0]] for name, _ in self.named_parameters()}

    def finish_step(self, bias_rate: float = 0.0) -> None:
        """Do what is due after an optimizer's step: count the load afresh, move the expert bias.

        Args:
            bias_rate: step of the bias; a router without one has no use for it.
        """
        if self.running is not None:
            self.running.reset()
        if self.config.router.expert_bias:
            stage = self.groups["stage"]
            self.router.update_bias(bias_rate, lambda counts: all_reduce_sum(counts, stage))

    def reset_parameters(self, seed: int) -> None:
        """Draw all weights anew, the same under every mapping, and forget what was counted.

        Args:
            seed: the same on every rank.
        """
        self.reset_counts()
        first = self.groups["ep"].index * self.experts.w_in_LDG.shape[0]
        draw_experts(self.experts, first, seed)
        named = self.named_parameters()
        draw_replicated(((n, p) for n, p in named if not n.startswith("experts.")), seed)

    @torch.no_grad()
    def reset_counts(self) -> None:
        """Forget the load and the expert bias, as after the layer got memory by `to_empty`."""
        weight_ED, router = self.router.weight_ED, self.router
        for counted in (router.bias_E, router.counts_E):
            if counted is not None:
                counted.zero_()
        if self.running is not None:
            self.running = RunningLoad(weight_ED.shape[0], device=weight_ED.device)

    def _route(self, x: Tensor, valid: Tensor | None) -> Routing:
        hidden = self.config.experts.hidden
        if x.dim() not in (2, 3) or x.shape[-1] != hidden:
            raise RoutingError(
                f"the tokens have shape {tuple(x.shape)}; needed is (tokens, {hidden}) or "
                f"(sequences, tokens, {hidden})"
            )
        self._check_type(x)
        if valid is not None and valid.dtype != torch.bool:
            raise RoutingError(
                f"the mask is of {valid.dtype}; give one of torch.bool, True for real tokens"
            )
        if valid is not None and valid.shape != x.shape[:-1]:
            raise RoutingError(
                f"the mask has shape {tuple(valid.shape)}; needed is {tuple(x.shape[:-1])}"
            )
        routing: Routing = self.router(
            x.reshape(-1, hidden), None if valid is None else valid.reshape(-1)
        )
        return routing

    def _check_type(self, x: Tensor) -> None:
        weight = self.experts.w_in_LDG
        if x.dtype not in TYPES:
            raise RoutingError(
                f"the tokens are of {x.dtype}; give one of {', '.join(map(str, TYPES))}"
            )
        if x.dtype != weight.dtype and compute_type(x, weight) is None:
            raise RoutingError(
                f"the tokens are of {x.dtype}, and the experts' weights of {weight.dtype}; convert "
                f"one of them, or use torch.autocast (which leaves float64 alone)"
            )

    def _facts(self, x: Tensor) -> list[Fact]:
        """Return what the ranks of the stage have to have in common, as collectives rely on it."""
        losses, capacity, dims = self.config.losses, self.config.capacity, self.groups.dims
        counted = losses.scope == "sequence" and bool(losses.balance or losses.z)
        counted |= capacity is not None and capacity.scope == "full-sequence"
        inside = compute_type(x, self.experts.w_in_LDG) or x.dtype
        return [
            Fact(
                "the layer's settings",
                self._digest,
                "build the layer with the same MoeConfig and Execution on every rank",
                words="digest {:x}".format,
                kind=LayoutError,
            ),
            Fact("the type of the tokens", _code(x.dtype), "convert them", words=_type_of),
            Fact(
                "the type that experts compute in",
                _code(inside),
                "use torch.autocast alike on every rank",
                words=_type_of,
            ),
            Fact(
                "the number of sequences",
                _sequences(x) if counted else 0,
                "ranks of one group 'sequence' hold pieces, maybe empty, of the same sequences",
                block=dims.coordinates(self.groups.rank)["dp"],
                blocks=dims.dp,
            ),
        ]

    def _losses(self, routing: Routing, sequences: int) -> dict[str, Tensor]:
        everywhere = self.config.losses.scope == "global"
        group = self.groups["stage" if everywhere else "sequence"]
        return router_losses(
            routing,
            self.config.losses,
            lambda counts: all_reduce_sum(counts, group),
            sequences=sequences,
            parts=1 if everywhere else self.groups.dims.dp,
            running=self.running,
        )

    def _work(self, x_TD: Tensor, routing: Routing, *, all_kept: bool, limit: int | None) -> Tensor:
        """Dispatch, run the experts, and combine."""
        half = len(x_TD) // 2
        pieces = [slice(half), slice(half, None)] if self.execution.halves else [slice(None)]
        plans = []
        for piece in pieces:
            kept_TK = None if all_kept else routing.kept_TK[piece]
            order = row_order(routing.experts_TK[piece], kept_TK, self.config.router.num_experts)
            plans.append(self.dispatcher.plan(self._padded(order, limit)))
        if self.shared is not None and routing.valid_T is not None:
            # what padding holds, NaN included, must not reach a gradient
            x_TD = x_TD.masked_fill(~routing.valid_T.unsqueeze(1), 0.0)
        inputs = x_TD, routing.weights_TK, pieces, plans
        if self.execution.recompute == "layer":
            y_TD: Tensor = _recomputed(self._travel, *inputs)
            return y_TD
        return self._travel(*inputs)

    def _padded(self, order: RowOrder, limit: int | None) -> RowOrder:
        padded = self.config.capacity is not None and self.config.capacity.pad
        return pad_to_capacity(order, limit) if padded and limit is not None else order

    def _travel(
        self, x_TD: Tensor, weights_TK: Tensor, pieces: Sequence[slice], plans: Sequence[Plan]
    ) -> Tensor:
        """Send all pieces off; whatever else there is to do is done while they travel."""
        there = [
            self.dispatcher.start_dispatch(x_TD[piece], weights_TK[piece], plan)
            for piece, plan in zip(pieces, plans, strict=True)
        ]
        shared_TD = None if self.shared is None else self.shared(x_TD)
        back = [
            self.dispatcher.start_combine(self._expert(arriving.wait()), weights_TK[piece], plan)
            for arriving, piece, plan in zip(there, pieces, plans, strict=True)
        ]
        parts = [arriving.wait() for arriving in back]
        y_TD = parts[0] if len(parts) == 1 else torch.cat(parts)
        return y_TD if shared_TD is None else y_TD + shared_TD

    def _expert(self, d: Dispatched) -> Tensor:
        inputs = d.rows_ND, d.counts_L, d.weights_N
        again = self.execution.recompute == "experts"
        y_ND: Tensor = _recomputed(self.experts, *inputs) if again else self.experts(*inputs)
        return y_ND


def _sequences(x: Tensor) -> int:
    """Return how many sequences there are; none at all are one without tokens."""
    return max(1, len(x)) if x.dim() == 3 else 1


def _digest(*settings: object) -> int:
    """Return a number that is the same for the same settings only."""
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


def _code(dtype: torch.dtype) -> int:
    return TYPES.index(dtype) if dtype in TYPES else -1


def _type_of(code: int) -> str:
    return str(TYPES[code])


def _recomputed(function: Any, *inputs: Any) -> Any:
    """Call a function and keep only its inputs for the backward pass, which calls it again."""
    # early stopping could end one rank's repetition before a collective that another one is in
    with checkpoint.set_checkpoint_early_stop(False):
        return checkpoint.checkpoint(
            function, *inputs, use_reentrant=False, preserve_rng_state=False
        )
