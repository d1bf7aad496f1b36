"""Dense checkpoints to convert: random models of `transformers`, and large ones of any size."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

__all__ = ["HIDDEN", "INNER", "KINDS", "VOCAB", "layer_bytes", "write_large", "write_random"]

KINDS = ("llama", "qwen2", "mistral")
VOCAB, HIDDEN, INNER = 32_000, 2048, 8192
"""Of the large model, in bfloat16: an FFN of 101 MB, an embedding of 131 MB."""


def write_random(path: Path, kind: str, seed: int) -> Path:
    """Write a small random model.

    Args:
        path: directory.
        kind: one of `KINDS`.
        seed: of the weights.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    classes = {
        "llama": transformers.LlamaConfig,
        "qwen2": transformers.Qwen2Config,
        "mistral": transformers.MistralConfig,
    }
    torch.manual_seed(seed)
    config = classes[kind](
        vocab_size=256,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.15)
    model.save_pretrained(path)
    return path


def layer_bytes() -> int:
    """Return the size of a layer of the large model."""
    return 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER + 2 * HIDDEN)


def write_large(path: Path, layers: int) -> int:
    """Write a large random Llama in bfloat16, one file per layer, and return its bytes.

    Args:
        path: directory.
        layers: how many.
    """
    path.mkdir(parents=True)
    told = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    }
    (path / "config.json").write_text(json.dumps(told))
    mapping: dict[str, str] = {}
    total = 0
    for number in range(layers + 1):
        shapes = _layer(number) if number < layers else _ends()
        tensors = {n: torch.randn(shape, dtype=torch.bfloat16) for n, shape in shapes.items()}
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, path / file, metadata={"format": "pt"})
        mapping |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": mapping}))
    return total


def _ends() -> dict[str, tuple[int, ...]]:
    return {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}


def _layer(number: int) -> dict[str, tuple[int, ...]]:
    own = f"model.layers.{number}."
    shapes: dict[str, tuple[int, ...]] = {
        f"{own}self_attn.{m}_proj.weight": (HIDDEN, HIDDEN) for m in "qkvo"
    }
    shapes |= {f"{own}{n}_layernorm.weight": (HIDDEN,) for n in ("input", "post_attention")}
    shapes |= {f"{own}mlp.{m}_proj.weight": (INNER, HIDDEN) for m in ("gate", "up")}
    return shapes | {f"{own}mlp.down_proj.weight": (HIDDEN, INNER)}
