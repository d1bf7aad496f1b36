"""Which tensor of the result comes from which of the source, decided before a weight is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from moe.errors import CheckpointError, UpcycleError
from moe.upcycling.config import UpcycleConfig
from moe.upcycling.dense import ffn_name
from moe.upcycling.methods import MATRICES, NEURONS, Matrix, shard_bounds
from moe.upcycling.source import DenseCheckpoint
from moe.upcycling.target import (
    Format,
    choose_format,
    expert_name,
    mixture_layers,
    router_name,
    shared_name,
    target_config,
)

__all__ = ["Kind", "Piece", "Plan", "make_plan"]

Kind = Literal["copy", "expert", "router", "shared", "shared-gate"]


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of the result."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    kind: Kind
    source: str | None = None
    """Name of the dense tensor that it is made of; None: it is drawn."""

    layer: int = -1
    matrix: Matrix = "gate"
    expert: int = -1

    @property
    def bytes(self) -> int:
        """Its size."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that will be written."""

    config: UpcycleConfig
    form: Format
    layers: tuple[int, ...]
    pieces: tuple[Piece, ...]
    target_config: dict[str, Any]

    @property
    def bytes(self) -> int:
        """Size of all tensors."""
        return sum(piece.bytes for piece in self.pieces)


def make_plan(config: UpcycleConfig, sources: Sequence[DenseCheckpoint]) -> Plan:
    """Plan a conversion, in the order in which it is written.

    Args:
        config: of the upcycling.
        sources: the dense checkpoint, and for ``branch-train-mix`` those of the other branches.

    Raises:
        UpcycleError: settings and model do not fit.
        CheckpointError: a tensor of the source would be used twice or not at all; branches differ.
    """
    first, *others = sources
    _check_branches(config, first, others)
    shard_bounds(first.config.inner, config.granularity, 0)
    form, layers = choose_format(config, first.config), mixture_layers(config, first.config)
    upcycled = {ffn_name(layer, m) for layer in layers for m in MATRICES}
    pieces = [
        Piece(name, stored.dtype, stored.shape, "copy", name)
        for name, stored in first.tensors.items()
        if name not in upcycled
    ]
    for layer in layers:
        pieces += _mixture(config, form, first, layer)
    _account(first, pieces)
    dtype = str(first.tensors["model.embed_tokens.weight"].dtype).removeprefix("torch.")
    told = target_config(config, first.config, dtype)
    return Plan(config, form, layers, tuple(pieces), told)


def _mixture(
    config: UpcycleConfig, form: Format, source: DenseCheckpoint, layer: int
) -> Iterator[Piece]:
    """Yield a layer's router, shared expert and experts, those of one matrix side by side."""
    hidden, inner = source.config.hidden, source.config.inner
    width, shared = inner // config.granularity, config.shared_experts
    dtype = source.tensors[ffn_name(layer, "gate")].dtype
    shape = (config.experts, hidden)
    yield Piece(router_name(form, layer), dtype, shape, "router", layer=layer)
    if form == "qwen2_moe":
        name = shared_name(layer, "gate_of")
        yield Piece(name, dtype, (1, hidden), "shared-gate", layer=layer)
    for m in MATRICES:
        name = ffn_name(layer, m)
        dtype = source.tensors[name].dtype
        if form == "qwen2_moe":
            size = _shape(m, width * shared, hidden)
            yield Piece(shared_name(layer, m), dtype, size, "shared", name, layer, m)
        size = _shape(m, width, hidden)
        for e in range(config.experts):
            yield Piece(expert_name(form, layer, e, m), dtype, size, "expert", name, layer, m, e)


def _shape(matrix: Matrix, width: int, hidden: int) -> tuple[int, int]:
    return (hidden, width) if NEURONS[matrix] else (width, hidden)


def _account(source: DenseCheckpoint, pieces: Sequence[Piece]) -> None:
    """Refuse a plan in which a tensor of the source is lost or has two destinations."""
    users: dict[str, set[str]] = {}
    for piece in pieces:
        if piece.source is not None:
            to = piece.name if piece.kind == "copy" else f"experts of layer {piece.layer}"
            users.setdefault(piece.source, set()).add(to)
    lost = sorted(set(source.tensors) - set(users))
    if lost:
        raise CheckpointError(f"{source.path}: {lost[0]} would not be used")
    twice = sorted(name for name, to in users.items() if len(to) > 1)
    if twice:
        raise CheckpointError(
            f"{source.path}: {twice[0]} would be used by {sorted(users[twice[0]])}"
        )
    names = [piece.name for piece in pieces]
    if len(set(names)) != len(names):
        raise CheckpointError(f"{source.path}: two tensors of the result have the same name")


def _check_branches(
    config: UpcycleConfig, first: DenseCheckpoint, others: Sequence[DenseCheckpoint]
) -> None:
    if config.method != "branch-train-mix":
        if others:
            raise UpcycleError("several dense checkpoints need --method branch-train-mix")
        return
    if not others:
        raise UpcycleError("branch-train-mix needs at least two dense checkpoints; give --branches")
    if config.experts % (1 + len(others)):
        raise UpcycleError(
            f"experts={config.experts} is not a multiple of the {1 + len(others)} dense checkpoints"
        )
    for other in others:
        if other.config != first.config:
            raise CheckpointError(f"{other.path}: its configuration is not that of {first.path}")
        if set(other.tensors) != set(first.tensors):
            raise CheckpointError(f"{other.path}: it holds other tensors than {first.path}")
        for name, stored in first.tensors.items():
            if other.tensors[name].dtype != stored.dtype:
                raise CheckpointError(
                    f"{other.path}: {name} is of type {other.tensors[name].dtype}, and "
                    f"{stored.dtype} in {first.path}"
                )
