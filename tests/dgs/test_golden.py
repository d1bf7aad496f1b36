"""Trajectories that never change by accident: the same seeds give the same bits for ever.

A change that is meant to change numbers rewrites the file with WRITE_GOLDEN=1, in a commit that
says why.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dgs.kernels
from dgs.config import WorkerConfig
from dgs.tracker import digest
from tests.helpers.sites import SHAPES, Site, gaussian, make_servers, server_model, space_of

FILE = Path(__file__).parents[1] / "golden" / "trajectories.json"
CASES: dict[str, dict[str, Any]] = {
    "samomentum exact float32": {"selection": "exact"},
    "samomentum tracked float32": {"selection": "tracked", "dense_below": 10},
    "samomentum everything down": {"download_density": 1.0},
    "residual exact bfloat16": {"rule": "residual", "selection": "exact", "values": "bfloat16"},
    "dgc exact int8": {"rule": "dgc", "selection": "exact", "values": "int8"},
    "samomentum exact int4": {"selection": "exact", "values": "int4"},
    "samomentum exact int2": {"selection": "exact", "values": "int2"},
    "samomentum exact sign": {"selection": "exact", "values": "sign"},
    "asgd": {"rule": "none", "density": 1.0, "download_density": 1.0},
}


def trajectory(settings: dict[str, Any], num_shards: int) -> dict[str, Any]:
    """Let three workers take 40 turns at a noisy quadratic; tell where that leads."""
    config = WorkerConfig(**{"density": 0.1, "download_density": 0.2, "momentum": 0.6, **settings})
    rng = np.random.default_rng(20)
    size = space_of(SHAPES).size
    target = gaussian(rng, size)
    servers = make_servers(num_shards)
    start = gaussian(rng, size)
    sites = [Site(f"w{i}", servers, config, start) for i in range(3)]
    for _ in range(40):
        site = sites[int(rng.integers(3))]
        gradient = site.base - target + np.float32(0.3) * gaussian(rng, size)
        site.exchange(np.float32(0.0625) * gradient)
    for site in sites:
        site.client.close(leave=False)
    return {
        "model": f"{digest(server_model(servers)):016x}",
        "bases": [f"{digest(s.base):016x}" for s in sites],
        "bytes": [[s.client.bytes_up, s.client.bytes_down] for s in sites],
    }


@pytest.mark.parametrize("compiled_from", [0, dgs.kernels.COMPILED_FROM])
@pytest.mark.parametrize("name", CASES)
def test_the_trajectory_is_the_recorded_one_with_every_kind_of_kernel(
    name: str, compiled_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dgs.kernels, "COMPILED_FROM", compiled_from)
    found = trajectory(CASES[name], num_shards=1)
    if os.environ.get("WRITE_GOLDEN") == "1":
        recorded = json.loads(FILE.read_text()) if FILE.exists() else {}
        recorded[name] = found
        FILE.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")
    assert json.loads(FILE.read_text())[name] == found


def test_every_recorded_trajectory_has_its_case() -> None:
    assert sorted(json.loads(FILE.read_text())) == sorted(CASES)
