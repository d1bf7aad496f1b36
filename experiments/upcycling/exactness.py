"""How far upcycled models are from their dense models before any training."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from experiments.upcycling.synthetic import KINDS, write_random
from moe.upcycling import Options, UpcycleConfig, upcycle

__all__ = ["CASES", "measure_exactness"]

G = {"granularity": 8, "method": "virtual-group"}
SOFT = {"routing": "softmax-topk"}
CASES: dict[str, dict[str, Any]] = {
    "E8T2": {"experts": 8, "top_k": 2},
    "E8T1": {"experts": 8, "top_k": 1},
    "E8G8T8": {"experts": 64, "top_k": 8, **G},
    "E8G8T16": {"experts": 64, "top_k": 16, **G},
    "E8G8T8, down": {"experts": 64, "top_k": 8, "scaling": "down", **G},
    "E8G8T8, paper": {"experts": 64, "top_k": 8, "scaling": "paper", **G},
    "E8G8T8, none": {"experts": 64, "top_k": 8, "scaling": "none", **G},
    "E8G8T6, 2 shared": {"experts": 48, "top_k": 6, "shared_experts": 2, **G},
    "E8T2, half the layers": {"experts": 8, "top_k": 2, "layers": (1, 3)},
    "E8T2, centroids": {"experts": 8, "top_k": 2, "router_init": "centroid"},
    "E8T2 softmax first": {"experts": 8, "top_k": 2, **SOFT},
    "E8T2 softmax first, std .002": {"experts": 8, "top_k": 2, "router_std": 0.002, **SOFT},
    "E8T2 softmax first, none": {"experts": 8, "top_k": 2, "scaling": "none", **SOFT},
    "E8T2 softmax first, std .16": {"experts": 8, "top_k": 2, "router_std": 0.16, **SOFT},
    "E8T2 softmax first, std .16, calibrated": {
        "experts": 8,
        "top_k": 2,
        "router_std": 0.16,
        "scaling": "calibrated",
        **SOFT,
    },
    "E8G8T8 softmax first": {"experts": 64, "top_k": 8, **G, **SOFT},
    "E8G8T8 softmax first, paper": {"experts": 64, "top_k": 8, "scaling": "paper", **G, **SOFT},
    "E8T2, drop .5": {"experts": 8, "top_k": 2, "method": "drop"},
    "E8T2, drop .5 per matrix": {
        "experts": 8,
        "top_k": 2,
        "method": "drop",
        "drop_scope": "matrix",
    },
    "E8T2, noise .01": {"experts": 8, "top_k": 2, "method": "noise"},
}
"""Scaling is exact and weights are renormalised where nothing else is said."""


def measure_exactness(seeds: int) -> list[dict[str, Any]]:
    """Return mean and deviation over seeds and architectures of every case.

    Args:
        seeds: how many random models of each architecture.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in CASES}
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            for seed in range(seeds):
                source = write_random(Path(folder) / f"{kind}-{seed}", kind, seed)
                for name, settings in CASES.items():
                    config = UpcycleConfig(**settings, seed=seed)
                    target = Path(folder) / "result"
                    told = upcycle(source, target, config, options=Options(overwrite=True))
                    found[name].append({"architecture": kind, "seed": seed, **_figures(told)})
    return [_row(name, runs) for name, runs in found.items()]


def _figures(report: dict[str, Any]) -> dict[str, float]:
    measured = report["preservation"]
    return {
        "relative_logit_error": measured["relative_logit_error"],
        "argmax_agreement": measured["argmax_agreement"],
        "flops_ratio": report["flops_ratio"],
    }


def _row(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    errors = [run["relative_logit_error"] for run in runs]
    return {
        "case": name,
        "error_mean": statistics.mean(errors),
        "error_deviation": statistics.stdev(errors) if len(errors) > 1 else 0.0,
        "error_largest": max(errors),
        "argmax_agreement": statistics.mean(run["argmax_agreement"] for run in runs),
        "runs": runs,
    }
