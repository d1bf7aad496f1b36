"""One exchange over gRPC between two processes, beside the work that it cannot do without.

The worker is here, the server in a process of its own, on another core where there is one. Each
repetition makes one exchange over gRPC; one with a server in this process, part by part; and the
kernels' paths of `passes`. All of the same model, density and code.

    python -m experiments.exchange_cost.loopback --core 0      # the server's process
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dgs.config import WorkerConfig
from dgs.kernels import kernels
from dgs.momentum import SAMomentum
from dgs.server import ParameterServer
from dgs.transport.base import Method
from dgs.transport.connect import connect
from dgs.transport.local import LocalTransport
from experiments.exchange_cost.figures import Figure, Report, as_rows
from experiments.exchange_cost.paths import Server, Worker
from experiments.exchange_cost.sites import Site, draw_progress

__all__ = ["measure"]

SETTLED = 6
"""Exchanges before the first that counts: thresholds settle, and new pages are touched."""


def measure(sizes: Sequence[int], density: float, repeats: int, server_core: int) -> Report:
    """Return medians in milliseconds, where the time goes, and the figures.

    Args:
        sizes: of the tensors.
        density: fraction that is sent, and that a reply may hold.
        repeats: repetitions that count.
        server_core: where the server's process runs.
    """
    config = WorkerConfig(density=density, download_density=density)
    progress = draw_progress(sum(sizes))
    times: dict[str, list[float]] = {}
    with _serving(server_core) as address:
        remote = Site(sizes, connect(address, config.retry), config, "remote", progress)
        server = ParameterServer()
        local = Site(sizes, [LocalTransport(server)], config, "local", progress)
        worker = Worker(list(sizes), density, kernels(sum(sizes)), 0)
        paths = Server(worker, kernels(sum(sizes)), 1)
        rule = SAMomentum(sum(sizes), config.momentum)
        for _ in range(repeats + SETTLED):
            _one_of_each(times, remote, local, server, (worker, paths), rule)
        sent = len(local.collect()[0])
        remote.client.close(leave=True)
    ms = {name: 1e3 * float(np.median(taken[SETTLED:])) for name, taken in times.items()}
    in_process = ms["collect"] + ms["handle"]
    kernels_only = ms["worker path"] + ms["server path"]
    figures = [
        Figure(
            "exchange over gRPC / (worker path + server path)", ms["over gRPC"] / kernels_only, 2
        ),
        Figure("exchange over gRPC / (collect + handle)", ms["over gRPC"] / in_process, 2),
    ]
    return {"ms": ms, "request_bytes": sent, "figures": as_rows(figures)}


def _one_of_each(
    times: dict[str, list[float]],
    remote: Site,
    local: Site,
    server: ParameterServer,
    kernel_paths: tuple[Worker, Server],
    rule: SAMomentum,
) -> None:
    def timed(name: str, call: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = call()
        times.setdefault(name, []).append(time.perf_counter() - began)
        return result

    timed("over gRPC", remote.exchange)
    (request,) = timed("collect", local.collect)
    reply = timed("handle", lambda: server.handle(Method.EXCHANGE.value, request))
    timed("absorb", lambda: local.worker.absorb([reply]))
    worker, paths = kernel_paths
    worker.turn()
    paths.restore()
    timed("worker path", lambda: worker.encode(worker.select()))
    timed("server path", lambda: paths.exchange(paths.scan))
    chosen = worker.select()
    indices, values = map(torch.from_numpy, chosen)
    timed("settle, torch", lambda: rule.settle(indices, values))
    timed("settle, kernel", lambda: worker.settle(chosen))


@contextmanager
def _serving(core: int) -> Iterator[str]:
    """Start the server's process; it ends when its standard input does."""
    command = [sys.executable, "-m", "experiments.exchange_cost.loopback", "--core", str(core)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        if not address:
            raise RuntimeError("the server's process has ended; its messages are above")
        yield address
        process.stdin.close()
        process.wait(timeout=30)


def main() -> None:
    """Serve until the standard input ends."""
    parser = argparse.ArgumentParser(prog="python -m experiments.exchange_cost.loopback")
    parser.add_argument("--core", type=int, required=True, help="core to run on")
    given = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {given.core})
    from dgs import serve  # imports torch: after the core is set, so that its threads stay there

    with serve("127.0.0.1:0") as handle:
        print(handle.address, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
