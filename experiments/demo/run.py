"""Run `dgs demo` over several seeds and summarise what it measured.

    .venv/bin/python -m experiments.demo.run --seeds 3

Writes one JSON file a seed and `summary.md` into `results/`; further arguments go to the demo.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    """Run the seeds that have no result yet, and write the summary of all."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N-1 (default: 3)")
    parser.add_argument("--again", action="store_true", help="also run seeds that have a result")
    options, rest = parser.parse_known_args()
    runs = [run_seed(seed, rest, again=options.again) for seed in range(options.seeds)]
    text = summary(runs)
    (RESULTS / "summary.md").write_text(text)
    sys.stdout.write(text)
    return 0


def run_seed(seed: int, arguments: Sequence[str], *, again: bool) -> dict[str, Any]:
    """Run the demonstration with one seed, or read what an earlier run wrote."""
    file = RESULTS / f"seed-{seed}.json"
    if again or not file.exists():
        command = [sys.executable, "-m", "dgs", "demo", "--json", "--seed", str(seed), *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout) | {"commit": commit(), "cores": os.cpu_count()}
        RESULTS.mkdir(exist_ok=True)
        file.write_text(json.dumps(found, indent=1) + "\n")
    loaded: dict[str, Any] = json.loads(file.read_text())
    return loaded


def commit() -> str:
    """Return the commit that is measured."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def summary(runs: Sequence[dict[str, Any]]) -> str:
    """Write a table of means and standard deviations over the seeds."""
    lines = [
        "| method | accuracy, % | B up | B down | up | down | p50 | p99 | steps/s | user s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for position, first in enumerate(runs[0]["methods"]):
        results = [run["methods"][position] for run in runs]
        cells = [
            first["method"],
            spread(results, "accuracy", 100, 2),
            spread(results, "up_bytes_per_step", 1, 0),
            spread(results, "down_bytes_per_step", 1, 0),
            spread(results, "up_ratio", 1, 1) + "x",
            spread(results, "down_ratio", 1, 1) + "x",
            spread(results, "staleness_p50", 1, 1),
            spread(results, "staleness_p99", 1, 1),
            spread(results, "steps_per_s", 1, 0),
            spread(results, "cpu_s", 1, 1),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    commits = ", ".join(sorted({run["commit"] for run in runs}))
    lines += [
        "",
        f"{len(runs)} seeds, {runs[0]['cores']} cores, commit {commits}; mean +- deviation.",
    ]
    return "\n".join(lines) + "\n"


def spread(results: Sequence[dict[str, Any]], key: str, scale: float, digits: int) -> str:
    """Write mean and standard deviation of one field."""
    values = [scale * r[key] for r in results]
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):,.{digits}f} +- {deviation:,.{digits}f}"


if __name__ == "__main__":
    sys.exit(main())
