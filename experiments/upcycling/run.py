"""Measure exactness and memory of offline upcycling: ``python -m experiments.upcycling``."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from experiments.upcycling.exactness import measure_exactness
from experiments.upcycling.memory import measure_memory

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Measure, print tables, and write results."""
    given = _arguments()
    torch.set_num_threads(1)
    if given.part in ("exactness", "all"):
        rows = measure_exactness(given.seeds)
        _write("exactness.json", rows)
        for row in rows:
            print(
                f"{row['case']:42} {row['error_mean']:.2e} +- {row['error_deviation']:.1e}"
                f"  argmax {row['argmax_agreement']:.1%}"
            )
    if given.part in ("memory", "all"):
        rows = measure_memory(given.gigabytes, given.place)
        _write("memory.json", rows)
        for row in rows:
            print(
                f"{row['source_bytes'] / 1e9:.2f} GB {row['method']:14}"
                f" result {row['result_bytes'] / 1e9:.2f} GB"
                f"  growth {row['growth_bytes'] / 2**20:.0f} MiB"
                f" of {row['limit_bytes'] / 2**20:.0f} allowed  {row['seconds']} s"
            )


def _write(name: str, rows: list[dict[str, Any]]) -> None:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    told = {
        "commit": commit,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text(json.dumps(told, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.upcycling", description=__doc__)
    parser.add_argument("--part", choices=("exactness", "memory", "all"), default="all")
    parser.add_argument("--seeds", type=int, default=3, help="of each architecture (3)")
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.5, 1.0, 2.0])
    parser.add_argument("--place", help="directory for large checkpoints (the system's)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
