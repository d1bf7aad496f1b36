"""Reading a dense checkpoint slab by slab, after everything about it was checked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe.errors import CheckpointError
from moe.upcycling.dense import DenseConfig, dense_config, expected_shapes

__all__ = ["DenseCheckpoint", "Stored", "open_dense"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DERIVED = "rotary_emb.inv_freq"
"""End of the names of buffers that old checkpoints hold though they follow from the config."""

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SLAB_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies and what it is."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class DenseCheckpoint:
    """A dense checkpoint whose configuration, names, shapes and file lengths agree."""

    path: Path
    config: DenseConfig
    tensors: Mapping[str, Stored]

    def read(self, name: str) -> Tensor:
        """Read one tensor whole."""
        stored = self.tensors[name]
        whole, end = torch.empty(stored.shape, dtype=stored.dtype), 0
        for slab in self.slabs(name):
            whole[end : end + len(slab)] = slab
            end += len(slab)
        return whole

    def slabs(self, name: str) -> Iterator[Tensor]:
        """Read one tensor in parts along its first dimension, each of at most 32 MiB or one row.

        Raises:
            CheckpointError: the file cannot be read any more.
        """
        stored = self.tensors[name]
        rows = max(1, SLAB_BYTES * stored.shape[0] // max(1, stored.bytes))
        for start in range(0, stored.shape[0], rows):
            yield self.rows(name, start, min(start + rows, stored.shape[0]))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read some rows of a tensor.

        Raises:
            CheckpointError: the file cannot be read any more.
        """
        stored = self.tensors[name]
        try:
            # opened anew each time, so that pages that were read do not pile up
            with safe_open(self.path / stored.file, framework="pt") as file:
                return file.get_slice(name)[start:stop].clone()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self.path / stored.file}: cannot read {name}: {error}"
            ) from error


def open_dense(path: Path) -> DenseCheckpoint:
    """Open a dense checkpoint and check it without reading a weight.

    Args:
        path: directory with config.json and safetensors.

    Raises:
        CheckpointError: a file is missing or damaged, or the configuration contradicts the weights.
        UpcycleError: the architecture is not supported.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory; give one with config.json and weights")
    config = dense_config(_json(path / "config.json"))
    tensors: dict[str, Stored] = {}
    mapping = _weight_map(path)
    for name in sorted(set(mapping.values())) if mapping else [SINGLE]:
        for tensor, stored in _header(path, name):
            if mapping and mapping.get(tensor) != name:
                raise CheckpointError(f"{path / name} holds {tensor}, which {INDEX} does not say")
            tensors[tensor] = stored
    missing = sorted(set(mapping) - set(tensors))
    if missing:
        raise CheckpointError(f"{path}: {INDEX} promises {missing[0]}, which its file lacks")
    tensors = {name: at for name, at in tensors.items() if not name.endswith(DERIVED)}
    _compare(path, config, tensors)
    return DenseCheckpoint(path, config, tensors)


def _json(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(told, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return told


def _weight_map(path: Path) -> dict[str, str]:
    """Return which tensor lies in which file, nothing for a checkpoint of one file."""
    if not (path / INDEX).exists():
        if not (path / SINGLE).exists():
            raise CheckpointError(
                f"{path} has neither {SINGLE} nor {INDEX}; weights in other formats have to be "
                "saved as safetensors first"
            )
        return {}
    mapping = _json(path / INDEX).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise CheckpointError(f"{path / INDEX} has no weight_map")
    for file in set(mapping.values()):
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{path / INDEX} names {file!r}, which is not a plain file name")
        if not (path / file).exists():
            raise CheckpointError(f"{path / file} is missing, and {INDEX} needs it")
    return mapping


def _header(path: Path, file: str) -> Iterator[tuple[str, Stored]]:
    """Yield what a file holds; the library refuses one whose length is not as its header says."""
    try:
        with safe_open(path / file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                part = opened.get_slice(name)
                kind = part.get_dtype()
                if kind not in DTYPES:
                    raise CheckpointError(
                        f"{path / file}: {name} is of type {kind}; supported are "
                        + ", ".join(DTYPES)
                    )
                yield name, Stored(file, DTYPES[kind], tuple(part.get_shape()))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path / file} is damaged or cut short: {error}") from error


def _compare(path: Path, config: DenseConfig, tensors: Mapping[str, Stored]) -> None:
    """Refuse weights that are not the ones the configuration describes."""
    expected = expected_shapes(config)
    for name, shape in expected.items():
        if name not in tensors:
            raise CheckpointError(f"{path}: config.json promises {name}, which is missing")
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"{path}: {name} has shape {list(tensors[name].shape)}, where config.json "
                f"says {list(shape)}"
            )
    # tied embeddings are stored twice by some; the copy goes along as it is
    allowed = {*expected, "lm_head.weight"}
    strangers = sorted(set(tensors) - allowed)
    if strangers:
        raise CheckpointError(
            f"{path}: {strangers[0]} has no use in a {config.kind} model as config.json describes "
            "it; nothing is left out silently"
        )
