"""How the paths' times follow the model's size, and the server's the number of workers."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

import numpy as np

from dgs.kernels import kernels
from experiments.exchange_cost import server
from experiments.exchange_cost.figures import Figure, Report, as_rows
from experiments.exchange_cost.paths import Server, Worker, resnet18_sizes

__all__ = ["measure"]

RESNET18 = sum(resnet18_sizes())
LONGEST = 1 << 22
"""Longest segment; longer tensors are cut."""

BYTES_AT_A_TIME = 48
"""Bytes a parameter that `size_row` needs, temporaries of the drawing included."""

ROUNDS = {1: 96, 8: 24, 32: 8}
"""Exchanges of each worker, by their number."""

TRAFFIC = 0.001


def measure(parameters: Sequence[float], density: float, repeats: int) -> Report:
    """Return a row per size, a row per number of workers, and the server's figures.

    Args:
        parameters: sizes; those that memory has no room for are named, and left out.
        density: fraction that is sent, in the rows per size.
        repeats: repetitions that count at 11 M; a fifth from 50 M on.
    """
    room = _available_bytes()
    fitting = [n for n in parameters if BYTES_AT_A_TIME * n < room]
    sizes = [_size_row(n, density, repeats if n < 5e7 else repeats // 5 + 1) for n in fitting]
    by_workers = [
        _server_row(1.0, workers, 0) for workers in ROUNDS if 8.5 * workers * RESNET18 < room
    ]
    grown = (
        [_server_row(10.0, 8, int(TRAFFIC * RESNET18))] if 0.8 * room > 85 * 8 * RESNET18 else []
    )
    eight = next((row for row in by_workers if row["workers"] == 8), None)
    figures = []
    if eight:
        figures.append(
            Figure("server, log path / fused scan, 8 workers, 0.1 %", eight["walk / compare"], 0.3)
        )
    if eight and grown:
        ratio = grown[0]["ms"]["walk"] / eight["ms"]["walk"]
        figures.append(Figure("server, log path, model 10 x, same traffic", ratio, 1.3))
    return {
        "sizes": sizes,
        "left_out_for_memory": [n for n in parameters if n not in fitting],
        "workers": by_workers,
        "grown": grown,
        "figures": as_rows(figures),
    }


def _server_row(factor: float, workers: int, entries: int) -> Report:
    row = server.measure(
        factor,
        workers=workers,
        density=TRAFFIC,
        entries=entries,
        rounds=ROUNDS[workers],
        selection="tracked",
    )
    return {"workers": workers, **row}


def _size_row(parameters: float, density: float, repeats: int) -> Report:
    """Time a worker's path, a server's, and their yardsticks, in turn."""
    tensors = resnet18_sizes(parameters / RESNET18)
    sizes = [n for size in tensors for n in _cut(size)]
    worker = Worker(sizes, density, kernels(1 << 30), 0)
    site = Server(worker, kernels(1 << 30), 1)
    paths: dict[str, Callable[[], object]] = {
        "np.add": worker.add,
        "worker": lambda: worker.encode(worker.select()),
        "worker, exact": lambda: worker.encode(worker.select_exactly()),
        "np.subtract": site.subtract,
        "server": lambda: site.exchange(site.scan),
    }
    times: dict[str, list[float]] = {name: [] for name in paths}
    for repetition in range(repeats + 2):
        for name, path in paths.items():
            worker.turn()
            site.restore()
            began = time.perf_counter()
            path()
            if repetition >= 2:
                times[name].append(time.perf_counter() - began)
    ms = {name: 1e3 * float(np.median(taken)) for name, taken in times.items()}
    total = sum(sizes)
    return {
        "parameters": total,
        "ms": ms,
        "worker / np.add": ms["worker"] / ms["np.add"],
        "server / np.subtract": ms["server"] / ms["np.subtract"],
        "worker_parameters_per_s": 1e3 * total / ms["worker"],
        "server_parameters_per_s": 1e3 * total / ms["server"],
    }


def _cut(size: int) -> list[int]:
    return [LONGEST] * (size // LONGEST) + ([size % LONGEST] if size % LONGEST else [])


def _available_bytes() -> float:
    return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
