"""What becomes of a dense FFN's matrices: pure functions of tensors and seeds.

Matrices are as checkpoints have them: gate and up of shape (F, D), down of shape (D, F), F the
inner width. `NEURONS` tells along which dimension a matrix has its neurons.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import torch
from torch import Tensor

from moe.errors import UpcycleError
from moe.upcycling.config import UpcycleConfig

__all__ = [
    "MATRICES",
    "NEURONS",
    "Matrix",
    "add_noise",
    "average",
    "dropped_neurons",
    "generator",
    "redraw",
    "routed_shard",
    "shard_bounds",
]

Matrix = Literal["gate", "up", "down"]
MATRICES: tuple[Matrix, ...] = ("gate", "up", "down")
NEURONS = {"gate": 0, "up": 0, "down": 1}


def generator(seed: int, *names: object) -> torch.Generator:
    """Return a generator of its own for everything that is drawn.

    What is drawn for one tensor depends on no other, so that any rank and any resumed conversion
    draws the same.

    Args:
        seed: of the conversion.
        names: of what is drawn.
    """
    told = "/".join(map(str, (seed, *names)))
    number = int.from_bytes(hashlib.sha256(told.encode()).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(number)


def shard_bounds(inner: int, shards: int, shard: int, count: int = 1) -> tuple[int, int]:
    """Return where some neighbouring shards of the inner width begin and end.

    Args:
        inner: width of the dense FFN, F.
        shards: in how many it is cut.
        shard: the first one wanted.
        count: how many.

    Raises:
        UpcycleError: the width does not divide.

    Example:
        >>> shard_bounds(12, 4, 1)
        (3, 6)
    """
    if inner % shards:
        raise UpcycleError(
            f"the FFN's width {inner} is not divisible by granularity={shards}; "
            "give a divisor of it"
        )
    width = inner // shards
    return shard * width, (shard + count) * width


def routed_shard(config: UpcycleConfig, expert: int) -> int:
    """Return which shard of the dense FFN an expert holds: S + (e mod R), after S shared ones.

    Example:
        >>> config = UpcycleConfig(4, 2, method="virtual-group", granularity=2)
        >>> [routed_shard(config, e) for e in range(4)]
        [0, 1, 0, 1]
    """
    return config.shared_experts + expert % config.routed_shards


def dropped_neurons(
    config: UpcycleConfig, inner: int, layer: int, expert: int, m: Matrix
) -> Tensor:
    """Return which neurons of an expert are drawn anew, sorted; the same for all matrices, or not.

    ``neuron``: a neuron that goes, goes from gate, up and down together. ``matrix``: each matrix
    has a choice of its own, so that most neurons are left with parts of both kinds.

    Args:
        config: has fraction, scope and seed.
        inner: width of the expert.
        layer: its layer.
        expert: its number.
        m: which matrix.
    """
    scope = m if config.drop_scope == "matrix" else "all"
    draw = generator(config.seed, "dropped", layer, expert, scope)
    count = round(config.fraction * inner)
    return torch.randperm(inner, generator=draw)[:count].sort().values


def redraw(w: Tensor, neurons: Tensor, dim: int, draw: torch.Generator) -> Tensor:
    """Return a matrix with some neurons drawn from the normal distribution of what they replace.

    Drop-Upcycling: the new weights have the mean and the standard deviation of the old ones.

    Args:
        w: matrix.
        neurons: which ones.
        dim: along which dimension they lie.
        draw: where randomness comes from.
    """
    if not len(neurons):
        return w
    old = w.index_select(dim, neurons).float()
    new = torch.empty_like(old).normal_(generator=draw)
    new.mul_(old.std(correction=0)).add_(old.mean())
    return w.index_copy(dim, neurons, new.to(w.dtype))


def add_noise(w: Tensor, scale: float, draw: torch.Generator) -> Tensor:
    """Return w + scale * std(w) * z, z standard normal; computed in float32, rounded once.

    Args:
        w: matrix.
        scale: relative size.
        draw: where randomness comes from.
    """
    exact = w.to(torch.float32, copy=True)
    noise = torch.empty_like(exact).normal_(generator=draw)
    exact.add_(noise.mul_(scale * exact.std(correction=0)))
    del noise
    return exact.to(w.dtype)


def average(parts: list[Tensor]) -> Tensor:
    """Return the mean of tensors, added up in float32 in their order and rounded once.

    Example:
        >>> average([torch.tensor([1.0]), torch.tensor([3.0])]).tolist()
        [2.0]
    """
    total = parts[0].float().clone()
    for part in parts[1:]:
        total += part.float()
    return (total / len(parts)).to(parts[0].dtype)
