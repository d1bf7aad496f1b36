"""The figures of a GPU: rates against the machine's own, and a profile of where the time goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from experiments.moe_layer.blocks import ours, step
from experiments.moe_layer.layers import time_layers
from experiments.moe_layer.shapes import Shape
from experiments.moe_layer.timing import measure

__all__ = ["dense_rate", "measure_shape", "write_profile"]


def dense_rate(size: int, device: torch.device, dtype: torch.dtype, repeats: int) -> float:
    """Return the operations per second of a square matrix product, the machine's own measure."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = measure({"matmul": lambda: left @ right}, device, repeats)
    return 2 * size**3 / (times["matmul"]["ms"] * 1e-3)


def measure_shape(
    shape: Shape, device: torch.device, dtype: torch.dtype, rate: float, repeats: int
) -> dict[str, Any]:
    """Return the times of a shape, its rate over the machine's, and bandwidths over a copy's.

    Args:
        shape: of the layer.
        device: that runs it.
        dtype: of weights and tokens.
        rate: of a dense product, in operations per second.
        repeats: repetitions that are timed.
    """
    found: dict[str, Any] = time_layers(shape, device, dtype, repeats)
    ms = {name: times["ms"] for name, times in found["times"].items()}
    row = shape.hidden * dtype.itemsize
    rows, tokens = shape.rows * row, shape.tokens * row
    # the gather reads and writes as many rows as the copy, since each token is read k times
    copy = 2 * rows / ms["copy of the rows"]
    found["share of the dense rate"] = {
        "layer": found["flop"]["layer"] / (ms["layer"] * 1e-3) / rate,
        "experts": found["flop"]["experts"] / (ms["experts"] * 1e-3) / rate,
    }
    found["share of the copy's bandwidth"] = {
        "permute": 2 * rows / ms["gather kernel"] / copy,
        "unpermute": (rows + tokens) / ms["sum kernel"] / copy,
    }
    return found


def write_profile(shape: Shape, device: torch.device, dtype: torch.dtype, file: Path) -> None:
    """Write where the time of three passes goes, by operation, the longest first."""
    torch.manual_seed(0)
    x_TD, head_TD = (
        torch.randn(shape.tokens, shape.hidden, device=device).to(dtype) for _ in range(2)
    )
    run = step(ours(shape, device, dtype), x_TD, head_TD)
    run()
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities) as recorded:
        for _ in range(3):
            run()
        if on_gpu:
            torch.cuda.synchronize(device)
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    table = recorded.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{shape.name}, {shape.tokens} tokens, {dtype}, 3 passes\n{table}\n")
