"""The experts: one weight tensor for all of a rank's, one grouped GEMM for each projection.

With rows x of one expert, weights p of the rows, and phi the activation,

    y = (p * phi(x W_in)) W_out

which is p * (phi(x W_in) W_out), since there is no bias. Under expert tensor parallelism a rank has
a slice of the inner width; its y is a part of a sum over the ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from moe.config import Activation, ExpertConfig
from moe.errors import LayoutError, RoutingError
from moe.kernels import kernels

__all__ = [
    "Experts",
    "SharedExpert",
    "activate",
    "can_group",
    "compute_type",
    "grouped_linear",
    "loop_linear",
    "shard_experts",
]

GROUPED_TYPES = (torch.bfloat16, torch.float16, torch.float32)
ALIGNMENT_BYTES = 16


def loop_linear(x_ND: Tensor, w_LDG: Tensor, counts: Sequence[int]) -> Tensor:
    """Multiply each expert's rows with its matrix, one expert after another: the definition.

    Args:
        x_ND: rows, those of an expert side by side.
        w_LDG: one matrix per expert.
        counts: rows per expert, which sum to N.

    Returns:
        Shape (N, G). Experts without a row get a gradient of zero.
    """
    parts = [x @ w for x, w in zip(x_ND.split(list(counts)), w_LDG.unbind(), strict=True)]
    return torch.cat(parts)


def grouped_linear(x_ND: Tensor, w_LDG: Tensor, ends_L: Tensor) -> Tensor:
    """Compute `loop_linear` with torch's grouped GEMM; `can_group` says where that works.

    Args:
        x_ND: rows, those of an expert side by side.
        w_LDG: one matrix per expert.
        ends_L: int32, where each expert's rows end.
    """
    y_NG = functional.grouped_mm(x_ND, w_LDG, offs=ends_L)
    if y_NG.requires_grad:
        # the kernel refuses expanded gradients, such as those of a sum
        y_NG.register_hook(Tensor.contiguous)
    return y_NG


def can_group(x_ND: Tensor, *weights: Tensor) -> bool:
    """Return whether torch's grouped GEMM takes these rows and matrices, forwards and backwards.

    It needs at least one row, a common type out of `GROUPED_TYPES` (bfloat16 alone on a GPU),
    contiguous memory, and rows that begin at multiples of 16 bytes, those in between included.
    """
    tensors = (x_ND, *weights)
    if any(t.dtype != x_ND.dtype or not t.is_contiguous() for t in tensors):
        return False
    if x_ND.dtype not in (GROUPED_TYPES if x_ND.device.type == "cpu" else (torch.bfloat16,)):
        return False
    widths = {size for t in weights for size in t.shape[-2:]}
    # an empty gradient counts as contiguous however it is expanded, and is refused for it
    return (
        x_ND.shape[0] > 0
        and all(width * x_ND.element_size() % ALIGNMENT_BYTES == 0 for width in widths)
        and all(t.data_ptr() % ALIGNMENT_BYTES == 0 for t in tensors)
    )


def compute_type(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """Return the type to which autocast casts rows and weights; None: they stay as they are.

    It depends on types and on autocast's state alone, never on how many rows there are or which
    kernel takes them, so that ranks that exchange rows agree on it. As everywhere in torch,
    autocast leaves float64 alone.

    Args:
        x: rows.
        weight: what they are multiplied with.

    Example:
        >>> x = torch.ones(2, 3)
        >>> with torch.autocast("cpu", dtype=torch.bfloat16):
        ...     compute_type(x, x), compute_type(x.double(), x.double())
        (torch.bfloat16, None)
    """
    kind = x.device.type
    exact = torch.float64 in (x.dtype, weight.dtype)
    if exact or not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def activate(h_NG: Tensor, kind: Activation, weights_N: Tensor | None = None) -> Tensor:
    """Apply an activation and weigh the rows; only `h_NG` is kept for the backward pass.

    Args:
        h_NG: output of the first projection; for ``swiglu`` the gate is the first half of a row.
        kind: which activation.
        weights_N: factor of each row; None: one.

    Returns:
        Shape (N, F) in the type of `h_NG`, rounded once; differentiable once.

    Example:
        >>> activate(torch.tensor([[-1.0, 2.0]]), "squared_relu").tolist()
        [[0.0, 4.0]]
    """
    a_NF: Tensor = _Activate.apply(h_NG, weights_N, kind == "swiglu")
    return a_NF


class _Activate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_NG: Tensor, weights_N: Tensor | None, gated: bool) -> Tensor:
        ctx.gated = gated
        ctx.save_for_backward(h_NG, weights_N)
        return kernels(h_NG.device).activate_rows(h_NG, weights_N, gated=gated)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor, Tensor | None, None]:
        h_NG, weights_N = ctx.saved_tensors
        chosen = kernels(h_NG.device)
        return *chosen.activate_rows_back(grad_NF, h_NG, weights_N, gated=ctx.gated), None


def shard_experts(
    full: Tensor,
    name: str,
    config: ExpertConfig,
    experts: range,
    etp_size: int = 1,
    etp_index: int = 0,
) -> Tensor:
    """Return one rank's slice of a tensor of all experts: a weight or its gradient.

    Gate and up are cut apart before they are sliced, so that a slice is gate first, up second.

    Args:
        full: of all experts, as in an `Experts` that has them all.
        name: ``"w_in_LDG"`` or ``"w_out_LFD"``.
        config: of the experts.
        experts: which of them the rank has.
        etp_size: ranks that share an expert.
        etp_index: which of them this is.
    """
    part = _inner_width(config, etp_size)
    inner = slice(etp_index * part, (etp_index + 1) * part)
    mine = full[experts.start : experts.stop]
    if name == "w_out_LFD":
        return mine[:, inner].contiguous()
    halves = mine.unflatten(2, (2 if config.gated else 1, config.intermediate))
    return halves[..., inner].flatten(2).contiguous()


def _inner_width(config: ExpertConfig, etp_size: int) -> int:
    if etp_size < 1 or config.intermediate % etp_size:
        # which other etp fits depends on the whole mapping, but any mapping takes another width
        below = config.intermediate // etp_size * etp_size if etp_size > 0 else 0
        near = [width for width in (below, below + etp_size) if width > 0]
        remedy = f"the nearest widths that do are {' or '.join(map(str, near))}"
        raise LayoutError(
            f"the experts' inner width of {config.intermediate} does not divide over "
            f"etp={etp_size} ranks; {remedy if near else 'give at least one rank'}"
        )
    return config.intermediate // etp_size


class Experts(nn.Module):
    """A rank's experts.

    Args:
        config: size and kind.
        local_experts: how many this rank has, L.
        etp_size: ranks that share each of them.
        etp_index: which of these ranks this is.
        device: where the weights live.
        dtype: of the weights.

    Example:
        >>> experts = Experts(ExpertConfig(hidden=8, intermediate=16), local_experts=2)
        >>> experts(torch.ones(3, 8), [3, 0]).shape
        torch.Size([3, 8])
    """

    def __init__(
        self,
        config: ExpertConfig,
        local_experts: int,
        *,
        etp_size: int = 1,
        etp_index: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if local_experts < 1:
            raise LayoutError(f"a rank cannot have {local_experts} experts; give at least one")
        if not 0 <= etp_index < etp_size:
            raise LayoutError(f"etp_index={etp_index} is not in [0, {etp_size})")
        self.config, self.etp_size, self.etp_index = config, etp_size, etp_index
        part = _inner_width(config, etp_size)
        shape_in = local_experts, config.hidden, part * (2 if config.gated else 1)
        shape_out = local_experts, part, config.hidden
        self.w_in_LDG = _normal(shape_in, config.hidden, device, dtype)
        self.w_out_LFD = _normal(shape_out, config.intermediate, device, dtype)

    def forward(
        self, x_ND: Tensor, counts_L: Tensor | Sequence[int], weights_N: Tensor | None = None
    ) -> Tensor:
        """Run every row through its expert.

        Args:
            x_ND: rows, those of an expert side by side.
            counts_L: rows per expert. They sum to N; counts on a GPU are not checked for it, since
                that would wait for the device.
            weights_N: factor of each row, in any float type; None: one.

        Returns:
            y_ND, a part of a sum over the ranks that share the experts; in the type of the rows,
            or in `compute_type` under autocast.

        Raises:
            RoutingError: the counts are not those of the rows.
        """
        x_ND, w_in_LDG, w_out_LFD = self._cast(x_ND)
        if can_group(x_ND, w_in_LDG, w_out_LFD):
            ends_L = self._ends(x_ND, counts_L)
            h_NG = grouped_linear(x_ND, w_in_LDG, ends_L)
            a_NF = activate(h_NG, self.config.activation, weights_N)
            return grouped_linear(a_NF, w_out_LFD, ends_L)
        return self.loop(x_ND, counts_L, weights_N)

    def loop(
        self, x_ND: Tensor, counts_L: Tensor | Sequence[int], weights_N: Tensor | None = None
    ) -> Tensor:
        """Run the definition: a plain loop over the experts, for any type and any shape."""
        counts = counts_L.tolist() if isinstance(counts_L, Tensor) else list(counts_L)
        self._check(x_ND, counts)
        x_ND, w_in_LDG, w_out_LFD = self._cast(x_ND)
        h_NG = loop_linear(x_ND, w_in_LDG, counts)
        return loop_linear(activate(h_NG, self.config.activation, weights_N), w_out_LFD, counts)

    def _cast(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return rows and weights in the type that they are multiplied in."""
        dtype = compute_type(x_ND, self.w_in_LDG)
        if dtype is None:
            return x_ND, self.w_in_LDG, self.w_out_LFD
        return x_ND.to(dtype), self.w_in_LDG.to(dtype), self.w_out_LFD.to(dtype)

    def _ends(self, x_ND: Tensor, counts_L: Tensor | Sequence[int]) -> Tensor:
        if isinstance(counts_L, Tensor) and counts_L.device.type != "cpu":
            return counts_L.cumsum(0, dtype=torch.int32)
        counts = torch.as_tensor(counts_L, dtype=torch.int64)
        self._check(x_ND, counts.tolist())
        return counts.cumsum(0, dtype=torch.int32).to(x_ND.device, non_blocking=True)

    def _check(self, x_ND: Tensor, counts: list[int]) -> None:
        if len(counts) != self.w_in_LDG.shape[0] or sum(counts) != x_ND.shape[0]:
            raise RoutingError(
                f"{len(counts)} counts of {sum(counts)} rows for {self.w_in_LDG.shape[0]} experts "
                f"and {x_ND.shape[0]} rows; they have to be the same"
            )

    @torch.no_grad()
    def load_full(self, state: Mapping[str, Tensor], first_expert: int = 0) -> None:
        """Take this rank's slice of the weights of all experts.

        Args:
            state: `state_dict` of an `Experts` that has all of them, whole.
            first_expert: number of this rank's first one.
        """
        mine = range(first_expert, first_expert + self.w_in_LDG.shape[0])
        for name, weight in self.named_parameters():
            part = shard_experts(
                state[name], name, self.config, mine, self.etp_size, self.etp_index
            )
            weight.copy_(part)


class SharedExpert(nn.Module):
    """The expert that every token goes to, with or without a sigmoid gate.

    Args:
        config: its inner width is `shared`, its gate `shared_gate`.
        device: where the weights live.
        dtype: of the weights.

    Example:
        >>> shared = SharedExpert(ExpertConfig(hidden=8, intermediate=16, shared=4))
        >>> shared(torch.ones(3, 8)).shape
        torch.Size([3, 8])
    """

    gate_D: nn.Parameter | None

    def __init__(
        self,
        config: ExpertConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not config.shared:
            raise LayoutError("there is no shared expert; give ExpertConfig.shared a width")
        self.activation: Activation = config.activation
        width = config.shared * (2 if config.gated else 1)
        self.w_in_DG = _normal((config.hidden, width), config.hidden, device, dtype)
        self.w_out_FD = _normal((config.shared, config.hidden), config.shared, device, dtype)
        gate_D = (
            _normal((config.hidden,), config.hidden, device, dtype) if config.shared_gate else None
        )
        self.register_parameter("gate_D", gate_D)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Run every token through the expert."""
        y_TD = activate(x_TD @ self.w_in_DG, self.activation) @ self.w_out_FD
        if self.gate_D is None:
            return y_TD
        return y_TD * (x_TD @ self.gate_D).sigmoid().unsqueeze(-1)


def _normal(
    shape: tuple[int, ...],
    fan_in: int,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Parameter:
    weight = torch.empty(shape, device=device, dtype=dtype)
    return nn.Parameter(nn.init.normal_(weight, std=fan_in**-0.5))
