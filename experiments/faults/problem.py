"""A convex problem whose optimum is known: streaming least squares."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["NOISE", "SPREAD", "Rows", "distance", "optimum"]

SPREAD = 1.0
"""Standard deviation of the optimum's coordinates; training starts at 0."""

NOISE = 0.1
"""Standard deviation of the right hand sides' noise: updates never become 0."""


def optimum(size: int, seed: int) -> Tensor:
    """Return the one point where the expected loss is least.

    Args:
        size: number of unknowns.
        seed: of the problem.
    """
    generator = np.random.default_rng([seed, 0])
    return torch.from_numpy(generator.normal(0.0, SPREAD, size).astype(np.float32))


def distance(point: Tensor, seed: int) -> float:
    """Return how far a point is from the optimum, where the start has distance 1.

    Example:
        >>> distance(torch.zeros(8), seed=1), distance(optimum(8, seed=1), seed=1)
        (1.0, 0.0)
    """
    best = optimum(point.numel(), seed)
    return float((point - best).norm() / best.norm())


class Rows:
    """Random rows ``a`` with noisy right hand sides ``a . optimum + e``.

    ``loss(x) = mean((a . (x - optimum) - e)^2) / 2``; its expectation is
    ``(|x - optimum|^2 + NOISE^2) / 2``.

    Args:
        size: number of unknowns.
        seed: of the problem.
        stream: which rows are drawn; each worker, and each of its lives, has its own.
    """

    def __init__(self, size: int, seed: int, stream: tuple[int, ...]) -> None:
        """Fix the optimum."""
        self._optimum = optimum(size, seed)
        self._random = np.random.default_rng([seed, *stream])

    def loss(self, point: Tensor, count: int = 16) -> Tensor:
        """Return the loss over fresh rows.

        Args:
            point: ``[size]``.
            count: rows to draw.
        """
        drawn = self._random.standard_normal((count, point.numel()), dtype=np.float32)
        noise = torch.from_numpy(self._random.normal(0.0, NOISE, count).astype(np.float32))
        return ((torch.from_numpy(drawn) @ (point - self._optimum) - noise) ** 2).mean() / 2
