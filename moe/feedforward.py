"""The dense feed-forward, its inner width cut over the TP group.

Shapes: B rows, T tokens of a rank, S of its TP group, D width of a token, F inner width on this
rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe.experts import activate
from moe.parallel.groups import Group
from moe.parallel.tensor import gather_sequence, own_slice, scatter_sequence

__all__ = ["FeedForward"]


class FeedForward(nn.Module):
    """SwiGLU: (silu(x W_gate) * (x W_up)) W_out.

    Args:
        hidden: width of a token, D.
        inner: inner width over all ranks.
        group: the TP group.
        device: where the weights live.
        dtype: of the weights.

    Raises:
        LayoutError: the inner width does not divide over the group.

    Example:
        >>> from moe.parallel.groups import Group
        >>> FeedForward(8, 16, Group()).w_in_2FD.shape  # gate, then up
        torch.Size([2, 16, 8])
    """

    def __init__(
        self,
        hidden: int,
        inner: int,
        group: Group,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.group = group
        own = own_slice("inner", inner, group)
        width = own.stop - own.start
        self.w_in_2FD = nn.Parameter(torch.empty(2, width, hidden, device=device, dtype=dtype))
        self.w_out_DF = nn.Parameter(torch.empty(hidden, width, device=device, dtype=dtype))

    def forward(self, x_BTD: Tensor, tokens: int) -> Tensor:
        """Run every token through the layer.

        Args:
            x_BTD: this rank's piece of the sequences.
            tokens: S.
        """
        x_BSD = gather_sequence(x_BTD, tokens, self.group)
        h_BSG = functional.linear(x_BSD, self.w_in_2FD.flatten(0, 1))
        a_NF = activate(h_BSG.flatten(0, 1), "swiglu")
        y_BSD = functional.linear(a_NF, self.w_out_DF).unflatten(0, x_BSD.shape[:2])
        return scatter_sequence(y_BSD, self.group)

    def cuts(self) -> dict[str, int | None]:
        """Return along which dimension each parameter is cut over the TP group."""
        return {"w_in_2FD": 1, "w_out_DF": 1}
