"""A decoder-only transformer around the folded mixture-of-experts layer.

A model is an embedding, blocks and a head, of which a rank builds those of its pipeline stage.
Every rank of a TP group gets the same tokens, those of its (dp, cp) part; between the layers it
holds a piece of each sequence, which is what a mixture of experts wants. Which tokens see each
other is told by `Places`, never by their order, and worked out by an attention core.

The loss of a part is the same on all its TP ranks and counts once; the auxiliary losses are shares
that add up over all ranks (`moe.losses`). `Model.total_loss` puts them together, so that
`reduce_gradients` with the families of `Model.families` gives the gradient of one rank that sees
the whole batch.

Shapes: B rows, S tokens of each on the TP group, T on this rank, D width of a token, V entries of
the vocabulary, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from moe.admission import admit
from moe.attention import AttentionCore, local_core
from moe.block import Block
from moe.errors import LayoutError
from moe.initial import derived_seed, draw_part
from moe.layer import SEEDS, Execution, MoeLayer
from moe.mapping import check_mapping, stage_layers
from moe.model_config import ModelConfig
from moe.parallel.context import positions_of
from moe.parallel.grads import Family
from moe.parallel.groups import ProcessGroups, single
from moe.places import Places
from moe.ring import RingCore
from moe.rope import rotation
from moe.vocabulary import UNLABELLED, Embedding, Head

__all__ = ["Model", "ModelOutput", "StageOutput", "mean_loss"]


@dataclass(frozen=True, slots=True)
class StageOutput:
    """What the layers of a pipeline stage return."""

    x_BTD: Tensor
    """This rank's piece of the sequences, for the next stage or the head."""

    losses: dict[str, Tensor] = field(default_factory=dict)
    """This rank's shares of the auxiliary losses by name, summed over the layers."""

    loads: dict[int, Tensor] = field(default_factory=dict)
    """By layer, how many of this rank's choices each expert got: counts_E, int64."""

    dropped: dict[int, Tensor] = field(default_factory=dict)
    """By layer, how many of them were dropped."""


@dataclass(frozen=True, slots=True)
class ModelOutput:
    """What a whole model returns."""

    logits: Tensor | None
    """logits_BSV of the whole vocabulary, the same on every rank of the TP group and counted once
    by a loss made of them; None if there were labels."""

    token_losses_BS: Tensor | None
    """Cross-entropy of each labelled token, 0 for the others, in float32 at least; the same on
    every rank of the TP group, and counts once. None without labels."""

    loss: Tensor | None
    """Their mean over the labelled tokens of this (dp, cp) part."""

    stage: StageOutput
    """What the layers returned."""


class Model(nn.Module):
    """The layers of one pipeline stage of a transformer: all of them if there is one stage.

    Args:
        config: what the model computes.
        groups: of the mapping; one rank unless given.
        core: what tokens see; unless given, `local_core`, or a `RingCore` where there is context
            parallelism.
        layers: of this stage; an even share of all layers unless given. A stage that begins with
            layer 0 embeds tokens, one that ends with the last has the head.
        execution: how mixtures do their work.
        device: where the weights live; on ``"meta"`` nothing is drawn, and `to_empty` and
            `reset_parameters` follow.
        dtype: of the weights; routers stay in float32 at least.
        seed: of the first weights, which are the same under every mapping; unless given, drawn
            from torch's generator, which then has to be in the same state on every rank.

    Raises:
        LayoutError: model and mapping do not fit; on every rank, before anything is sent.

    Example:
        >>> from moe.model_config import AttentionConfig, FeedForwardConfig
        >>> config = ModelConfig(
        ...     100, 32, 2, AttentionConfig(4, 2, head_dim=8), FeedForwardConfig(inner=64)
        ... )
        >>> model = Model(config, seed=0)
        >>> ids = torch.arange(10).view(2, 5)
        >>> model(ids).logits.shape
        torch.Size([2, 5, 100])
        >>> model(ids, labels_BS=ids.roll(-1, 1)).loss.shape
        torch.Size([])
    """

    def __init__(
        self,
        config: ModelConfig,
        groups: ProcessGroups | None = None,
        core: AttentionCore | None = None,
        layers: range | None = None,
        execution: Execution | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.groups = groups = single() if groups is None else groups
        check_mapping(config, groups.dims)
        self.layers = layers = stage_layers(config.num_layers, groups, layers)
        tp, width = groups["tp"], config.hidden
        self.embed: Embedding | None = None
        if layers.start == 0:
            self.embed = Embedding(config.vocabulary, width, tp, device, dtype)
        chosen = core or (RingCore(groups["cp"]) if groups.dims.cp > 1 else local_core)
        self.blocks = nn.ModuleDict(
            {str(n): Block(config, n, groups, chosen, execution, device, dtype) for n in layers}
        )
        self.head: Head | None = None
        if layers.stop == config.num_layers:
            own = not config.tied or self.embed is None
            self.head = Head(config.vocabulary, width, config.eps, tp, own, device, dtype)
        self.reset_parameters(int(torch.randint(SEEDS, ())) if seed is None else seed)

    def forward(
        self, input_ids: Tensor, places: Places | None = None, labels_BS: Tensor | None = None
    ) -> ModelOutput:
        """Run the whole model.

        Args:
            input_ids: ids_BS, int64, of this rank's (dp, cp) part: the same on its TP group.
            places: where they stand; whole rows of one document each unless given.
            labels_BS: the token that follows each, or `UNLABELLED`; with labels the output has
                losses instead of logits.

        Raises:
            RoutingError: tokens, places or labels have a wrong shape or type, or numbers that the
                vocabulary does not have, on any rank of the stage; or they differ within a TP
                group. On all its ranks, before anything is sent.
            LayoutError: this rank has only a stage of the model; use `run`.
        """
        if self.embed is None or self.head is None:
            raise LayoutError(
                f"this rank has layers {self.layers.start} to {self.layers.stop - 1} of "
                f"{self.config.num_layers}; run its stage with Model.run"
            )
        places = self.places(input_ids) if places is None else places
        admit(input_ids, places, labels_BS, self.config.vocabulary, self.groups)
        stage = self._run(self.embed(input_ids), places)
        if labels_BS is None:
            return ModelOutput(self.logits(stage.x_BTD, places), None, None, stage)
        losses_BS = self.token_losses(stage.x_BTD, places, labels_BS)
        return ModelOutput(None, losses_BS, mean_loss(losses_BS, labels_BS), stage)

    def run(self, x: Tensor, places: Places) -> StageOutput:
        """Run the layers of this rank's stage.

        Args:
            x: ids_BS on the first stage, x_BTD of the stage before on the others.
            places: where the tokens stand, as for `forward`; the same on every stage.

        Raises:
            RoutingError: tokens or places are wrong, as for `forward`.
        """
        if self.embed is not None:
            admit(x, places, None, self.config.vocabulary, self.groups)
            x = self.embed(x)
        return self._run(x, places)

    def logits(self, x_BTD: Tensor, places: Places) -> Tensor:
        """Return the logits of the whole vocabulary, on the last stage; see `ModelOutput`.

        Args:
            x_BTD: of the last layer.
            places: as for `run`.
        """
        head, logits_BSV = self._own_logits(x_BTD, places)
        return head.whole(logits_BSV)

    def token_losses(self, x_BTD: Tensor, places: Places, labels_BS: Tensor) -> Tensor:
        """Return the cross-entropy of each token, on the last stage; see `ModelOutput`.

        Args:
            x_BTD: of the last layer.
            places: as for `run`.
            labels_BS: as for `forward`.
        """
        head, logits_BSV = self._own_logits(x_BTD, places)
        return head.losses(logits_BSV, labels_BS)

    def total_loss(self, loss: Tensor, stage: StageOutput) -> Tensor:
        """Return what to call `backward` on: a part's loss with the auxiliary losses.

        `reduce_gradients` takes the mean over the DP x CP parts, and shares add up, so that each of
        them has to count DP x CP times.

        Args:
            loss: mean over the tokens of this (dp, cp) part; zero on all stages but the last.
            stage: of the same pass.
        """
        dims = self.groups.dims
        return loss + dims.dp * dims.cp * sum(stage.losses.values(), torch.zeros_like(loss))

    def families(self) -> dict[str, Family]:
        """Return the family of every parameter by name, for a `GradientRegistry`.

        What is whole on each TP rank sees a piece of the tokens, or of the heads, there: its
        gradient is summed over TP too.
        """
        cuts = self.cuts()
        families = {n: Family.REPLICATED if c is None else Family.DENSE for n, c in cuts.items()}
        for name, layer in self.mixtures().items():
            families |= {f"{name}.{own}": kind for own, kind in layer.families().items()}
        return families

    def cuts(self) -> dict[str, int | None]:
        """Return along which dimension each parameter is cut over the TP group; None: it is not.

        The parameters of mixtures, which are cut otherwise, are left out.
        """
        cuts: dict[str, int | None] = {}
        parts: list[tuple[str, Embedding | Block | Head | None]] = [("embed", self.embed)]
        parts += [(f"blocks.{n}", block) for n, block in self._blocks()]
        for prefix, part in [*parts, ("head", self.head)]:
            if part is not None:
                cuts |= {f"{prefix}.{name}": cut for name, cut in part.cuts().items()}
        return cuts

    def mixtures(self) -> dict[str, MoeLayer]:
        """Return the mixture-of-experts layers by name."""
        layers = ((n, block.feed_forward) for n, block in self._blocks())
        return {f"blocks.{n}.feed_forward": m for n, m in layers if isinstance(m, MoeLayer)}

    def reset_parameters(self, seed: int) -> None:
        """Draw all weights anew, the same under every mapping: norms one, biases zero.

        Args:
            seed: the same on every rank.
        """
        cuts, tp = self.cuts(), self.groups["tp"]
        for name, weight in self.named_parameters():
            if name not in cuts:
                continue
            own = name.rpartition(".")[2]
            if own == "weight_D":
                nn.init.ones_(weight)
            elif own.startswith("b_"):
                nn.init.zeros_(weight)
            else:
                cut = cuts[name]
                width = weight.shape[-1] * (tp.size if cut == weight.dim() - 1 else 1)
                draw_part(weight, name, cut, tp, seed, width)
        for name, layer in self.mixtures().items():
            layer.reset_parameters(derived_seed(seed, name))

    def finish_step(self, bias_rate: float = 0.0) -> None:
        """Do what mixtures have to do after an optimizer's step; see `MoeLayer.finish_step`."""
        for layer in self.mixtures().values():
            layer.finish_step(bias_rate)

    def places(self, ids_BS: Tensor) -> Places:
        """Return the places of whole rows of one document each.

        Under context parallelism a rank has the parts of them that `take_tokens` gives.
        """
        tokens, cp = ids_BS.shape[-1], self.groups["cp"]
        rows = ids_BS.numel() // max(1, tokens)
        if cp.size == 1:
            return Places.whole(rows, tokens, ids_BS.device)
        positions_S = positions_of(tokens * cp.size, cp.index, cp.size).to(ids_BS.device)
        return Places(positions_S.expand(rows, -1))

    def _run(self, x_BTD: Tensor, places: Places) -> StageOutput:
        attention = self.config.attention
        turn = rotation(places.positions_BS, attention.rope, attention.head_dim, x_BTD.dtype)
        losses: dict[str, Tensor] = {}
        loads, dropped = {}, {}
        for n, block in self._blocks():
            x_BTD, out = block(x_BTD, places, turn)
            if out is not None:
                losses = {name: losses.get(name, 0) + loss for name, loss in out.losses.items()}
                loads[n], dropped[n] = out.counts_E, out.dropped
        return StageOutput(x_BTD, losses, loads, dropped)

    def _own_logits(self, x_BTD: Tensor, places: Places) -> tuple[Head, Tensor]:
        if self.head is None:
            raise LayoutError("only the last stage has a head; send what `run` returned there")
        tied_VD = self.embed.w_VD if self.head.w_VD is None and self.embed is not None else None
        logits_BSV: Tensor = self.head(x_BTD, places.positions_BS.shape[1], tied_VD)
        return self.head, logits_BSV

    def _blocks(self) -> list[tuple[int, Block]]:
        return [(int(n), block) for n, block in self.blocks.items() if isinstance(block, Block)]


def mean_loss(losses_BS: Tensor, labels_BS: Tensor) -> Tensor:
    """Return the mean over the labelled tokens; 0 where there is none.

    Args:
        losses_BS: of each token, 0 for those without a label.
        labels_BS: labels, or `UNLABELLED`.
    """
    return losses_BS.sum() / (labels_BS != UNLABELLED).sum().clamp_min(1)
