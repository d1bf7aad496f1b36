"""Small random dense models of `transformers`, written to disk, and what models on disk compute."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moe.upcycling import Options, UpcycleConfig, upcycle

VOCAB, HIDDEN, INNER, LAYERS = 97, 64, 128, 2
KINDS = ("llama", "qwen2", "mistral")
QUIET = Options(measure=False)


@contextmanager
def quietly() -> Iterator[Any]:
    """Give `transformers`, whose warnings are theirs to fix."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers", exc_type=ImportError)
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        yield transformers


def write_dense(path: Path, kind: str = "llama", **settings: Any) -> Path:
    """Write a random model; `dtype`, `shard` and `seed` are not its configuration's."""
    dtype = settings.pop("dtype", torch.float32)
    shard = settings.pop("shard", None)
    torch.manual_seed(settings.pop("seed", 0))
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    with quietly() as transformers:
        classes = {
            "llama": transformers.LlamaConfig,
            "qwen2": transformers.Qwen2Config,
            "mistral": transformers.MistralConfig,
        }
        model = transformers.AutoModelForCausalLM.from_config(classes[kind](**sizes | settings))
        for weight in model.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.15)
            else:
                nn.init.uniform_(weight, 0.5, 1.5)
        model.to(dtype).save_pretrained(path, **({"max_shard_size": shard} if shard else {}))
    return path


def logits(path: Path) -> Tensor:
    """Return what a model on disk makes of some tokens, in float32."""
    ids = (torch.arange(64) * 37 % VOCAB).view(1, -1)
    with quietly() as transformers, torch.no_grad():
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True
        )
        assert not any(loading.values()), loading
        found: Tensor = model.eval()(ids).logits[0]
    return found


def error_of(source: Path, target: Path, config: UpcycleConfig) -> float:
    """Convert, and return the relative error of the logits."""
    upcycle(source, target, config, options=QUIET)
    dense = logits(source)
    return float((logits(target) - dense).norm() / dense.norm())


def weights(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint."""
    found: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= load_file(file)
    return found


def change_config(path: Path, **changes: Any) -> None:
    """Change fields of a config.json."""
    told = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(told | changes))


def write_plain(path: Path, layers: int = 2, hidden: int = 16, inner: int = 32) -> Path:
    """Write a checkpoint without `transformers`: a Llama with a tied embedding."""
    path.mkdir()
    told = {
        "model_type": "llama",
        "vocab_size": 32,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "tie_word_embeddings": True,
    }
    (path / "config.json").write_text(json.dumps(told))
    draw = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens.weight": (32, hidden), "model.norm.weight": (hidden,)}
    for n in range(layers):
        own = f"model.layers.{n}."
        shapes |= {f"{own}self_attn.{m}_proj.weight": (hidden, hidden) for m in "qkvo"}
        shapes |= {
            own + "input_layernorm.weight": (hidden,),
            own + "post_attention_layernorm.weight": (hidden,),
            own + "mlp.gate_proj.weight": (inner, hidden),
            own + "mlp.up_proj.weight": (inner, hidden),
            own + "mlp.down_proj.weight": (hidden, inner),
        }
    tensors = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path
