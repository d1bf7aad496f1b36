"""How long the first call takes: numba imported, everything compiled, or loaded from the cache."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from experiments.exchange_cost.figures import Report

__all__ = ["measure"]

_FIRST_CALL = """
import time
import dgs.kernels
began = time.perf_counter()
dgs.kernels.kernels(1 << 30)
print(time.perf_counter() - began)
"""

LONGEST_S = 300.0


def measure(warm_runs: int = 3) -> Report:
    """Return the seconds of a process's first call without a cache, and of later processes' first.

    Args:
        warm_runs: processes after the first; the median counts.
    """
    with tempfile.TemporaryDirectory() as folder:
        cold = _first_call_s(folder)
        warm = sorted(_first_call_s(folder) for _ in range(warm_runs))[warm_runs // 2]
    return {"cold_s": cold, "warm_s": warm}


def _first_call_s(cache: str) -> float:
    done = subprocess.run(
        [sys.executable, "-c", _FIRST_CALL],
        env={**os.environ, "NUMBA_CACHE_DIR": cache},
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        timeout=LONGEST_S,
        check=True,
        text=True,
    )
    return float(done.stdout)
