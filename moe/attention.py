"""Attention, its heads cut over the TP group; what tokens see is left to a core.

A core is a function of queries, keys and values of this rank's heads and tokens, and of where these
stand (`moe.places`). `local_core` is that of a rank that holds every token of its sequences;
context parallelism is another core.

Shapes: B rows, T tokens of a rank, S of its TP group, D width of a token; H query heads and J key
heads of this rank, C width of a head, Q = H C and K = J C.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe.model_config import AttentionConfig
from moe.norm import RMSNorm
from moe.parallel.groups import Group
from moe.parallel.tensor import gather_sequence, own_slice, scatter_sequence
from moe.places import Places, visible
from moe.rope import Rotation

__all__ = ["Attention", "AttentionCore", "local_core"]


class AttentionCore(Protocol):
    """Softmax attention over what each token sees."""

    def __call__(
        self,
        q_BSHC: Tensor,
        k_BSJC: Tensor,
        v_BSJC: Tensor,
        places: Places,
        window: int | None,
    ) -> Tensor:
        """Return o_BSHC, softmax(q k / sqrt(C)) v over the tokens that `moe.places.visible` tells.

        Args:
            q_BSHC: queries of this rank's tokens, already rotated.
            k_BSJC: keys, likewise; key head j serves the query heads from j H / J on.
            v_BSJC: values.
            places: where these tokens stand.
            window: how many tokens one sees at most, itself included; None: all before it.
        """
        ...


def local_core(
    q_BSHC: Tensor, k_BSJC: Tensor, v_BSJC: Tensor, places: Places, window: int | None
) -> Tensor:
    """Attend among the tokens that are here: an `AttentionCore` without context parallelism."""
    rows, tokens = q_BSHC.shape[:2]
    if not rows or not tokens:
        return q_BSHC
    mask_B1SS = None
    unlimited = window is None or window >= tokens
    if not (places.plain and unlimited):
        positions_BS, documents_BS = places.positions_BS, places.documents
        seen_BSS = visible(positions_BS, positions_BS, documents_BS, documents_BS, window)
        mask_B1SS = seen_BSS.unsqueeze(1)
    o_BHSC = functional.scaled_dot_product_attention(
        q_BSHC.transpose(1, 2),
        k_BSJC.transpose(1, 2),
        v_BSJC.transpose(1, 2),
        attn_mask=mask_B1SS,
        is_causal=mask_B1SS is None,
        enable_gqa=q_BSHC.shape[2] != k_BSJC.shape[2],
    )
    return o_BHSC.transpose(1, 2)


class Attention(nn.Module):
    """Projections of this rank's heads around a core.

    Args:
        config: of the attention.
        hidden: width of a token, D.
        eps: of the norms of queries and keys, where there are any.
        window: how many tokens one sees in this layer; None: all before it.
        group: the TP group.
        core: what tokens see.
        device: where the weights live.
        dtype: of the weights.

    Raises:
        LayoutError: the heads do not divide over the group.
    """

    b_q_Q: nn.Parameter | None
    b_k_K: nn.Parameter | None
    b_v_K: nn.Parameter | None

    def __init__(
        self,
        config: AttentionConfig,
        hidden: int,
        eps: float,
        window: int | None,
        group: Group,
        core: AttentionCore,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config, self.window, self.group, self.core = config, window, group, core
        heads = own_slice("heads", config.heads, group)
        kv_heads = own_slice("kv_heads", config.kv_heads, group)
        queries = (heads.stop - heads.start) * config.head_dim
        keys = (kv_heads.stop - kv_heads.start) * config.head_dim

        def made(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.w_q_QD = made(queries, hidden)
        self.w_k_KD = made(keys, hidden)
        self.w_v_KD = made(keys, hidden)
        self.w_o_DQ = made(hidden, queries)
        biased = config.qkv_bias
        self.register_parameter("b_q_Q", made(queries) if biased else None)
        self.register_parameter("b_k_K", made(keys) if biased else None)
        self.register_parameter("b_v_K", made(keys) if biased else None)
        normed = config.qk_norm
        self.q_norm = RMSNorm(config.head_dim, eps, device, dtype) if normed else None
        self.k_norm = RMSNorm(config.head_dim, eps, device, dtype) if normed else None

    def forward(self, x_BTD: Tensor, places: Places, rotation: Rotation) -> Tensor:
        """Let tokens look at those that they see.

        Args:
            x_BTD: this rank's piece of the sequences.
            places: where the tokens of all pieces stand, shape (B, S).
            rotation: of the same tokens.
        """
        x_BSD = gather_sequence(x_BTD, places.positions_BS.shape[1], self.group)
        q_BSHC = self._heads(x_BSD, self.w_q_QD, self.b_q_Q)
        k_BSJC = self._heads(x_BSD, self.w_k_KD, self.b_k_K)
        v_BSJC = self._heads(x_BSD, self.w_v_KD, self.b_v_K)
        if self.q_norm is not None and self.k_norm is not None:
            q_BSHC, k_BSJC = self.q_norm(q_BSHC), self.k_norm(k_BSJC)
        o_BSHC = self.core(rotation(q_BSHC), rotation(k_BSJC), v_BSJC, places, self.window)
        return scatter_sequence(functional.linear(o_BSHC.flatten(2), self.w_o_DQ), self.group)

    def cuts(self) -> dict[str, int | None]:
        """Return along which dimension each parameter is cut over the TP group; None: it is not."""
        last = {"w_o_DQ": 1, "q_norm.weight_D": None, "k_norm.weight_D": None}
        return {name: last.get(name, 0) for name, _ in self.named_parameters()}

    def _heads(self, x_BSD: Tensor, w_QD: Tensor, b_Q: Tensor | None) -> Tensor:
        return functional.linear(x_BSD, w_QD, b_Q).unflatten(2, (-1, self.config.head_dim))
