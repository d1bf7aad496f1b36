"""Pictures of storms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

from experiments.faults.storm.ledger import Report

__all__ = ["draw"]

NAMES = {
    "dgs": "dgs",
    "elastic": "synchronous, elastic",
    "static": "synchronous, static",
    "static, checkpoints": "synchronous, static, checkpoints",
}
PANELS = {
    "participation_of_ready": "participation of workers that are up",
    "participation_of_all": "participation of all workers",
    "goodput_of_calm": "goodput, of the calm run",
    "goodput_of_available": "goodput, of available worker time",
}
TICKS = (0.8, 1.0, 1.5, 2.0, 3.0)
GOALS = {"participation": 0.95, "goodput": 0.9}


def draw(cases: Report, folder: Path) -> list[Path]:
    """Write ``storm-figures.png`` and ``storm-loss.png``.

    Args:
        cases: what `experiments.faults.storm.run.measure` returns.
        folder: where the pictures go.

    Returns:
        The files.
    """
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt  # only after the backend is chosen

    usual = max(case["restart_s"] for case in cases.values() if not case["kills_per_hour"])
    written = []
    for name, panels, size, picture in (
        ("figures", (2, 2), (10.0, 7.0), _figures),
        ("loss", (1, len(_rates(cases, usual))), (12.0, 3.6), _losses),
    ):
        figure, axes = plt.subplots(*panels, figsize=size, layout="constrained", squeeze=False)
        picture(cases, usual, axes)
        written.append(folder / f"storm-{name}.png")
        figure.savefig(written[-1], dpi=110)
        plt.close(figure)
    return written


def _rates(cases: Report, restart_s: float) -> list[float]:
    return sorted({c["kills_per_hour"] for c in cases.values() if c["restart_s"] == restart_s})


def _of(cases: Report, method: str, restart_s: float) -> list[Report]:
    """Return the cases of a method, calm first."""
    found = [
        c
        for c in cases.values()
        if c["method"] == method and (c["restart_s"] == restart_s or not c["kills_per_hour"])
    ]
    return sorted(found, key=lambda c: float(c["kills_per_hour"]))


def _figures(cases: Report, usual: float, axes: Any) -> None:
    others = sorted({c["restart_s"] for c in cases.values()} - {usual})
    for axis, (key, title) in zip(axes.flat, PANELS.items(), strict=True):
        for number, (method, label) in enumerate(NAMES.items()):
            rows = _of(cases, method, usual)
            at = [r["kills_per_hour"] for r in rows]
            middle, least, most = zip(*(r["figures"][key] for r in rows), strict=True)
            axis.plot(at, middle, marker="o", color=f"C{number}", label=label)
            axis.fill_between(at, least, most, color=f"C{number}", alpha=0.2)
        for style, away_s in zip((":", "--"), others, strict=False):
            rows = _of(cases, "dgs", away_s)
            if len(rows) < 2:
                continue
            at = [r["kills_per_hour"] for r in rows]
            values = [r["figures"][key][0] for r in rows]
            axis.plot(at, values, style, color="C0", label=f"dgs, {away_s:g} s away")
        axis.axhline(GOALS[key.partition("_")[0]], color="0.6", linewidth=0.8)
        axis.set(title=title, ylim=(0, 1.05), xlabel=f"kills per hour; {usual:g} s away")
    axes.flat[0].legend(fontsize=8)


def _losses(cases: Report, usual: float, axes: Any) -> None:
    for axis, rate in zip(axes.flat, _rates(cases, usual), strict=True):
        for number, (method, label) in enumerate(NAMES.items()):
            for case in _of(cases, method, usual):
                if case["kills_per_hour"] == rate:
                    curve = case["runs"][0]["curve"]
                    minutes = [row[0] / 60 for row in curve]
                    axis.plot(minutes, [row[2] for row in curve], color=f"C{number}", label=label)
        axis.set(title=f"{rate:g} kills per hour", xlabel="virtual minutes", yscale="log")
        axis.set(ylim=(0.75, 3.2), yticks=TICKS, yticklabels=[f"{t:g}" for t in TICKS])
        axis.minorticks_off()
    axes.flat[0].set_ylabel("test loss, one seed")
    axes.flat[0].legend(fontsize=8)
