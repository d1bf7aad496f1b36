"""Timing that treats all paths alike: in turn, medians, and waiting for the device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

__all__ = ["Times", "measure"]

Times = dict[str, dict[str, float]]
"""Of each path: median, fastest and slowest, in milliseconds."""


def measure(
    paths: Mapping[str, Callable[[], object]], device: torch.device, repeats: int, warm_up: int = 2
) -> Times:
    """Run every path once in each repetition, in turn, and return what they took.

    Args:
        paths: by name.
        device: waited for before a clock is read.
        repeats: repetitions that count.
        warm_up: repetitions before them that do not.
    """
    taken: dict[str, list[float]] = {name: [] for name in paths}
    for repetition in range(warm_up + repeats):
        for name, path in paths.items():
            _settle(device)
            began = time.perf_counter()
            path()
            _settle(device)
            if repetition >= warm_up:
                taken[name].append(1e3 * (time.perf_counter() - began))
    return {
        name: {
            "ms": statistics.median(times),
            "fastest_ms": min(times),
            "slowest_ms": max(times),
        }
        for name, times in taken.items()
    }


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
