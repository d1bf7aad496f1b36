"""One layer of the transformer: attention, then a dense feed-forward or a mixture of experts.

Shapes: B rows, T tokens of a rank, S of its TP group, D width of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe.attention import Attention, AttentionCore
from moe.feedforward import FeedForward
from moe.layer import Execution, LayerOutput, MoeLayer
from moe.model_config import ModelConfig
from moe.norm import RMSNorm
from moe.parallel.groups import ProcessGroups
from moe.parallel.tensor import own_share
from moe.places import FARTHEST, Places
from moe.rope import Rotation

__all__ = ["Block"]


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)).

    Args:
        config: of the model.
        layer: number of this layer in it.
        groups: of the mapping.
        core: what tokens see.
        execution: how a mixture does its work.
        device: where the weights live.
        dtype: of the weights.

    Raises:
        LayoutError: heads, inner width or experts cannot be shared out.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        groups: ProcessGroups,
        core: AttentionCore,
        execution: Execution | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.group = group = groups["tp"]
        width, eps, attention = config.hidden, config.eps, config.attention
        window = attention.window_of(layer)
        self.attention_norm = RMSNorm(width, eps, device, dtype)
        self.attention = Attention(attention, width, eps, window, group, core, device, dtype)
        self.feed_forward_norm = RMSNorm(width, eps, device, dtype)
        moe = config.feed_forward.moe_of(layer)
        self.feed_forward: FeedForward | MoeLayer
        if moe is None:
            inner = config.feed_forward.inner
            self.feed_forward = FeedForward(width, inner, group, device, dtype)
        else:
            self.feed_forward = MoeLayer(moe, groups, execution, device, dtype, seed=0)

    def forward(
        self, x_BTD: Tensor, places: Places, rotation: Rotation
    ) -> tuple[Tensor, LayerOutput | None]:
        """Run the layer on this rank's piece of the sequences.

        Args:
            x_BTD: the piece.
            places: where the tokens of all pieces of the TP group stand.
            rotation: of the same tokens.

        Returns:
            The piece, and what a mixture tells beside it.
        """
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), places, rotation)
        h_BTD = self.feed_forward_norm(x_BTD)
        tokens = places.positions_BS.shape[1]
        if isinstance(self.feed_forward, FeedForward):
            return x_BTD + self.feed_forward(h_BTD, tokens), None
        valid_BS, own = places.valid_BS, own_share(tokens, self.group)
        valid_BT = None if valid_BS is None else valid_BS[:, own].contiguous()
        out: LayerOutput = self.feed_forward(h_BTD, valid_BT, self._order(places, own))
        return x_BTD + out.y, out

    def _order(self, places: Places, own: slice) -> Tensor | None:
        """Return what ascends along each row, for those who drop what comes late."""
        if places.plain:
            return None
        order_BS, documents_BS = places.positions_BS, places.documents_BS
        if documents_BS is not None:
            order_BS = order_BS + documents_BS * FARTHEST
        return order_BS[:, own].contiguous()

    def cuts(self) -> dict[str, int | None]:
        """Return along which dimension each parameter is cut over the TP group, mixtures left out.

        A mixture is cut over other groups; see `MoeLayer.families` and `moe.experts.shard_experts`.
        """
        cuts: dict[str, int | None] = {
            "attention_norm.weight_D": None,
            "feed_forward_norm.weight_D": None,
        }
        cuts |= {f"attention.{name}": cut for name, cut in self.attention.cuts().items()}
        if isinstance(self.feed_forward, FeedForward):
            own = self.feed_forward.cuts()
            cuts |= {f"feed_forward.{name}": cut for name, cut in own.items()}
        return cuts
