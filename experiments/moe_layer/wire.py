"""What crosses between ranks: bytes counted where they are handed to torch, and the time it takes.

Ranks are processes on this machine, joined by gloo. Every function of `torch.distributed` that
sends tensors is wrapped, so that nothing goes by uncounted.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from experiments.moe_layer.shapes import Shape
from moe.dispatch.alltoall import AllToAllDispatcher
from moe.dispatch.base import combine, dispatch
from moe.experts import Experts
from moe.parallel.dims import ParallelDims
from moe.parallel.groups import build_groups
from moe.permute import row_order
from moe.router import Router

__all__ = ["Counter", "over_the_wire"]

PATIENCE_S = 300.0
SENDERS = (
    "all_to_all_single",
    "all_to_all",
    "all_gather",
    "all_gather_into_tensor",
    "all_reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "broadcast",
    "gather",
    "scatter",
    "reduce",
    "send",
    "isend",
)
INPUT_PLACE = {"all_reduce": 0, "broadcast": 0, "send": 0, "isend": 0, "gather": 0, "reduce": 0}
"""Where the tensor that is sent stands among the arguments; elsewhere it is the second."""


@dataclass
class Counter:
    """Bytes handed to collectives, by function and type."""

    sent: dict[str, int] = field(default_factory=dict)

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is sent inside a with block."""
        originals = {name: getattr(dist, name) for name in SENDERS}
        for name, original in originals.items():
            setattr(dist, name, self._counted(name, original))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(dist, name, original)

    def _counted(self, name: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = args[INPUT_PLACE.get(name, 1)]
            for tensor in [tensors] if isinstance(tensors, Tensor) else tensors:
                key = f"{name}, {str(tensor.dtype).removeprefix('torch.')}"
                size = tensor.numel() * tensor.element_size()
                self.sent[key] = self.sent.get(key, 0) + size
            return original(*args, **kwargs)

        return call

    def take(self) -> dict[str, int]:
        """Return what was counted, and start afresh."""
        taken, self.sent = self.sent, {}
        return taken


def over_the_wire(shape: Shape, world: int, repeats: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return bytes and times of dispatch, experts and combine with experts spread over a world.

    Args:
        shape: of the layer; its tokens are those of one rank.
        world: ranks, each with its share of the experts (EP = world).
        repeats: repetitions that are timed.
        dtype: of the rows.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank, args=(folder, rank, world, shape, repeats, dtype))
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + PATIENCE_S
        try:
            for process in ranks:
                process.join(max(0.0, deadline - time.monotonic()))
        finally:
            for process in ranks:
                process.kill()
                process.join()
        files = [Path(folder) / f"{rank}.json" for rank in range(world)]
        missing = [rank for rank, file in enumerate(files) if not file.exists()]
        if missing:
            raise RuntimeError(f"ranks {missing} ended without a result; see their errors above")
        return _summary([json.loads(file.read_text()) for file in files], shape, dtype)


def _summary(ranks: list[dict[str, Any]], shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """Add up the ranks' bytes beside those that the rows and the counts must have."""
    world, names = len(ranks), ("dispatch", "combine", "backward")
    rows = world * shape.rows * shape.hidden * dtype.itemsize
    counts = world * shape.experts * torch.int64.itemsize
    wanted = {"dispatch": rows + counts, "combine": rows, "backward": 2 * rows}
    found = {name: sum(sum(r["bytes"][name].values()) for r in ranks) for name in names}
    return {
        "world": world,
        "tokens_per_rank": shape.tokens,
        "bytes": {name: {"sent": found[name], "rows and counts": wanted[name]} for name in names},
        "functions": sorted({key for r in ranks for n in names for key in r["bytes"][n]}),
        "equal": found == wanted,
        "ms": {name: max(r["ms"][name] for r in ranks) for name in ranks[0]["ms"]},
    }


def _rank(
    folder: str, rank: int, world: int, shape: Shape, repeats: int, dtype: torch.dtype
) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(str(Path(folder) / "store"), world)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=PATIENCE_S)
    )
    found = _measure(rank, world, shape, repeats, dtype)
    part = Path(folder) / f"{rank}.part"
    part.write_text(json.dumps(found))
    part.rename(part.with_suffix(".json"))
    dist.barrier()
    dist.destroy_process_group()


def _measure(
    rank: int, world: int, shape: Shape, repeats: int, dtype: torch.dtype
) -> dict[str, Any]:
    groups = build_groups(ParallelDims(world=world, ep=world))
    there = AllToAllDispatcher(groups, shape.experts)
    torch.manual_seed(0)
    router = Router(shape.config.router, shape.hidden)
    experts = Experts(shape.config.experts, shape.experts // world, dtype=dtype)
    torch.manual_seed(1 + rank)
    x_TD = torch.randn(shape.tokens, shape.hidden).to(dtype).requires_grad_()
    head_TD = torch.randn(shape.tokens, shape.hidden).to(dtype)
    counter, taken = Counter(), {}
    ms: dict[str, list[float]] = {"dispatch": [], "experts": [], "combine": [], "backward": []}
    with counter.counting():
        for repetition in range(repeats + 1):
            routing = router(x_TD)
            order = row_order(routing.experts_TK, routing.kept_TK, shape.experts)
            weights_TK = routing.weights_TK
            clock = _Clock(ms if repetition else {name: [] for name in ms})
            sent, plan = dispatch(there, x_TD, weights_TK, order)
            taken["dispatch"] = clock.lap("dispatch", counter)
            y_ND = experts(sent.rows_ND, sent.counts_L, sent.weights_N)
            clock.lap("experts", None)
            y_TD = combine(there, y_ND, weights_TK, plan)
            taken["combine"] = clock.lap("combine", counter)
            y_TD.backward(head_TD)
            taken["backward"] = clock.lap("backward", counter)
    middle = {name: sorted(times)[len(times) // 2] for name, times in ms.items()}
    return {"bytes": taken, "ms": middle}


class _Clock:
    """Laps between points that all ranks reach together."""

    def __init__(self, ms: dict[str, list[float]]) -> None:
        self._ms = ms
        self._began = time.perf_counter()

    def lap(self, name: str, counter: Counter | None) -> dict[str, int]:
        """Note the time since the last lap; return what was counted."""
        self._ms[name].append(1e3 * (time.perf_counter() - self._began))
        taken = {} if counter is None else counter.take()
        dist.barrier()
        self._began = time.perf_counter()
        return taken
