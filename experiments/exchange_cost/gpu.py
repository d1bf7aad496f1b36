"""What a worker's step costs on a GPU, beside a plain copy that moves as many bytes.

    python -m experiments.exchange_cost.gpu [--json] [--parameters 1e6 1.1e7 1e8 1e9] [--sweep]

Times of kernels are the device's, between events, with the launches queued up before, so that they
hold no launch overhead; those of whole steps are the host's, from one idle device to the next. On
the CPU, under Triton's interpreter, everything runs and no figure means anything.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import triton
from torch import Tensor

from dgs.kernels import gpu, gpu_passes
from experiments.exchange_cost.paths import resnet18_sizes

__all__ = ["measure", "table"]

Report = dict[str, Any]
Path = Callable[[], object]
Chunk = tuple[gpu.Units, slice, list[Tensor]]

RESNET18 = sum(resnet18_sizes())
BYTES = {
    "copy": 16,
    "accumulate, first pass": 16,
    "add, first pass": 12,
    "scan, first pass": 8,
    "misaligned, first pass": 16,
}
"""Bytes an entry that a path cannot do without; the copy is of as many as the first one's."""

CHUNKS = (2, 4, 8)
"""Into how many parts a step is cut, each copied beside the work on the next."""

QUEUED_CYCLES = 2_000_000
"""Clock cycles that the device is kept busy for while launches queue up, about 1 ms."""


class Passes(gpu.Units):
    """Units whose first pass can be run alone, with any number of warps."""

    def first(self, held: Tensor, mode: int, warps: int | None = None) -> None:
        """Run the first pass on the operands of the last call."""
        if warps is None:
            self._first_pass(held, mode)
            return
        gpu_passes.select_blocks[(self._blocks,)](
            held,
            self._begins,
            self._unit_of,
            self._stops,
            self._step,
            self._words,
            self._counts,
            len(self._sizes),
            MODE=mode,
            BLOCK=self._block,
            num_warps=warps,
            enable_fp_fusion=False,
        )


class Model:
    """A model of ResNet-18's proportions: velocity and base flat, parameters one by one."""

    def __init__(
        self, parameters: int, density: float, device: torch.device, *, aligned: bool = True
    ) -> None:
        """Draw velocity, base and parameters; the velocity hardly changes from step to step."""
        sizes = resnet18_sizes(parameters / RESNET18)
        self.sizes = [64 * math.ceil(size / 64) for size in sizes] if aligned else [3, *sizes]
        self.total = sum(self.sizes)
        self.density, self.device = density, device
        source = torch.Generator(device).manual_seed(0)
        self.velocity = torch.randn(self.total, generator=source, device=device)
        self.base = torch.randn(self.total, generator=source, device=device).mul_(1e-3)
        self.parameters = [p + 1e-6 for p in self.base.split(self.sizes)]
        normal = torch.tensor(1 - density / 2, dtype=torch.float64)
        self.threshold = float(torch.special.ndtri(normal))
        self.thresholds = [self.threshold] * len(self.sizes)
        self.units = Passes(self.sizes, self._room(self.sizes), device)
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def _room(self, sizes: Sequence[int]) -> list[int]:
        return [2 * math.ceil(self.density * size) + 16 for size in sizes]

    def chunks(self, count: int) -> list[Chunk]:
        """Return parts of about the same size, with their ranges and parameters."""
        cuts, upto = [0], 0
        for number, size in enumerate(self.sizes, start=1):
            upto += size
            if upto * count >= self.total * len(cuts):
                cuts.append(number)
        chunks, begin = [], 0
        for first, last in pairwise(cuts):
            sizes = self.sizes[first:last]
            part = slice(begin, begin + sum(sizes))
            units = gpu.Units(sizes, self._room(sizes), self.device)
            chunks.append((units, part, self.parameters[first:last]))
            begin = part.stop
        return chunks

    def launch(self) -> gpu.Selected:
        """Accumulate and select, without waiting."""
        return self.units.accumulate_and_select(
            self.velocity, self.base, self.parameters, self.thresholds
        )

    def step(self) -> int:
        """Accumulate, select, read the counts, and bring to the host what was selected."""
        selected = self.launch()
        (counts,) = gpu.to_host(selected.counts).wait()
        indices, _ = gpu.to_host(*self.units.assemble(selected, counts, {})).wait()
        return indices.numel()

    def step_in(self, chunks: Sequence[Chunk]) -> int:
        """Do the same part by part, each copied beside the work on the next."""
        launched = []
        for units, part, parameters in chunks:
            selected = units.accumulate_and_select(
                self.velocity[part],
                self.base[part],
                parameters,
                self.thresholds[: len(parameters)],
            )
            launched.append((units, selected, gpu.to_host(selected.counts)))
        copies = []
        for units, selected, counted in launched:
            parts = units.assemble(selected, counted.wait()[0], {})
            copies.append(gpu.to_host(*parts, stream=self._side, after=counted))
        return sum(copy.wait()[0].numel() for copy in copies)

    def exact(self) -> int:
        """Select the exact top-k of every tensor, as in the first step."""
        parts = self.velocity.split(self.sizes)
        wanted = (math.ceil(self.density * size) for size in self.sizes)
        return sum(gpu.exact_top_k(p, k).numel() for p, k in zip(parts, wanted, strict=True))


def device_seconds(path: Path, repeats: int, device: torch.device) -> float:
    """Return the median time of a path on the device, launch overhead left out."""
    if device.type == "cpu":
        return host_seconds(path, repeats, device)
    taken = []
    path()
    for _ in range(repeats):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(QUEUED_CYCLES)
        began.record()
        path()
        ended.record()
        ended.synchronize()
        taken.append(began.elapsed_time(ended) / 1e3)
    return statistics.median(taken)


def host_seconds(path: Path, repeats: int, device: torch.device) -> float:
    """Return the median time of a path on the host, from one idle device to the next."""
    taken = []
    if device.type == "cuda":
        path()
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        path()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def measure(
    parameters: Sequence[int],
    density: float,
    repeats: int,
    device: torch.device,
    *,
    sweep: bool = False,
) -> Report:
    """Return, for each size, medians in milliseconds, bandwidths and figures.

    Args:
        parameters: numbers of parameters; those that memory has no room for are left out.
        density: fraction that is sent.
        repeats: repetitions of each path.
        device: a GPU; or the CPU, under Triton's interpreter.
        sweep: whether to try other sizes of blocks, too.
    """
    runs = [_run(n, density, repeats, device, sweep) for n in parameters if _fits(n, device)]
    name = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return {
        "machine": f"{name}, {platform.machine()}, torch {torch.__version__}, "
        f"triton {triton.__version__}",
        "density": density,
        "repeats": repeats,
        "runs": runs,
        "figures": [figure for run in runs for figure in _figures(run)],
    }


def _fits(parameters: int, device: torch.device) -> bool:
    # velocity, base, parameters, two buffers for the copy, and a fifth for the rest
    needed = 4 * parameters * (3 + 4) * 1.2
    return device.type == "cpu" or needed < torch.cuda.mem_get_info(device)[0]


def _run(
    parameters: int, density: float, repeats: int, device: torch.device, sweep: bool
) -> Report:
    model = Model(parameters, density, device)
    seconds = _kernels(model, repeats)
    seconds["step"] = host_seconds(model.step, repeats, device)
    for count in CHUNKS:
        path = partial(model.step_in, model.chunks(count))
        seconds[f"step in {count} chunks"] = host_seconds(path, repeats, device)
    seconds["exact top-k of all"] = host_seconds(model.exact, 3, device)
    swept = _sweep(model, repeats) if sweep else {}
    run: Report = {
        "parameters": model.total,
        "tensors": len(model.sizes),
        "selected": model.step(),
        "bytes_to_host": 8 * model.step(),
        "scratch_bytes": model.units.scratch_bytes,
    }
    total = model.total
    del model  # before the next one is drawn
    seconds["misaligned, first pass"] = _misaligned(parameters, density, repeats, device)
    rates = {name: 1e-9 * bytes_ * total / seconds[name] for name, bytes_ in BYTES.items()}
    return {
        **run,
        "ms": {name: 1e3 * s for name, s in seconds.items()},
        "gb_per_s": rates,
        "sweep_gb_per_s": {name: 16e-9 * total / s for name, s in swept.items()},
    }


def _kernels(model: Model, repeats: int) -> dict[str, float]:
    source, target = torch.zeros(2, 2 * model.total, device=model.device)
    source.normal_()
    paths: dict[str, Path] = {"copy": lambda: target.copy_(source)}
    modes = {
        "accumulate": gpu_passes.ACCUMULATE,
        "add": gpu_passes.ADD,
        "scan": gpu_passes.SUBTRACT,
    }
    for name, mode in modes.items():
        paths[f"{name}, first pass"] = partial(model.units.first, model.velocity, mode.value)
    paths["all passes"] = model.launch
    model.launch()  # tells the first pass where the operands are
    taken = {name: device_seconds(p, repeats, model.device) for name, p in paths.items()}
    model.velocity.normal_(generator=torch.Generator(model.device).manual_seed(0))
    return taken


def _misaligned(parameters: int, density: float, repeats: int, device: torch.device) -> float:
    """Time the first pass where the first tensor has three entries."""
    model = Model(parameters, density, device, aligned=False)
    model.launch()
    mode = gpu_passes.ACCUMULATE.value
    return device_seconds(lambda: model.units.first(model.velocity, mode), repeats, device)


def _sweep(model: Model, repeats: int) -> dict[str, float]:
    taken = {}
    for block in (1024, 2048, 4096, 8192):
        for entries in (256, 512, 1024):
            warps = block // entries
            if not 1 <= warps <= 16:
                continue
            units = Passes(model.sizes, [16] * len(model.sizes), model.device, block=block)
            units.accumulate_and_select(
                model.velocity, model.base, model.parameters, model.thresholds
            )
            taken[f"block {block}, {warps} warps"] = device_seconds(
                partial(units.first, model.velocity, gpu_passes.ACCUMULATE.value, warps),
                repeats,
                model.device,
            )
    return taken


def _figures(run: Report) -> Iterator[Report]:
    ms, rates, size = run["ms"], run["gb_per_s"], f"{run['parameters'] / 1e6:.0f} M"
    fused = "accumulate, first pass"
    yield _figure(f"{size}: first pass, of copy bandwidth", rates[fused] / rates["copy"], 0.8, True)
    for name in ("all passes", "step", *(f"step in {count} chunks" for count in CHUNKS)):
        yield _figure(f"{size}: {name} / first pass", ms[name] / ms[fused], 1.3, False)


def _figure(name: str, value: float, reach: float, at_least: bool) -> Report:
    met = value >= reach if at_least else value <= reach
    return {"name": name, "value": value, "reach": reach, "at_least": at_least, "met": met}


def table(report: Report) -> str:
    """Return the report as text."""
    lines = [f"{report['machine']}; density {report['density']}, {report['repeats']} repetitions"]
    for run in report["runs"]:
        lines += [
            "",
            f"{run['parameters']:,} parameters in {run['tensors']} tensors; {run['selected']:,} "
            f"selected, {run['bytes_to_host']:,} bytes to the host, scratch "
            f"{run['scratch_bytes']:,} bytes",
            f"{'path':<28}{'median ms':>12}{'GB/s':>8}",
        ]
        for name, ms in run["ms"].items():
            rate = f"{run['gb_per_s'][name]:8.0f}" if name in run["gb_per_s"] else ""
            lines.append(f"{name:<28}{ms:12.4f}{rate}")
        for name, rate in run["sweep_gb_per_s"].items():
            lines.append(f"{name:<40}{rate:8.0f}")
    lines += ["", f"{'figure':<48}{'measured':>9}{'reach':>10}"]
    for figure in report["figures"]:
        sign = ">=" if figure["at_least"] else "<="
        met = "" if figure["met"] else "   missed"
        lines.append(
            f"{figure['name']:<48}{figure['value']:9.2f}{sign:>4} {figure['reach']:5g}{met}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure on the GPU, or run everything once, in small, under the interpreter."""
    parser = argparse.ArgumentParser(prog="python -m experiments.exchange_cost.gpu")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--repeats", type=int, default=30, help="repetitions of each path")
    parser.add_argument("--density", type=float, default=0.01, help="fraction that is sent")
    parser.add_argument("--sweep", action="store_true", help="try other sizes of blocks, too")
    parser.add_argument(
        "--parameters", type=float, nargs="+", default=[1e6, RESNET18, 1e8, 1e9], help="model sizes"
    )
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = [int(n) for n in given.parameters]
    report = measure(sizes, given.density, given.repeats, device, sweep=given.sweep)
    print(json.dumps(report, indent=2) if given.json else table(report))


if __name__ == "__main__":
    main()
