"""Running dense models and mixtures on a text with `transformers`, and comparing them."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.config import RouterConfig
from moe.errors import CheckpointError, UpcycleError
from moe.router import route, tokens_per_expert
from moe.upcycling.config import UpcycleConfig
from moe.upcycling.making import Calibration
from moe.upcycling.routers import first_rows, mean_mass, split_groups, tied

__all__ = ["Observed", "calibrate", "compare", "has_transformers", "observe", "tokenize"]

SEQUENCE = 256
"""Tokens that a model sees at once."""

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(slots=True)
class Observed:
    """What a model did on a text."""

    logits: Tensor
    """Shape (tokens, vocabulary), float32."""

    output_rms: list[float] = field(default_factory=list)
    """Root mean square of what each layer's FFN or mixture gave."""

    router_logits: dict[int, Tensor] = field(default_factory=dict)
    """By layer, shape (tokens, experts), for those that are mixtures."""


def has_transformers() -> bool:
    """Tell whether models can be run."""
    return importlib.util.find_spec("transformers") is not None


def tokenize(path: Path, text: str, vocab: int, most: int) -> Tensor:
    """Return the first tokens of a text, cut into sequences, int64 (sequences, length).

    Where a checkpoint has no tokenizer, tokens are the bytes of the text modulo the vocabulary.

    Args:
        path: of the dense checkpoint.
        text: what is tokenized.
        vocab: size of the vocabulary.
        most: how many tokens at most.

    Raises:
        CheckpointError: the tokenizer cannot be loaded, or has tokens that the model has not.
        UpcycleError: the text is too short.
    """
    if any((path / name).is_file() for name in TOKENIZERS):
        ids = _tokenizer(path)(text)["input_ids"][:most]
        if ids and max(ids) >= vocab:
            raise CheckpointError(f"{path}: its tokenizer has more tokens than vocab_size={vocab}")
    else:
        ids = [byte % vocab for byte in text.encode()[:most]]
    if len(ids) < 2:
        raise UpcycleError("the text has fewer than 2 tokens; give a longer one")
    length = min(SEQUENCE, len(ids))
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def calibrate(
    path: Path, ids: Tensor, config: UpcycleConfig, layers: Sequence[int]
) -> dict[int, Calibration]:
    """Choose router rows and measure their top-k mass on the FFN inputs of the dense model.

    Args:
        path: of the dense checkpoint.
        ids: tokens.
        config: of the upcycling.
        layers: which become mixtures.
    """
    found: dict[int, Calibration] = {}

    def look(layer: int, inputs: Tensor) -> None:
        rows = first_rows(config, inputs.shape[1], layer, inputs)
        mass = mean_mass(config, inputs, tied(rows, config.routed_shards))
        found[layer] = Calibration(rows, mass)

    with _loaded(path) as model, torch.no_grad():
        for layer in layers:
            block = model.model.layers[layer].mlp
            # one batch: a centroid is that of all tokens
            block.register_forward_pre_hook(
                lambda _, args, layer=layer: look(layer, args[0].flatten(0, 1))
            )
        model(ids, use_cache=False)
    return found


def observe(path: Path, ids: Tensor) -> Observed:
    """Run a model of a directory on tokens.

    Args:
        path: of a dense checkpoint or a mixture.
        ids: tokens, shape (sequences, length).
    """
    with _loaded(path) as model, torch.no_grad():
        layers = model.model.layers
        squares = [0.0] * len(layers)
        routers: dict[int, list[Tensor]] = {}

        def add_squares(number: int, output: Tensor) -> None:
            squares[number] += float(output.double().square().sum())

        for number, layer in enumerate(layers):
            block = getattr(layer, "block_sparse_moe", None) or layer.mlp
            _on_output(block, number, add_squares)
            if hasattr(block, "gate"):
                routers[number] = []
                _on_output(block.gate, number, lambda n, logits: routers[n].append(logits.clone()))
        logits = torch.cat([model(row[None], use_cache=False).logits[0].float() for row in ids])
        count = ids.numel() * model.config.hidden_size
    rms = [(total / count) ** 0.5 for total in squares]
    return Observed(logits, rms, {n: torch.cat(parts) for n, parts in routers.items()})


def _on_output(module: Any, number: int, use: Callable[[int, Tensor], object]) -> None:
    """Have something told what a module returns, or the first part of it."""

    def hook(_: object, args: object, output: Any) -> None:
        use(number, output[0] if isinstance(output, tuple) else output)

    module.register_forward_hook(hook)


def compare(
    dense: Observed, mixture: Observed, config: UpcycleConfig, half: torch.dtype | None = None
) -> dict[str, Any]:
    """Return how far a mixture is from the dense model it was made of, as values of JSON.

    Args:
        dense: on a text.
        mixture: on the same text.
        config: of the upcycling.
        half: type of the weights if it is narrower than float32.
    """
    difference = mixture.logits - dense.logits
    ratios = [
        m / d if d else None for m, d in zip(mixture.output_rms, dense.output_rms, strict=True)
    ]
    return {
        "tokens": len(dense.logits),
        "relative_logit_error": float(difference.norm() / dense.logits.norm()),
        "largest_logit_difference": float(difference.abs().max()),
        "argmax_agreement": float(
            (mixture.logits.argmax(1) == dense.logits.argmax(1)).float().mean()
        ),
        "layer_output_ratio": ratios,
        "routers": [
            {"layer": layer, **_router_figures(logits.float(), config, half)}
            for layer, logits in sorted(mixture.router_logits.items())
        ],
    }


def _router_figures(
    logits: Tensor, config: UpcycleConfig, half: torch.dtype | None
) -> dict[str, Any]:
    """Return a router's entropy in nats, mean top-k mass, load of experts, and split groups."""
    routing = route(logits, RouterConfig(config.experts, config.top_k))
    p = routing.probabilities_TE
    figures = {
        "entropy": float(-(p * p.clamp_min(1e-30).log()).sum(dim=1).mean()),
        "top_k_mass": float(routing.weights_TK.sum(dim=1).mean()),
        "load": (tokens_per_expert(routing) / routing.experts_TK.numel()).tolist(),
        "tokens_with_split_groups": split_groups(routing.experts_TK, config.routed_shards),
    }
    if half is not None:
        # how a model that decides in its own type would choose
        chosen = logits.to(half).topk(config.top_k).indices
        figures["tokens_with_split_groups_in_half"] = split_groups(chosen, config.routed_shards)
    return figures


@contextmanager
def _loaded(path: Path) -> Iterator[Any]:
    """Load a model in float32, without progress bars, warnings or a look at the network."""
    transformers = _transformers()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # theirs to fix
            model = transformers.AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, local_files_only=True
            )
            yield model.eval()
    finally:
        transformers.utils.logging.set_verbosity(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def _transformers() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs to fix
        import transformers
    return transformers


def _tokenizer(path: Path) -> Any:
    try:
        return _transformers().AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: its tokenizer cannot be loaded: {error}") from error
