"""Time the kernels' work for an exchange beside plain passes over memory.

Every repetition runs every path once, in turn, so that what else the machine does meets all alike;
medians are compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from dgs.kernels import COMPILED_FROM, kernels
from experiments.exchange_cost.figures import Figure, Report, as_rows, machine
from experiments.exchange_cost.paths import Server, Worker

__all__ = ["measure"]

Path = Callable[[], object]


def measure(sizes: list[int], density: float, repeats: int, seed: int = 0) -> Report:
    """Return medians in milliseconds, bandwidths, and the figures.

    Args:
        sizes: of the tensors.
        density: fraction that is sent.
        repeats: repetitions that count.
        seed: of what is drawn.
    """
    chosen = kernels(max(COMPILED_FROM, sum(sizes)))
    compile_s = chosen.warm_up()
    worker = Worker(sizes, density, chosen, seed)
    server = Server(worker, chosen, seed + 1)
    before, after = (worker.turn, server.restore), ()
    paths = _paths(worker, server)
    times: dict[str, list[float]] = {name: [] for name in paths}
    for repetition in range(repeats + 2):
        for name, path in paths.items():
            for untimed in (*before, *after):
                untimed()
            began = time.perf_counter()
            path()
            if repetition >= 2:  # the first ones touch new pages
                times[name].append(time.perf_counter() - began)
    medians = {name: float(np.median(taken)) for name, taken in times.items()}
    return {
        "parameters": int(worker.sizes.sum()),
        "density": density,
        "repeats": repeats,
        "kernels": chosen.NAME,
        "warm_up_s": compile_s,
        "machine": machine(),
        "ms": {name: 1e3 * t for name, t in medians.items()},
        "fastest_ms": {name: 1e3 * min(taken) for name, taken in times.items()},
        "gb_per_s": _bandwidths(medians, int(worker.sizes.sum())),
        "figures": as_rows([*_ratios(medians), *_sizes(worker, density)]),
    }


def _paths(worker: Worker, server: Server) -> dict[str, Path]:
    return {
        "np.add": worker.add,
        "add_and_select": worker.select_given,
        "accumulate_and_select": worker.select,
        "accumulate_and_top_k": worker.select_exactly,
        "worker, progress given": lambda: worker.encode(worker.select_given()),
        "worker, base - local": lambda: worker.encode(worker.select()),
        "worker, exact": lambda: worker.encode(worker.select_exactly()),
        "worker, torch.topk": lambda: worker.encode_plainly(worker.select_with_torch()),
        "np.subtract": server.subtract,
        "scan": server.scan,
        "scan_top_k": server.scan_exactly,
        "server": lambda: server.exchange(server.scan),
        "server, exact": lambda: server.exchange(server.scan_exactly),
    }


def _ratios(t: dict[str, float]) -> list[Figure]:
    add, subtract = t["np.add"], t["np.subtract"]
    return [
        Figure("worker, progress given / np.add", t["worker, progress given"] / add, 1.6),
        Figure("worker, base - local / np.add", t["worker, base - local"] / add, 1.6),
        Figure("worker, exact / np.add", t["worker, exact"] / add, 4.0),
        Figure(
            "torch.topk path / worker, exact",
            t["worker, torch.topk"] / t["worker, exact"],
            20.0,
            True,
        ),
        Figure("server, fused scan / np.subtract", t["server"] / subtract, 2.0),
        Figure("server, exact / np.subtract", t["server, exact"] / subtract, 2.0),
    ]


def _sizes(worker: Worker, density: float) -> list[Figure]:
    """Return the figures of bytes, which are those at a density of 1 %."""
    if density != 0.01:
        return []
    chosen = worker.select_exactly()
    dense = 4 * worker.velocity.size
    bodies = {k: len(worker.encode(chosen, k)) for k in ("float32", "bfloat16", "int8", "int4")}
    bits = 8 * bodies["float32"] / chosen[0].size - 32
    figures = [Figure("index bits per entry", bits, 8.16)]
    reach = {"float32": 79.0, "bfloat16": 132.0, "int8": 197.0, "int4": 260.0}
    figures += [
        Figure(f"dense bytes / {kind} bytes", dense / size, reach[kind], True)
        for kind, size in bodies.items()
    ]
    return figures


def _bandwidths(medians: dict[str, float], size: int) -> dict[str, float]:
    """Return GB/s by the streams that a path cannot do without: 4 bytes an entry each."""
    streams = {
        "np.add": 3,
        "add_and_select": 3,
        "accumulate_and_select": 4,
        "accumulate_and_top_k": 4,
        "np.subtract": 3,
        "scan": 2,
        "scan_top_k": 2,
    }
    return {name: 4e-9 * size * count / medians[name] for name, count in streams.items()}
