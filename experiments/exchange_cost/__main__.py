"""Measure what an exchange costs: ``python -m experiments.exchange_cost``.

Everything runs on one core, but for the server's process of the loopback exchange.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch

from dgs.kernels import kernels
from experiments.exchange_cost import index_bits, loopback, memory, passes, scale, warming
from experiments.exchange_cost.figures import Report, machine
from experiments.exchange_cost.paths import resnet18_sizes
from experiments.exchange_cost.tables import table

RESULTS = Path(__file__).parent / "results"
PARTS = ("paths", "index", "loopback", "memory", "warm-up", "scale")

EXAMPLES = """\
examples:
  python -m experiments.exchange_cost                          everything: about three minutes
  python -m experiments.exchange_cost --part paths index       two parts of it
  python -m experiments.exchange_cost --part loopback --json   one, as JSON
  python -m experiments.exchange_cost --save                   also write results/cpu.json, *.png
  python -m experiments.exchange_cost --part scale --billion   with 1 B parameters: 48 GB of memory
"""


def main() -> None:
    """Measure, and print tables or JSON."""
    given = _parser().parse_args()
    server_core = _keep_to_one_core()
    sizes = resnet18_sizes(given.scale)
    parameters = [1e6, 1.1173962e7, 1e8, *([1e9] if given.billion else [])]
    parts: dict[str, Callable[[], Report]] = {
        "paths": lambda: passes.measure(sizes, given.density, given.repeats),
        "index": lambda: index_bits.measure(sizes),
        "loopback": lambda: loopback.measure(sizes, given.density, given.repeats, server_core),
        "memory": lambda: memory.measure(sizes, (given.density, given.density / 10)),
        "warm-up": warming.measure,
        "scale": lambda: scale.measure(parameters, given.density, given.repeats),
    }
    kernels(1 << 30).warm_up()
    report: Report = {"machine": machine()} | {name: parts[name]() for name in given.part}
    if given.save:
        from experiments.exchange_cost.plots import draw  # needs matplotlib

        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "cpu.json").write_text(json.dumps(report, indent=2) + "\n")
        draw(report, RESULTS)
    print(json.dumps(report, indent=2) if given.json else table(report))
    if torch.cuda.is_available() and not given.json:
        print("\na GPU is there as well: python -m experiments.exchange_cost.gpu")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.exchange_cost",
        description="Measure what an exchange costs, in passes over memory, bytes and seconds.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--json", action="store_true", help="print JSON instead of tables")
    add("--save", action="store_true", help="write results/cpu.json and plots of what is measured")
    add("--part", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    add("--repeats", type=int, default=15, help="repetitions of each path (default: 15)")
    add("--scale", type=float, default=1.0, help="factor on ResNet-18's size (default: 1)")
    add("--density", type=float, default=0.01, help="fraction that is sent (default: 0.01)")
    add("--billion", action="store_true", help="scale: 1 B parameters too, if memory has room")
    return parser


def _keep_to_one_core() -> int:
    """Stay on the last core; return the one that is left for another process."""
    torch.set_num_threads(1)
    if not hasattr(os, "sched_setaffinity"):
        return 0
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    return min(cores)


if __name__ == "__main__":
    main()
