"""Figures: what was measured, beside what it should reach; and where results are kept."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
import torch

__all__ = ["RESULTS", "Figure", "Report", "as_rows", "origin", "save", "table"]

RESULTS = Path(__file__).parent / "results"

Report = dict[str, Any]


class Figure(NamedTuple):
    """One wanted figure: a measured number, and what it should reach."""

    name: str
    value: float
    reach: float
    unit: str = ""
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the figure is reached.

        Example:
            >>> Figure("lost", 0, 0).met, Figure("rate", 0.8, 0.9, at_least=True).met
            (True, False)
        """
        return self.value >= self.reach if self.at_least else self.value <= self.reach


def as_rows(*figures: Figure) -> list[Report]:
    """Return figures as they are written to JSON."""
    return [{**figure._asdict(), "met": figure.met} for figure in figures]


def origin() -> Report:
    """Say on what, and with which code, something was measured."""
    git = ["git", "-C", str(Path(__file__).parent)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(
        [*git, "status", "--porcelain"], capture_output=True, text=True, check=False
    )
    versions = f"numpy {np.__version__}, torch {torch.__version__}, grpcio {grpc.__version__}"
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {versions}",
        "commit": head.stdout.strip() + ("+" if changed.stdout.strip() else ""),
    }


def save(name: str, report: Report) -> Path:
    """Write a report to ``results/``; parts that it lacks stay as they were."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**before, **report}, indent=2) + "\n")
    return path


def table(rows: Sequence[Report]) -> str:
    """Return figures as text."""
    lines = [f"{'figure':<58}{'measured':>12}{'reach':>14}"]
    for row in rows:
        sign = ">=" if row["at_least"] else "<="
        met = "" if row["met"] else "   missed"
        lines.append(
            f"{row['name']:<58}{row['value']:12.4g}{sign:>5} {row['reach']:<8.4g} "
            f"{row['unit']}{met}"
        )
    return "\n".join(lines)
