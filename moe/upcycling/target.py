"""Names and configuration of the result: those of Mixtral or of Qwen2-MoE, on disk.

Both are written as transformers 4 has them: one tensor per expert and matrix, `rope_theta` and
`rope_scaling` on top. transformers 5 reads that, while transformers 4 takes the packed names and
the `rope_parameters` of version 5 for nothing: random experts and a default base, without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from moe.errors import UpcycleError
from moe.upcycling.config import UpcycleConfig
from moe.upcycling.dense import DenseConfig

__all__ = [
    "Format",
    "choose_format",
    "expert_name",
    "mixture_layers",
    "router_name",
    "shared_name",
    "target_config",
]

Format = Literal["mixtral", "qwen2_moe"]
MIXTRAL = {"gate": "w1", "up": "w3", "down": "w2"}
CLASSES = {"mixtral": "MixtralForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM"}
BALANCE = 0.01
"""Coefficient of the load-balancing loss; the best of both papers' range."""


def mixture_layers(config: UpcycleConfig, dense: DenseConfig) -> tuple[int, ...]:
    """Return which layers become mixtures.

    Raises:
        UpcycleError: a layer is named that the model does not have.
    """
    if config.layers is None:
        return tuple(range(dense.num_layers))
    if not config.layers:
        raise UpcycleError("layers=() makes no layer a mixture; name at least one")
    for layer in config.layers:
        if not 0 <= layer < dense.num_layers:
            raise UpcycleError(f"layer {layer} does not exist; layers are 0-{dense.num_layers - 1}")
    return tuple(sorted(set(config.layers)))


def choose_format(config: UpcycleConfig, dense: DenseConfig) -> Format:
    """Return the format that holds the result: Mixtral where it can.

    Mixtral renormalises weights and has no bias, no shared expert and no dense layer.

    Raises:
        UpcycleError: neither format holds it.
    """
    mixed = len(mixture_layers(config, dense)) < dense.num_layers
    needs = {
        "routing softmax-topk": config.routing == "softmax-topk",
        "biases of attention": dense.qkv_bias,
        "shared experts": config.shared_experts > 0,
        "dense layers among the others": mixed,
    }
    reasons = [name for name, needed in needs.items() if needed]
    if not reasons:
        return "mixtral"
    heads = int(dense.fields["num_attention_heads"])
    if dense.head_dim * heads != dense.hidden:
        raise UpcycleError(
            f"{reasons[0]} needs the Qwen2-MoE format, which has no head_dim={dense.head_dim} "
            f"beside hidden_size={dense.hidden} and {heads} heads"
        )
    if dense.sliding_window is not None:
        raise UpcycleError(
            f"{reasons[0]} needs the Qwen2-MoE format, where sliding_window="
            f"{dense.sliding_window} means different things in different versions; set it to null "
            "in config.json if the context is short enough"
        )
    return "qwen2_moe"


def _block(form: Format, layer: int) -> str:
    return f"model.layers.{layer}." + ("block_sparse_moe" if form == "mixtral" else "mlp")


def router_name(form: Format, layer: int) -> str:
    """Return the name of a router's weight."""
    return f"{_block(form, layer)}.gate.weight"


def expert_name(form: Format, layer: int, expert: int, matrix: str) -> str:
    """Return the name of an expert's matrix.

    Example:
        >>> expert_name("mixtral", 0, 1, "down")
        'model.layers.0.block_sparse_moe.experts.1.w2.weight'
    """
    own = MIXTRAL[matrix] if form == "mixtral" else f"{matrix}_proj"
    return f"{_block(form, layer)}.experts.{expert}.{own}.weight"


def shared_name(layer: int, matrix: str) -> str:
    """Return the name of a matrix of the shared expert, or of its gate (``"gate_of"``)."""
    own = "_gate" if matrix == "gate_of" else f".{matrix}_proj"
    return f"{_block('qwen2_moe', layer)}.shared_expert{own}.weight"


def target_config(config: UpcycleConfig, dense: DenseConfig, dtype: str) -> dict[str, Any]:
    """Return what config.json of the result says.

    Args:
        config: of the upcycling.
        dense: what the source says.
        dtype: name of the weights' type, such as ``"bfloat16"``.

    Raises:
        UpcycleError: neither format holds it.
    """
    form = choose_format(config, dense)
    width = dense.inner // config.granularity
    common: Mapping[str, Any] = {
        "architectures": [CLASSES[form]],
        "model_type": form,
        **dense.fields,
        "rope_theta": dense.rope_theta,
        "rope_scaling": None if dense.rope_scaling is None else dict(dense.rope_scaling),
        "num_experts_per_tok": config.top_k,
        "output_router_logits": False,
        "router_aux_loss_coef": BALANCE,
        "torch_dtype": dtype,
    }
    if form == "mixtral":
        return {
            **common,
            "intermediate_size": width,
            "num_local_experts": config.experts,
            "head_dim": dense.head_dim,
            "sliding_window": dense.sliding_window,
            "router_jitter_noise": 0.0,
        }
    mixtures = set(mixture_layers(config, dense))
    return {
        **common,
        "intermediate_size": dense.inner,
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": width * config.shared_experts,
        "num_experts": config.experts,
        "norm_topk_prob": config.routing == "topk-softmax",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [n for n in range(dense.num_layers) if n not in mixtures],
        "qkv_bias": dense.qkv_bias,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": dense.num_layers,
    }
