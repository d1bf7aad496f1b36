"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["RMSNorm"]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, the mean over the last dimension, in float32 at least.

    Args:
        width: of the last dimension, D.
        eps: added to the mean square.
        device: where the weight lives.
        dtype: of the weight.

    Example:
        >>> RMSNorm(2, eps=1e-6)(torch.tensor([[3.0, 3.0]])).tolist()
        [[0.9999999403953552, 0.9999999403953552]]
    """

    def __init__(
        self,
        width: int,
        eps: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight_D = nn.Parameter(torch.ones(width, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise every token; rounded to the type of `x` before the weight is applied."""
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = exact.square().mean(-1, keepdim=True)
        return self.weight_D * (exact * (mean + self.eps).rsqrt()).to(x.dtype)
