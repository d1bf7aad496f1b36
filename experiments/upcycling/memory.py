"""How much memory a conversion takes beyond what its process has before it, at several sizes."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from experiments.upcycling.synthetic import HIDDEN, INNER, VOCAB, layer_bytes, write_large
from moe.upcycling import Options, UpcycleConfig, upcycle

__all__ = ["METHODS", "measure_memory"]

METHODS = {
    "copy": UpcycleConfig(2, 2),
    "virtual-group": UpcycleConfig(8, 4, 4, "virtual-group"),
    "drop": UpcycleConfig(2, 2, method="drop"),
    "noise": UpcycleConfig(2, 2, method="noise"),
}
SLACK_BYTES = 256 << 20
GROUP_BYTES = 2 * max(3 * HIDDEN * INNER, VOCAB * HIDDEN)
"""The largest tensor group: the three matrices of an FFN, or the largest other tensor."""


def measure_memory(gigabytes: list[float], place: str | None) -> list[dict[str, Any]]:
    """Convert synthetic checkpoints, each in a process of its own.

    Args:
        gigabytes: sizes; all methods run on the last of them, the others on ``virtual-group``.
        place: directory for the checkpoints; None: the system's.
    """
    rows = []
    for size in gigabytes:
        layers = max(1, round((size * 1e9 - VOCAB * HIDDEN * 2) / layer_bytes()))
        with tempfile.TemporaryDirectory(dir=place) as folder:
            source = Path(folder) / "dense"
            total = write_large(source, layers)
            for method in METHODS if size == gigabytes[-1] else ("virtual-group",):
                done = subprocess.run(
                    [sys.executable, "-m", "experiments.upcycling.memory", method, folder],
                    check=True,
                    capture_output=True,
                    text=True,
                )
                told = json.loads(done.stdout)
                limit = 2 * GROUP_BYTES + SLACK_BYTES
                rows.append({"source_bytes": total, "method": method, "limit_bytes": limit, **told})
    return rows


def _child(method: str, folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    before = _memory_bytes("VmRSS")
    start = time.perf_counter()
    report = upcycle(
        folder / "dense", folder / method, METHODS[method], options=Options(measure=False)
    )
    seconds = time.perf_counter() - start
    for path in (folder / method).iterdir():
        path.unlink()
    peak = _memory_bytes("VmHWM")
    return {
        "result_bytes": report["bytes"],
        "before_bytes": before,
        "peak_bytes": peak,
        "growth_bytes": peak - before,
        "seconds": round(seconds, 1),
    }


def _memory_bytes(name: str) -> int:
    """Return a line of the kernel's account; its ru_maxrss begins with that of the parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name + ":"))


if __name__ == "__main__":
    print(json.dumps(_child(sys.argv[1], Path(sys.argv[2]))))
