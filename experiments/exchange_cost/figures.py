"""Figures: what was measured, beside what it should reach."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

__all__ = ["Figure", "Report", "as_rows", "machine"]

Report = dict[str, Any]


class Figure(NamedTuple):
    """One wanted figure: a measured number, and what it should reach."""

    name: str
    value: float
    reach: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the figure is reached."""
        return self.value >= self.reach if self.at_least else self.value <= self.reach


def as_rows(figures: Sequence[Figure]) -> list[Report]:
    """Return figures as they are written to JSON."""
    return [{**figure._asdict(), "met": figure.met} for figure in figures]


def machine() -> str:
    """Say what a report was measured on."""
    return f"{platform.machine()}, numpy {np.__version__}, torch {torch.__version__}"
