"""What a long run costs the server's memory, and what a killed shard needs to be back."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

import numpy as np
import torch

import dgs
from dgs.durable import Durable
from dgs.storage.disk import FolderDisk
from dgs.storage.snapshot import list_snapshots, read_snapshot
from experiments.faults.report import Figure, Report, as_rows
from experiments.faults.served import Served, scratch

__all__ = ["memory_slope", "shard_back"]


def memory_slope(exchanges: int = 100_000, parameters: int = 1000, settled: int = 10_000) -> Report:
    """Exchange for long, with snapshots meanwhile, and fit a line to the server's memory.

    Args:
        exchanges: that count.
        parameters: of the model; small, so that what grows is not what is held on purpose.
        settled: exchanges before the first that counts.
    """
    samples: list[tuple[int, int]] = []
    with scratch() as folder:
        arguments = ["--state-dir", str(folder / "state"), "--snapshot-interval", "5"]
        with Served(folder, arguments) as server:
            optimizer, point, gradients = _worker(server.address, parameters)
            start_s = time.monotonic()
            for number in range(settled + exchanges + 1):
                point.grad = gradients[number % len(gradients)]
                optimizer.step()
                if number >= settled and (number - settled) % 1000 == 0:
                    samples.append((number - settled, server.rss_bytes))
            passed_s = time.monotonic() - start_s
            optimizer.close()
    counts, sizes = np.array(samples, dtype=np.float64).T
    slope = float(np.polyfit(counts, sizes, 1)[0]) * 10_000 / (1 << 20)
    return {
        "exchanges": exchanges,
        "parameters": parameters,
        "per_second": (settled + exchanges) / passed_s,
        "rss_mib": [round(size / (1 << 20), 2) for _, size in samples],
        "figures": as_rows(Figure("memory slope, per 10,000 exchanges", slope, 1.0, "MiB")),
    }


def _worker(
    address: str, parameters: int
) -> tuple[dgs.DistributedOptimizer, torch.nn.Parameter, list[torch.Tensor]]:
    point = torch.nn.Parameter(torch.zeros(parameters))
    optimizer = dgs.DistributedOptimizer(
        torch.optim.SGD([point], lr=0.01), named_parameters=[("x", point)], server=address
    )
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(parameters, generator=generator) for _ in range(8)]
    return optimizer, point, gradients


def shard_back(sizes: tuple[int, ...] = (1_000_000, 11_000_000), logged: int = 200) -> Report:
    """Kill a shard that has a snapshot and a log behind it, and time its return.

    Args:
        sizes: parameters of the model.
        logged: exchanges since the snapshot.
    """
    rows = [_back(size, logged) for size in sizes]
    figures = [
        Figure(
            f"shard of {row['parameters'] / 1e6:g} M parameters back after SIGKILL",
            row["answers_s"],
            5.0 + row["model_bytes"] / 0.5e9 + row["replay_s"],
            "s",
        )
        for row in rows
    ]
    return {"rows": rows, "figures": as_rows(*figures)}


def _back(parameters: int, logged: int) -> Report:
    with scratch() as folder:
        state = folder / "state"
        with Served(folder, ["--state-dir", str(state)]) as server:
            optimizer, point, gradients = _worker(server.address, parameters)
            for number in range(20 + logged):
                if number == 20:
                    assert server.end(signal.SIGTERM) == 0  # leaves a snapshot
                    server.start()
                point.grad = gradients[number % len(gradients)]
                optimizer.step()
            server.end(signal.SIGKILL)
            log_bytes = sum(p.stat().st_size for p in state.glob("log-*"))
            snapshot_s, replay_s, replayed = _recover(state, folder / "copy")
            start_s = time.monotonic()
            listens_s = server.start()
            optimizer.step()
            answers_s = time.monotonic() - start_s
            optimizer.close()
    return {
        "parameters": parameters,
        "model_bytes": 4 * parameters,
        "log_bytes": log_bytes,
        "replayed": replayed,
        "snapshot_s": snapshot_s,
        "replay_s": replay_s,
        "listens_s": listens_s,
        "answers_s": answers_s,
    }


def _recover(state: Path, copy: Path) -> tuple[float, float, int]:
    """Recover in this process; return seconds for the snapshot and for the log, and its length."""
    shutil.copytree(state, copy)
    with FolderDisk(copy) as disk:
        start_s = time.monotonic()
        read_snapshot(disk, list_snapshots(disk)[0].position)
        snapshot_s = time.monotonic() - start_s
        start_s = time.monotonic()
        durable = Durable.open(disk)
        whole_s = time.monotonic() - start_s
        durable.close()
    shutil.rmtree(copy)
    return snapshot_s, max(0.0, whole_s - snapshot_s), durable.recovery.replayed
