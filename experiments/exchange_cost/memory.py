"""What a worker and a server hold from exchange to exchange, counted array by array."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dgs.config import WorkerConfig
from dgs.server import ParameterServer
from dgs.transport.local import LocalTransport
from experiments.exchange_cost.figures import Figure, Report, as_rows
from experiments.exchange_cost.sites import Site, draw_progress

__all__ = ["held_bytes", "measure"]

WORKERS = 4
ROUNDS = 6
MIB = 1 << 20


def measure(sizes: Sequence[int], densities: Sequence[float]) -> Report:
    """Return bytes after some rounds of several workers, and the figures: of the worst density.

    Args:
        sizes: of the tensors.
        densities: fractions that are sent, and that a reply may hold.
    """
    rows = [_row(sizes, density) for density in densities]
    total = sum(sizes)
    worker = max(row["worker_bytes_beyond_velocity_and_base"] for row in rows)
    record = max(row["record_bytes"] for row in rows)
    both = max(row["record_bytes"] + row["reply_bytes"] for row in rows)
    figures = [
        Figure("worker: beyond velocity and base / 4 N bytes", worker / (4 * total), 0.1),
        Figure("server: a worker's record beyond 4 N bytes, MiB", (record - 4 * total) / MIB, 1.0),
        Figure(
            "server: the same with the reply kept for repeats, MiB", (both - 4 * total) / MIB, 1.0
        ),
    ]
    return {"parameters": total, "rows": rows, "figures": as_rows(figures)}


def _row(sizes: Sequence[int], density: float) -> Report:
    config = WorkerConfig(density=density, download_density=density)
    server, total = ParameterServer(), sum(sizes)
    progress = draw_progress(total)
    sites = [
        Site(sizes, [LocalTransport(server)], config, f"worker-{i}", progress[i:] + progress[:i])
        for i in range(WORKERS)
    ]
    for _ in range(ROUNDS):
        for site in sites:
            site.exchange()
    sites[0].collect()  # the update is held until its reply is there
    worker = held_bytes(sites[0].worker) - 8 * total
    sessions = list(server.state.registry.sessions())
    return {
        "density": density,
        "worker_bytes_beyond_velocity_and_base": worker,
        "worker_peak_bytes_of_numpy_in_an_exchange": _peak(sites[1]),
        "record_bytes": max(session.record.nbytes for session in sessions),
        "reply_bytes": max(len(session.reply) for session in sessions),
    }


def _peak(site: Site) -> int:
    """Return the most that numpy and bytes took at a time in one exchange, server included."""
    tracemalloc.start()
    site.exchange()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def held_bytes(root: object) -> int:
    """Count the bytes of all arrays, tensors and byte strings that an object leads to, once each.

    Args:
        root: attributes, slots, sequences and mappings are followed.
    """
    found: dict[int, int] = {}
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, type):
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            storage = one.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(one, np.ndarray):
            while isinstance(one.base, np.ndarray):
                one = one.base
            found[one.ctypes.data] = one.nbytes
        elif isinstance(one, bytes | bytearray):
            found[id(one)] = len(one)
        else:
            waiting += _followed(one)
    return sum(found.values())


def _followed(one: Any) -> list[Any]:
    """Return what an object of this project, or a container, leads to."""
    if isinstance(one, dict):
        return list(one.values())
    if isinstance(one, list | tuple | set | frozenset):
        return list(one)
    if not type(one).__module__.startswith("dgs.") or type(one).__module__.startswith("dgs._"):
        return []
    slots = [getattr(one, s) for s in getattr(type(one), "__slots__", ()) if hasattr(one, s)]
    return [*getattr(one, "__dict__", {}).values(), *slots]
