"""Time an exchange's work beside plain passes over memory: ``python -m experiments.exchange_cost``.

Every repetition runs every path once, in turn, so that what else the machine does meets all alike;
medians are compared. Everything runs on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from dgs.kernels import COMPILED_FROM, kernels
from experiments.exchange_cost.paths import Server, Worker, resnet18_sizes

Path = Callable[[], object]
Report = dict[str, Any]


class Figure(NamedTuple):
    """One wanted figure: a quotient of two measured numbers, and what it should reach."""

    name: str
    value: float
    reach: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the figure is reached."""
        return self.value >= self.reach if self.at_least else self.value <= self.reach


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(prog="python -m experiments.exchange_cost")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--repeats", type=int, default=15, help="repetitions of each path")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on ResNet-18's size")
    parser.add_argument("--density", type=float, default=0.01, help="fraction that is sent")
    given = parser.parse_args()
    _keep_to_one_core()
    report = measure(resnet18_sizes(given.scale), given.density, given.repeats)
    print(json.dumps(report, indent=2) if given.json else table(report))
    if torch.cuda.is_available() and not given.json:
        print("\na GPU is there as well: python -m experiments.exchange_cost.gpu")


def measure(sizes: list[int], density: float, repeats: int, seed: int = 0) -> Report:
    """Return medians in milliseconds, bandwidths, and the figures."""
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
        "machine": _machine(),
        "ms": {name: 1e3 * t for name, t in medians.items()},
        "fastest_ms": {name: 1e3 * min(taken) for name, taken in times.items()},
        "gb_per_s": _bandwidths(medians, int(worker.sizes.sum())),
        "figures": [
            {**figure._asdict(), "met": figure.met}
            for figure in (*_ratios(medians), *_sizes(worker, density))
        ],
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


def table(report: Report) -> str:
    """Return the report as text."""
    ms, fastest, rates = report["ms"], report["fastest_ms"], report["gb_per_s"]
    lines = [
        f"{report['parameters']:,} parameters, density {report['density']}, "
        f"{report['repeats']} repetitions, kernels: {report['kernels']}, {report['machine']}",
        "",
        f"{'path':<26}{'median ms':>10}{'fastest':>9}{'x np.add':>10}{'GB/s':>7}",
    ]
    for name, taken in ms.items():
        rate = f"{rates[name]:7.1f}" if name in rates else ""
        lines.append(
            f"{name:<26}{taken:10.2f}{fastest[name]:9.2f}{taken / ms['np.add']:10.2f}{rate}"
        )
    lines += ["", f"{'figure':<36}{'measured':>9}{'reach':>10}"]
    for figure in report["figures"]:
        sign = ">=" if figure["at_least"] else "<="
        met = "" if figure["met"] else "   missed"
        lines.append(
            f"{figure['name']:<36}{figure['value']:9.2f}{sign:>4} {figure['reach']:5g}{met}"
        )
    return "\n".join(lines)


def _keep_to_one_core() -> None:
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def _machine() -> str:
    return f"{platform.machine()}, numpy {np.__version__}, torch {torch.__version__}"


if __name__ == "__main__":
    main()
