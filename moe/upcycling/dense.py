"""What a dense model's configuration says, with every default of its architecture filled in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe.errors import CheckpointError, UpcycleError

__all__ = ["ARCHITECTURES", "DenseConfig", "dense_config", "expected_shapes", "ffn_name"]

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "mistral": {
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768},
}
"""What `transformers` takes where a config.json leaves a field out, by model_type."""

ARCHITECTURES = tuple(sorted(DEFAULTS))
COMMON: Mapping[str, Any] = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "attention_dropout": 0.0,
    "use_cache": True,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
CARRIED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    *COMMON,
)
ROPE_THETA = 10000.0


@dataclass(frozen=True, slots=True)
class DenseConfig:
    """What upcycling needs to know of a dense model."""

    kind: str
    """model_type: one of `ARCHITECTURES`."""

    fields: Mapping[str, Any]
    """Fields that every architecture has, with defaults filled in."""

    inner: int
    """Width of the FFN."""

    head_dim: int
    """Width of an attention head."""

    rope_theta: float
    """Base of the rotary embedding."""

    rope_scaling: Mapping[str, Any] | None
    """How it is stretched; None: not at all."""

    sliding_window: int | None
    """How far attention looks back; None: to the beginning."""

    @property
    def hidden(self) -> int:
        """Width of a token."""
        return int(self.fields["hidden_size"])

    @property
    def num_layers(self) -> int:
        """How many layers there are."""
        return int(self.fields["num_hidden_layers"])

    @property
    def qkv_bias(self) -> bool:
        """Whether the projections into attention have a bias."""
        return self.kind == "qwen2"

    @property
    def tied(self) -> bool:
        """Whether the output shares the embedding's weight."""
        return bool(self.fields["tie_word_embeddings"])


def dense_config(told: Mapping[str, Any]) -> DenseConfig:
    """Read a config.json of a supported dense model, of any version of `transformers`.

    Args:
        told: what the file holds.

    Raises:
        UpcycleError: the architecture, or a part of it, has no place in a mixture of experts.
        CheckpointError: a field is missing or makes no sense.

    Example:
        >>> dense_config({"model_type": "gpt2"})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        moe.errors.UpcycleError: model_type 'gpt2' is not supported; supported are:...
    """
    kind = str(told.get("model_type"))
    if kind not in DEFAULTS:
        raise UpcycleError(
            f"model_type {kind!r} is not supported; supported are: {', '.join(ARCHITECTURES)}"
        )
    _refuse_what_has_no_place(told)
    filled = {**COMMON, **DEFAULTS[kind], **told}
    heads = _count(filled, "num_attention_heads")
    if filled["num_key_value_heads"] is None:
        filled["num_key_value_heads"] = heads
    for name in CARRIED[:6]:
        _count(filled, name)
    theta, scaling = _rope(told)
    fields = {name: filled[name] for name in CARRIED}
    return DenseConfig(
        kind,
        fields,
        _count(filled, "intermediate_size"),
        int(filled.get("head_dim") or filled["hidden_size"] // heads),
        theta,
        scaling,
        _window(filled),
    )


def _refuse_what_has_no_place(told: Mapping[str, Any]) -> None:
    for name in ("attention_bias", "mlp_bias"):
        if told.get(name):
            raise UpcycleError(f"{name}=true has no place in Mixtral or Qwen2-MoE checkpoints")
    if told.get("use_sliding_window"):
        raise UpcycleError(
            "use_sliding_window=true means different layers in different versions of Qwen2-MoE; "
            "set it to false in config.json if the context is short enough"
        )
    if told.get("quantization_config"):
        raise UpcycleError("the checkpoint is quantised; upcycle the one it was made from")


def _count(told: Mapping[str, Any], name: str) -> int:
    value = told.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"config.json: {name}={value!r}; needed is a whole number above 0")
    return value


def _rope(told: Mapping[str, Any]) -> tuple[float, Mapping[str, Any] | None]:
    """Return base and scaling from the fields of transformers 5 or, without those, of 4."""
    new = told.get("rope_parameters") or {}
    old = told.get("rope_scaling") or {}
    theta = new.get("rope_theta", told.get("rope_theta", old.get("rope_theta", ROPE_THETA)))
    scaling = {k: v for k, v in (new or old).items() if k not in ("rope_theta", "type")}
    scaling.setdefault("rope_type", (new or old).get("type", "default"))
    if scaling.pop("partial_rotary_factor", told.get("partial_rotary_factor")) not in (None, 1):
        raise UpcycleError("partial_rotary_factor has no place in Mixtral or Qwen2-MoE checkpoints")
    if not isinstance(theta, int | float) or theta <= 0:
        raise CheckpointError(f"config.json: rope_theta={theta!r}; needed is a number above 0")
    return float(theta), None if scaling["rope_type"] == "default" else scaling


def _window(filled: Mapping[str, Any]) -> int | None:
    """Return the sliding window, if it is ever shorter than the context."""
    window = filled.get("sliding_window") if filled["model_type"] == "mistral" else None
    return None if window is None or window >= filled["max_position_embeddings"] else int(window)


def ffn_name(layer: int, matrix: str) -> str:
    """Return the name of a dense FFN's matrix in a checkpoint.

    Example:
        >>> ffn_name(3, "gate")
        'model.layers.3.mlp.gate_proj.weight'
    """
    return f"model.layers.{layer}.mlp.{matrix}_proj.weight"


def expected_shapes(config: DenseConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor that the configuration promises.

    Args:
        config: of the dense model.
    """
    hidden, vocab = config.hidden, int(config.fields["vocab_size"])
    queries = int(config.fields["num_attention_heads"]) * config.head_dim
    keys = int(config.fields["num_key_value_heads"]) * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config.num_layers):
        own = f"model.layers.{layer}."
        shapes[own + "input_layernorm.weight"] = (hidden,)
        for name, width in (("q", queries), ("k", keys), ("v", keys)):
            shapes[f"{own}self_attn.{name}_proj.weight"] = (width, hidden)
            if config.qkv_bias:
                shapes[f"{own}self_attn.{name}_proj.bias"] = (width,)
        shapes[own + "self_attn.o_proj.weight"] = (hidden, queries)
        shapes[own + "post_attention_layernorm.weight"] = (hidden,)
        shapes[ffn_name(layer, "gate")] = (config.inner, hidden)
        shapes[ffn_name(layer, "up")] = (config.inner, hidden)
        shapes[ffn_name(layer, "down")] = (hidden, config.inner)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tied:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes
