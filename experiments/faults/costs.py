"""What keeping the log costs, what workers gain by sharing syncs, and what a stopped one costs."""

from __future__ import annotations

import os
import signal
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import dgs
from experiments.faults.report import Figure, Report, as_rows
from experiments.faults.served import Crew, Served, scratch

__all__ = ["group_commit", "logged_exchange", "stopped_worker"]

SLOW_MS = 4.0
"""What a sync takes on many disks."""


def logged_exchange(parameters: int = 100_000, repeats: int = 1000) -> Report:
    """Exchange with and without a log, and sync a file, one after the other, again and again.

    Args:
        parameters: of the model; 1 % are sent.
        repeats: rounds that count.
    """
    times: dict[str, list[float]] = {"with": [], "without": [], "fdatasync": []}
    with (
        scratch() as folder,
        Served(folder / "a", ["--state-dir", str(folder / "state")]) as kept,
        Served(folder / "b") as forgetful,
    ):
        update_bytes = parameters // 100 * 6
        ways = {
            "with": _stepper(kept.address, parameters),
            "without": _stepper(forgetful.address, parameters),
            "fdatasync": _syncer(folder / "probe", update_bytes),
        }
        for round_number in range(repeats + 50):
            for name, act in ways.items():
                start_s = time.perf_counter()
                act()
                if round_number >= 50:
                    times[name].append(time.perf_counter() - start_s)
    ms = {name: statistics.median(t) * 1e3 for name, t in times.items()}
    return {
        "parameters": parameters,
        "repeats": repeats,
        "ms": ms,
        "ms_p99": {n: sorted(t)[int(0.99 * len(t))] * 1e3 for n, t in times.items()},
        "figures": as_rows(
            Figure(
                "exchange with log, one worker, median",
                ms["with"],
                ms["without"] + 2 * ms["fdatasync"],
                "ms",
            )
        ),
    }


def _stepper(address: str, parameters: int) -> Callable[[], object]:
    """Join a server; return what makes one step and one exchange."""
    point = torch.nn.Parameter(torch.zeros(parameters))
    optimizer = dgs.DistributedOptimizer(
        torch.optim.SGD([point], lr=0.1), named_parameters=[("x", point)], server=address
    )
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(parameters, generator=generator) for _ in range(8)]

    def step() -> None:
        point.grad = gradients[optimizer.stats.steps % len(gradients)]
        optimizer.step()

    return step


def _syncer(path: Path, count: int) -> Callable[[], object]:
    file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    data = bytes(count)

    def sync() -> None:
        os.write(file, data)
        os.fdatasync(file)

    return sync


def group_commit(workers: int = 8, seconds: float = 15.0) -> Report:
    """Compare one worker's rate with that of several, on this disk and on a slower one.

    Args:
        workers: how many.
        seconds: counted for each rate.
    """
    modules = {
        "this disk": ("dgs",),
        f"syncs of {SLOW_MS:g} ms": ("experiments.faults.slow_disk", f"{SLOW_MS:g}"),
        "no log": ("dgs",),
    }
    rates: dict[str, dict[str, float]] = {}
    for disk, module in modules.items():
        rates[disk] = {}
        for count in (1, workers):
            with scratch() as folder:
                state = [] if disk == "no log" else ["--state-dir", str(folder / "state")]
                with (
                    Served(folder, state, module=module) as server,
                    Crew(folder, server.address, count) as crew,
                ):
                    rates[disk][str(count)] = sum(crew.rates(seconds))
    gains = {disk: rate[str(workers)] / rate["1"] for disk, rate in rates.items()}
    return {
        "workers": workers,
        "per_second": rates,
        "gains": gains,
        "figures": as_rows(
            *(
                Figure(
                    f"combined rate of {workers} workers / one, {disk}", gain, 3.0, at_least=True
                )
                for disk, gain in gains.items()
                if disk != "no log"
            )
        ),
    }


def stopped_worker(workers: int = 4, seconds: float = 5.0, repeats: int = 5) -> Report:
    """Stop one of several workers now and then, and count what the others do meanwhile.

    They pause between exchanges, so that the processor has time to spare: otherwise the others
    would only get faster.

    Args:
        workers: how many.
        seconds: counted with, and without, the stopped one.
        repeats: times that it is stopped.
    """
    rates: dict[str, list[float]] = {"running": [], "stopped": []}
    with scratch() as folder:
        state = ["--state-dir", str(folder / "state")]
        with (
            Served(folder, state) as server,
            Crew(folder, server.address, workers, ["--pause-s", "0.02"]) as crew,
        ):
            for _ in range(repeats):
                rates["running"].append(sum(crew.rates(seconds)[1:]))
                crew.signal(0, signal.SIGSTOP)
                rates["stopped"].append(sum(crew.rates(seconds)[1:]))
                crew.signal(0, signal.SIGCONT)
    median = {name: statistics.median(found) for name, found in rates.items()}
    ratio = median["stopped"] / median["running"]
    return {
        "workers": workers,
        "others_per_second": rates,
        "figures": as_rows(
            Figure("one worker stopped: rate of the others", ratio, 0.9, at_least=True)
        ),
    }
