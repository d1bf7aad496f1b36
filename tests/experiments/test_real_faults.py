"""Real servers and workers that are killed, stopped and cut off lose nothing that was acknowledged.

The hours-long version: ``python -m experiments.faults real --minutes M --seed S``.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import pytest

from experiments.faults import real
from experiments.faults.plan import KINDS, Kind, faults
from experiments.faults.supervisor import Setting

SEED = 3
KILLS = 10
WEIGHTS: Mapping[Kind, float] = dict.fromkeys(KINDS, 1.0) | {
    "kill server": 12.0,
    "kill worker": 4.0,
}


@pytest.mark.dist
@pytest.mark.slow
def test_real_processes_lose_nothing_whatever_ends_them(tmp_path: Path) -> None:
    # ends after ten killed servers, or after a minute of faults; pytest keeps the folder
    setting = Setting(seed=SEED, seconds=60.0, kills=KILLS, mean_gap_s=0.5, weights=WEIGHTS)
    report, problems = real.run(setting, tmp_path / "run")
    assert problems == [], f"seed {SEED}"
    assert report["lost"] == 0
    assert report["kills"] >= KILLS
    assert report["acknowledged"] > 100 * KILLS
    assert report["distance"] < 0.1


def test_equal_seeds_plan_equal_faults() -> None:
    one, same, other = (list(islice(faults(s, 2, 3, mean_gap_s=1.0), 50)) for s in (7, 7, 8))
    assert one == same != other
    assert {fault.kind for fault in one} <= set(KINDS)
