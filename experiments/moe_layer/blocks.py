"""The same layer three times: ours, ours with the plain loop, and that of `transformers`."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from experiments.moe_layer.shapes import Shape
from moe.experts import Experts, SharedExpert
from moe.layer import MoeLayer
from moe.parallel.groups import single

__all__ = ["Block", "ours", "plain_loop", "step", "theirs"]

Block = Callable[[Tensor], Tensor]


def ours(shape: Shape, device: torch.device, dtype: torch.dtype) -> MoeLayer:
    """Return the layer on one rank, with random weights."""
    return MoeLayer(shape.config, single(), device=device, dtype=dtype)


class _Looping(Experts):
    """Experts that always run their definition."""

    def forward(self, x_ND: Tensor, counts_L: Any, weights_N: Tensor | None = None) -> Tensor:
        return self.loop(x_ND, counts_L, weights_N)


def plain_loop(layer: MoeLayer, shape: Shape) -> MoeLayer:
    """Return a layer with the same weights whose experts run one after another."""
    other = ours(shape, layer.experts.w_in_LDG.device, layer.experts.w_in_LDG.dtype)
    other.load_state_dict(layer.state_dict())
    other.experts.__class__ = _Looping
    return other


def theirs(layer: MoeLayer, shape: Shape, implementation: str) -> nn.Module | None:
    """Return the block of `transformers` with the same weights; None where it is not installed.

    Args:
        layer: ours.
        shape: of the layer.
        implementation: how it runs experts: ``"eager"`` or ``"grouped_mm"``.
    """
    family = "qwen2_moe" if shape.shared else "mixtral"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs to fix
        try:
            module: Any = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        except ImportError:
            return None
    common: dict[str, Any] = {"hidden_size": shape.hidden, "num_experts_per_tok": shape.top_k}
    if shape.shared:
        config = module.Qwen2MoeConfig(
            moe_intermediate_size=shape.intermediate,
            shared_expert_intermediate_size=shape.shared,
            num_experts=shape.experts,
            norm_topk_prob=shape.renormalise,
            **common,
        )
        made = module.Qwen2MoeSparseMoeBlock
    else:
        config = module.MixtralConfig(
            intermediate_size=shape.intermediate, num_local_experts=shape.experts, **common
        )
        made = module.MixtralSparseMoeBlock
    config._experts_implementation = implementation
    weight = layer.experts.w_in_LDG
    with torch.device(weight.device):
        block: Any = made(config).to(weight.dtype)
    _copy(layer, block)
    return _Flat(block)


class _Flat(nn.Module):
    """A block for tokens without a batch dimension."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD: Tensor = self.block(x_TD.unsqueeze(0)).squeeze(0)
        return y_TD


@torch.no_grad()
def _copy(layer: MoeLayer, block: Any) -> None:
    block.gate.weight.copy_(layer.router.weight_ED)
    block.experts.gate_up_proj.copy_(layer.experts.w_in_LDG.transpose(1, 2))
    block.experts.down_proj.copy_(layer.experts.w_out_LFD.transpose(1, 2))
    shared = layer.shared
    if isinstance(shared, SharedExpert):
        gate, up = shared.w_in_DG.T.chunk(2)
        block.shared_expert.gate_proj.weight.copy_(gate)
        block.shared_expert.up_proj.weight.copy_(up)
        block.shared_expert.down_proj.weight.copy_(shared.w_out_FD.T)
        assert shared.gate_D is not None
        block.shared_expert_gate.weight.copy_(shared.gate_D.unsqueeze(0))


def step(block: nn.Module, x_TD: Tensor, head_TD: Tensor) -> Callable[[], Tensor]:
    """Return a function that runs a block forwards and backwards, and returns its output."""

    def run() -> Tensor:
        block.zero_grad(set_to_none=True)
        x = x_TD.detach().requires_grad_()
        found = block(x)
        y: Tensor = found if isinstance(found, Tensor) else found.y
        y.backward(head_TD)
        return y.detach()

    return run
