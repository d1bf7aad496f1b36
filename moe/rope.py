"""Rotary embedding: queries and keys are turned by their positions.

Shapes: B rows, S tokens, H heads, C width of a head; a head's first half is paired with its second.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.model_config import RopeConfig

__all__ = ["Rotation", "frequencies", "rotation"]


@dataclass(frozen=True, slots=True)
class Rotation:
    """Cosines and sines of the angles of some tokens, both halves of a head alike."""

    cos_BSC: Tensor
    """In float32, or in float64 for a model in it."""

    sin_BSC: Tensor
    """Likewise."""

    def __call__(self, x_BSHC: Tensor) -> Tensor:
        """Turn every head, in the type that it has."""
        cos_BS1C = self.cos_BSC.unsqueeze(2).to(x_BSHC.dtype)
        sin_BS1C = self.sin_BSC.unsqueeze(2).to(x_BSHC.dtype)
        first, second = x_BSHC.chunk(2, dim=-1)
        return x_BSHC * cos_BS1C + torch.cat((-second, first), dim=-1) * sin_BS1C


def rotation(
    positions_BS: Tensor, config: RopeConfig, head_dim: int, dtype: torch.dtype = torch.float32
) -> Rotation:
    """Return the rotation of tokens at some positions.

    Args:
        positions_BS: whole numbers.
        config: of the embedding.
        head_dim: width of a head, C.
        dtype: that angles are computed in; float32 at least.

    Example:
        >>> turned = rotation(torch.tensor([[0, 1]]), RopeConfig(), 2)(torch.ones(1, 2, 1, 2))
        >>> [round(x, 4) for x in turned.flatten().tolist()]
        [1.0, 1.0, -0.3012, 1.3818]
    """
    exact = torch.promote_types(dtype, torch.float32)
    per_token = frequencies(config, head_dim).to(positions_BS.device)
    angles_BSC = positions_BS.unsqueeze(-1).to(exact) * per_token.to(exact)
    angles_BSC = torch.cat((angles_BSC, angles_BSC), dim=-1)
    return Rotation(angles_BSC.cos(), angles_BSC.sin())


def frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """Return the angle per position of each pair of a head, float32.

    ``llama3`` keeps a frequency f that turns more than `high_frequency` times over the original
    context, divides by the factor one that turns fewer than `low_frequency` times, and mixes both
    in between, linearly in the number of turns.

    Args:
        config: of the embedding.
        head_dim: width of a head.

    Example:
        >>> frequencies(RopeConfig(100.0), 4).tolist()
        [1.0, 0.10000000149011612]
    """
    own = 1.0 / config.theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    if config.kind == "default":
        return own
    slow = own / config.factor
    if config.kind == "linear":
        return slow
    turns = config.original_positions * own / (2 * math.pi)
    kept = (turns - config.low_frequency) / (config.high_frequency - config.low_frequency)
    between = (1 - kept) * slow + kept * own
    return torch.where(kept <= 0, slow, torch.where(kept >= 1, own, between))
