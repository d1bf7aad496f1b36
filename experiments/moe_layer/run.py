"""Time the mixture-of-experts layer and count its bytes: ``python -m experiments.moe_layer``.

On a machine without a GPU: what dispatch and combine cost beside the grouped GEMM, and what crosses
between ranks. With one: the layer's rate beside that of a dense product. The plain loop and, where
it is installed, `transformers` run in the same process, in turn with everything else.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from experiments.moe_layer.device import dense_rate, measure_shape, write_profile
from experiments.moe_layer.layers import time_layers
from experiments.moe_layer.shapes import SHAPES, Shape
from experiments.moe_layer.wire import over_the_wire

RESULTS = Path(__file__).parent / "results"
EXAMPLES = """examples:
  python -m experiments.moe_layer                    tables; the GPU's part where there is one
  python -m experiments.moe_layer --json             the same numbers as JSON
  python -m experiments.moe_layer --world 4          experts over four processes
  python -m experiments.moe_layer --part gpu --dry-run
                                                     run the GPU's part on the CPU with tiny shapes,
                                                     to see that it runs: no measurement
"""
REACH = {"Mixtral-8x7B": 0.5, "Qwen2-57B-A14B": 0.4}
"""Wanted shares of the dense rate."""

REACH_BANDWIDTH = 0.7
Report = dict[str, Any]


def main() -> None:
    """Measure, and print tables or JSON."""
    given = _arguments()
    report: Report = {"machine": _machine()}
    if given.part in ("cpu", "all"):
        report["cpu"] = cpu_part(given.repeats, given.divisor, given.tokens, given.world)
    if given.part == "gpu" or (given.part == "all" and torch.cuda.is_available()):
        report["gpu"] = gpu_part(given.repeats, dry=given.dry_run)
    print(json.dumps(report, indent=1) if given.json else table(report))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.moe_layer",
        description=(__doc__ or "").partition("\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--part",
        choices=("cpu", "gpu", "all"),
        default="all",
        help="what to measure (default: all, the GPU's part only where there is one)",
    )
    parser.add_argument("--repeats", type=int, default=9, help="repetitions (default: 9)")
    parser.add_argument(
        "--divisor", type=int, default=8, help="CPU: divide the models' widths by it (default: 8)"
    )
    parser.add_argument(
        "--tokens", type=int, default=1024, help="CPU: tokens of a rank (default: 1024)"
    )
    parser.add_argument(
        "--world", type=int, default=2, help="CPU: processes to spread experts over (default: 2)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="run the GPU's part tiny and on the CPU"
    )
    given = parser.parse_args()
    if given.part == "gpu" and not torch.cuda.is_available() and not given.dry_run:
        parser.error("there is no CUDA device; add --dry-run to see that the part runs")
    if min(given.repeats, given.divisor, given.tokens, given.world) < 1:
        parser.error("give positive numbers")
    if any(shape.experts % given.world for shape in SHAPES):
        parser.error(f"--world {given.world} does not divide the models' 8 and 64 experts")
    return given


def cpu_part(repeats: int, divisor: int, tokens: int, world: int) -> Report:
    """Return times on one core, and bytes and times over a world of processes."""
    torch.set_num_threads(1)
    device, dtype = torch.device("cpu"), torch.float32
    found: Report = {"divisor": divisor, "repeats": repeats, "layers": {}, "wire": {}}
    for shape in (s.smaller(divisor, tokens) for s in SHAPES):
        layers = time_layers(shape, device, dtype, repeats)
        ms = {name: times["ms"] for name, times in layers["times"].items()}
        moving = ms["order of rows"] + ms["permute"] + ms["unpermute"]
        layers["dispatch and combine / experts"] = moving / ms["experts"]
        found["layers"][shape.name] = layers
        found["wire"][shape.name] = over_the_wire(shape, world, repeats, dtype)
    return found


def gpu_part(repeats: int, *, dry: bool) -> Report:
    """Return rates of both layers on the GPU, and keep a profile of each.

    Args:
        repeats: repetitions that are timed.
        dry: run tiny shapes on the CPU instead; nothing is kept.
    """
    device = torch.device("cpu" if dry else "cuda")
    if dry:
        torch.set_num_threads(1)
    dtype, size = torch.bfloat16, 128 if dry else 8192
    shapes: tuple[Shape, ...] = tuple(s.smaller(64, 64) for s in SHAPES) if dry else SHAPES
    rate = dense_rate(size, device, dtype, repeats)
    found: Report = {"dry run": dry, "dense": {"size": size, "flop_per_s": rate}, "layers": {}}
    for shape in shapes:
        found["layers"][shape.name] = measure_shape(shape, device, dtype, rate, repeats)
        if not dry:
            write_profile(shape, device, dtype, RESULTS / f"profile-{shape.name}.txt")
            torch.cuda.empty_cache()
    return found


def table(report: Report) -> str:
    """Return the report as text."""
    lines = [f"{name}: {value}" for name, value in report["machine"].items()]
    for name, found in report.get("cpu", {}).get("layers", {}).items():
        lines += ["", f"{name} / {report['cpu']['divisor']}, {found['tokens']} tokens, float32"]
        lines += _times(found)
        ratio = found["dispatch and combine / experts"]
        lines.append(f"  dispatch and combine over the experts' time: {ratio:.3f}")
        lines += _wire(report["cpu"]["wire"][name])
    if "gpu" in report:
        lines += _gpu(report["gpu"])
    return "\n".join(lines)


def _times(found: Report) -> list[str]:
    lines = [f"  {'forwards and backwards':<28}{'median ms':>10}{'fastest':>10}{'apart':>10}"]
    for name, times in found["times"].items():
        apart = f"{found['apart'][name]:10.1e}" if name in found["apart"] else ""
        lines.append(f"  {name:<28}{times['ms']:10.2f}{times['fastest_ms']:10.2f}{apart}")
    return lines


def _wire(found: Report) -> list[str]:
    lines = [
        f"  experts over {found['world']} processes, {found['tokens_per_rank']} tokens each:",
        f"  {'':<12}{'bytes sent':>14}{'rows, counts':>14}{'ms':>10}",
    ]
    for name, taken in found["ms"].items():
        sizes = found["bytes"].get(name)
        cells = f"{sizes['sent']:14,}{sizes['rows and counts']:14,}" if sizes else " " * 28
        lines.append(f"  {name:<12}{cells}{taken:10.2f}")
    lines.append("  equal" if found["equal"] else "  NOT EQUAL: something else was sent")
    return lines


def _gpu(found: Report) -> list[str]:
    lines = ["", f"dense product of {found['dense']['size']}^3, bfloat16: "]
    lines[-1] += f"{found['dense']['flop_per_s'] / 1e12:.1f} TFLOP/s"
    if found["dry run"]:
        lines += ["dry run on the CPU with tiny shapes: none of these numbers means anything"]
    for name, layer in found["layers"].items():
        lines += ["", f"{name}, {layer['tokens']} tokens, bfloat16, kernels: {layer['kernels']}"]
        lines += _times(layer)
        if found["dry run"]:
            continue
        reach = {"layer": REACH[name]}
        for part, share in layer["share of the dense rate"].items():
            lines.append(_figure(f"{part} / dense rate", share, reach.get(part)))
        for part, share in layer["share of the copy's bandwidth"].items():
            lines.append(_figure(f"{part} / copy bandwidth", share, REACH_BANDWIDTH))
    return lines


def _figure(name: str, value: float, reach: float | None) -> str:
    wanted = (
        "" if reach is None else f"   wanted >= {reach:g}{'' if value >= reach else ', missed'}"
    )
    return f"  {name:<28}{value:10.3f}{wanted}"


def _machine() -> dict[str, str]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        "gpu": gpu,
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
