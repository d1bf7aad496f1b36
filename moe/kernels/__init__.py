"""Moving rows between token order and expert order, and activations, in a device's fastest form."""

from __future__ import annotations

from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from moe.kernels import reference

__all__ = ["Kernels", "kernels"]


class Kernels(Protocol):
    """What an implementation offers; the definitions stand in `moe.kernels.reference`."""

    NAME: str
    """What the implementation is called in reports."""

    def gather_rows(
        self, x_TD: Tensor, source_N: Tensor, weights_N: Tensor | None = None
    ) -> Tensor:
        """Copy, and weigh, one token into each row."""
        ...

    def sum_rows(
        self, rows_ND: Tensor, position_TK: Tensor, weights_N: Tensor | None = None
    ) -> Tensor:
        """Add, weighted, each token's rows."""
        ...

    def dot_rows(self, x_TD: Tensor, rows_ND: Tensor, source_N: Tensor) -> Tensor:
        """Multiply each row with its token."""
        ...

    def activate_rows(
        self, h_NG: Tensor, weights_N: Tensor | None = None, *, gated: bool = True
    ) -> Tensor:
        """Apply the activation, and weigh the rows."""
        ...

    def activate_rows_back(
        self,
        grad_NF: Tensor,
        h_NG: Tensor,
        weights_N: Tensor | None = None,
        *,
        gated: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of `activate_rows`."""
        ...


def kernels(device: torch.device) -> Kernels:
    """Return the fastest implementation for tensors on a device.

    Args:
        device: where the rows are.

    Example:
        >>> kernels(torch.device("cpu")).NAME
        'torch'
    """
    return _for_type(device.type)


@cache
def _for_type(kind: str) -> Kernels:
    if kind != "cuda":
        return reference
    try:
        from moe.kernels import gpu
    except ImportError:  # builds of torch without Triton
        return reference
    return gpu
