"""Pictures of a report, beside its numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

from experiments.exchange_cost.figures import Report

__all__ = ["draw"]


def draw(report: Report, folder: Path) -> list[Path]:
    """Write one picture per part of the report that was measured.

    Args:
        report: what ``--json`` prints.
        folder: where the pictures go.

    Returns:
        The files.
    """
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt  # only after the backend is chosen

    pictures: dict[str, Callable[[Report, Any], None]] = {
        "paths": _paths,
        "index": _index,
        "loopback": _loopback,
        "scale": _scale,
    }
    written = []
    for part, picture in pictures.items():
        if part not in report:
            continue
        panels = 2 if part == "scale" else 1
        figure, axes = plt.subplots(1, panels, figsize=(6.4 * panels, 4), layout="constrained")
        picture(report[part], axes)
        written.append(folder / f"{part}.png")
        figure.savefig(written[-1], dpi=110)
        plt.close(figure)
    return written


def _paths(part: Report, axes: Any) -> None:
    shown = {n: t for n, t in part["ms"].items() if n != "worker, torch.topk"}
    names = list(shown)[::-1]
    plain = [n.startswith("np.") for n in names]
    axes.barh(names, [shown[n] for n in names], color=["0.6" if p else "C0" for p in plain])
    axes.set_xlabel("ms, median; one core")
    topk = part["ms"]["worker, torch.topk"]
    axes.set_title(f"{part['parameters'] / 1e6:.1f} M parameters (torch.topk: {topk:.0f} ms)")


def _index(part: Report, axes: Any) -> None:
    names = list(dict.fromkeys(row["support"] for row in part["rows"]))
    densities = sorted({row["density"] for row in part["rows"]}, reverse=True)
    for shift, density in zip((-0.2, 0.2), densities, strict=True):
        rows = [
            r for n in names for r in part["rows"] if (r["support"], r["density"]) == (n, density)
        ]
        bits = [max(r["bits"] for r in rows if r["support"] == n) for n in names]
        least = [max(r["chain_bits"] for r in rows if r["support"] == n) for n in names]
        at = [i + shift for i in range(len(names))]
        axes.bar(at, bits, 0.38, label=f"sent, {density:.1%}")
        axes.plot(at, least, "k_", markersize=16, label="entropy" if shift < 0 else None)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("index bits per entry")
    axes.legend()


def _loopback(part: Report, axes: Any) -> None:
    ms = part["ms"]
    bars = {
        "over gRPC": ["over gRPC"],
        "one process": ["collect", "handle", "absorb"],
        "kernels": ["worker path", "server path"],
    }
    for bar, pieces in bars.items():
        left = 0.0
        for number, piece in enumerate(pieces):
            axes.barh(bar, ms[piece], left=left, color=f"C{number}", edgecolor="white")
            axes.text(left + ms[piece] / 2, bar, piece, ha="center", va="center", fontsize=8)
            left += ms[piece]
    axes.invert_yaxis()
    axes.set_xlabel("ms, median")
    axes.set_title("One exchange")


def _scale(part: Report, axes: Any) -> None:
    sizes, workers = axes
    for name in part["sizes"][0]["ms"]:
        style = ":" if name.startswith("np.") else "-"
        at = [row["parameters"] for row in part["sizes"]]
        sizes.loglog(at, [r["ms"][name] for r in part["sizes"]], style, marker="o", label=name)
    sizes.set_xlabel("parameters")
    sizes.set_ylabel("ms, median; one core")
    sizes.legend()
    for name in ("walk", "compare", "np.subtract"):
        at = [row["workers"] for row in part["workers"]]
        workers.plot(at, [r["ms"][name] for r in part["workers"]], marker="o", label=name)
    workers.set_xscale("log", base=2)
    workers.set_xlabel("workers; 11.2 M parameters, 0.1 %")
    workers.set_ylabel("ms an exchange, median")
    workers.set_ylim(bottom=0)
    workers.legend()
