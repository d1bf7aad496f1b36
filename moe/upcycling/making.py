"""Making the tensors of a plan, one after another, with one dense matrix in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe.upcycling.config import UpcycleConfig
from moe.upcycling.methods import (
    NEURONS,
    add_noise,
    average,
    dropped_neurons,
    generator,
    redraw,
    routed_shard,
    shard_bounds,
)
from moe.upcycling.plan import Piece, Plan
from moe.upcycling.routers import first_rows, tied
from moe.upcycling.scaling import factors, gain_of
from moe.upcycling.source import DenseCheckpoint

__all__ = ["SHARED_GAIN", "Calibration", "Maker", "scaled"]

SHARED_GAIN = 2.0
"""On the shared expert's W_down: its gate starts at zero weights, and sigmoid(0) = 1/2."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was measured on a layer of the dense model."""

    rows: Tensor
    """Router rows, one per replica, float32 (E, D)."""

    mass: float
    """Mean top-k mass under them."""


@dataclass(slots=True)
class Maker:
    """Makes pieces of a plan.

    Args:
        plan: what is made.
        sources: the dense checkpoint, and those of other branches.
        measured: by layer; layers that are not in it get drawn rows.
    """

    plan: Plan
    sources: Sequence[DenseCheckpoint]
    measured: Mapping[int, Calibration] = field(default_factory=dict)
    _held: tuple[int, str, Tensor] | None = None

    def make(self, piece: Piece) -> Iterator[Tensor]:
        """Yield a piece in parts along its first dimension."""
        config = self.plan.config
        if piece.kind == "copy":
            yield from self._copied(piece)
        elif piece.kind == "router":
            yield tied(self._rows(piece), config.routed_shards).to(piece.dtype)
        elif piece.kind == "shared-gate":
            yield torch.zeros(piece.shape, dtype=piece.dtype)
        elif piece.kind == "shared":
            gain = SHARED_GAIN if piece.matrix == "down" else 1.0
            yield scaled(self._cut(piece, 0, 0, config.shared_experts), gain)
        else:
            yield self._expert(piece)

    def _copied(self, piece: Piece) -> Iterator[Tensor]:
        for slabs in zip(*(s.slabs(piece.name) for s in self.sources), strict=True):
            yield average(list(slabs)) if len(slabs) > 1 else slabs[0]

    def _rows(self, piece: Piece) -> Tensor:
        measured = self.measured.get(piece.layer)
        if measured is not None:
            return measured.rows
        return first_rows(self.plan.config, piece.shape[1], piece.layer, None)

    def _expert(self, piece: Piece) -> Tensor:
        config, m = self.plan.config, piece.matrix
        source = piece.expert % len(self.sources)
        w = self._cut(piece, source, routed_shard(config, piece.expert), 1)
        draw = generator(config.seed, config.method, piece.layer, piece.expert, m)
        if config.method == "drop":
            gone = dropped_neurons(config, w.shape[NEURONS[m]], piece.layer, piece.expert, m)
            w = redraw(w, gone, NEURONS[m], draw)
        elif config.method == "noise":
            w = add_noise(w, config.noise_scale, draw)
        return scaled(w, self._factor(config, piece))

    def _factor(self, config: UpcycleConfig, piece: Piece) -> float:
        measured = self.measured.get(piece.layer)
        a = gain_of(config, None if measured is None else measured.mass)
        return float(getattr(factors(config.scaling, a), piece.matrix))

    def _cut(self, piece: Piece, source: int, shard: int, count: int) -> Tensor:
        """Return some neighbouring shards of a dense matrix."""
        inner = self.sources[0].config.inner
        start, stop = shard_bounds(inner, self.plan.config.granularity, shard, count)
        whole = self._whole(source, str(piece.source))
        return whole.narrow(NEURONS[piece.matrix], start, stop - start)

    def _whole(self, source: int, name: str) -> Tensor:
        if self._held is None or self._held[:2] != (source, name):
            self._held = None  # freed before the next one is read
            self._held = (source, name, self.sources[source].read(name))
        return self._held[2]


def scaled(w: Tensor, factor: float) -> Tensor:
    """Multiply in float32 or better, and round once; a factor of 1 keeps every bit."""
    if factor == 1.0:
        return w
    exact = w.to(torch.promote_types(w.dtype, torch.float32))
    if exact is w:
        return w * factor
    return exact.mul_(factor).to(w.dtype)
