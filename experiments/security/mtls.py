"""What mTLS costs an exchange: ``python -m experiments.security.mtls``.

The worker is here, two servers in a process of their own on another core: one in plaintext, one
with TLS and client certificates. The same worker's rounds go to both, one after the other, so that
both meet the same load of the machine. Each run has fresh servers, sessions and certificates.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from dgs.authority import Authority
from dgs.config import WorkerConfig
from dgs.kernels import kernels
from dgs.security import ClientSecurity, ServerSecurity
from dgs.transport.connect import connect
from experiments.exchange_cost.figures import Figure, Report, as_rows, machine
from experiments.exchange_cost.paths import resnet18_sizes
from experiments.exchange_cost.sites import Site, draw_progress

__all__ = ["measure"]

RESULTS = Path(__file__).parent / "results"
SETTLED = 6
"""Exchanges before the first that counts: thresholds settle, and new pages are touched."""

NAMES = ("plaintext", "mTLS")


def measure(
    sizes: Sequence[int], density: float, repeats: int, runs: int, server_core: int
) -> Report:
    """Return medians in milliseconds per run, their ratios, and the figure.

    Args:
        sizes: of the tensors.
        density: fraction that is sent, and that a reply may hold.
        repeats: exchanges of each kind in a run that count.
        runs: how often all is done.
        server_core: where the servers' process runs.
    """
    rows = [_run(sizes, density, repeats, server_core) for _ in range(runs)]
    ratios = [row["mTLS"] / row["plaintext"] for row in rows]
    figure = Figure("exchange over mTLS / over plaintext", float(np.mean(ratios)), 1.5)
    return {
        "parameters": sum(sizes),
        "density": density,
        "repeats": repeats,
        "ms": rows,
        "ratio_mean": float(np.mean(ratios)),
        "ratio_std": float(np.std(ratios)),
        "figures": as_rows([figure]),
    }


def _run(sizes: Sequence[int], density: float, repeats: int, server_core: int) -> Report:
    config = WorkerConfig(density=density, download_density=density)
    progress = draw_progress(sum(sizes))
    times: dict[str, list[float]] = {name: [] for name in NAMES}
    sent = 0
    with tempfile.TemporaryDirectory() as folder:
        worker = Authority(Path(folder)).issue_worker("worker", 30)
        shown = ClientSecurity(
            tls_ca=Path(folder) / "ca.pem", tls_cert=worker.certificate, tls_key=worker.key
        )
        with _serving(server_core, folder) as addresses:
            sites = {
                name: Site(
                    sizes,
                    connect(address, config.retry, security=security),
                    config,
                    "worker",
                    progress,
                )
                for name, address, security in zip(
                    NAMES, addresses, (ClientSecurity(), shown), strict=True
                )
            }
            for turn in range(repeats + SETTLED):
                for name in NAMES if turn % 2 else reversed(NAMES):
                    began = time.perf_counter()
                    sites[name].exchange()
                    times[name].append(time.perf_counter() - began)
            sent = len(sites["mTLS"].collect()[0])
            for site in sites.values():
                site.client.close(leave=True)
    ms = {name: 1e3 * float(np.median(taken[SETTLED:])) for name, taken in times.items()}
    return {**ms, "request_bytes": sent}


@contextmanager
def _serving(core: int, folder: str) -> Iterator[list[str]]:
    """Start the servers' process; it ends when its standard input does."""
    command = [sys.executable, "-m", "experiments.security.mtls", "--serve", folder]
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [*command, "--core", str(core)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        addresses = process.stdout.readline().split()
        if len(addresses) != len(NAMES):
            raise RuntimeError("the servers' process has ended; its messages are above")
        yield addresses
        process.stdin.close()
        process.wait(timeout=30)


def _serve(folder: str, core: int) -> None:
    """Serve until the standard input ends."""
    _keep_to(core)
    from dgs import serve  # after the core is set, so that its threads stay there

    issued = Authority(Path(folder)).issue_server(["127.0.0.1"], 30)
    security = ServerSecurity(
        tls_cert=issued.certificate, tls_key=issued.key, tls_ca=Path(folder) / "ca.pem"
    )
    with serve("127.0.0.1:0") as plain, serve("127.0.0.1:0", security=security) as encrypted:
        print(plain.address, encrypted.address, flush=True)
        sys.stdin.read()


def _keep_to(core: int) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})


def main() -> None:
    """Measure, and print JSON."""
    parser = argparse.ArgumentParser(prog="python -m experiments.security.mtls")
    add = parser.add_argument
    add("--repeats", type=int, default=25, help="exchanges of each kind a run (default: 25)")
    add("--runs", type=int, default=3, help="runs, each with fresh servers (default: 3)")
    add("--scale", type=float, default=1.0, help="factor on ResNet-18's size (default: 1)")
    add("--density", type=float, default=0.01, help="fraction that is sent (default: 0.01)")
    add("--save", action="store_true", help="write results/mtls.json")
    add("--serve", metavar="DIR", help=argparse.SUPPRESS)
    add("--core", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        _serve(given.serve, given.core)
        return
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    _keep_to(cores[-1])
    torch.set_num_threads(1)
    kernels(1 << 30).warm_up()
    sizes = resnet18_sizes(given.scale)
    report: Report = {"machine": machine()}
    report |= measure(sizes, given.density, given.repeats, given.runs, cores[0])
    text = json.dumps(report, indent=2)
    if given.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "mtls.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
