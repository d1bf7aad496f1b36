"""Real processes under faults, and the judgement of what they have kept."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

from experiments.faults.audit import Verdict, audit
from experiments.faults.report import Figure, Report, as_rows
from experiments.faults.served import ON_DISK
from experiments.faults.supervisor import Outcome, RunFailed, Setting, supervise

__all__ = ["kills", "run"]


def run(setting: Setting, folder: Path | None = None) -> tuple[Report, list[str]]:
    """Run under faults, and judge.

    Args:
        setting: what to run.
        folder: new; gets logs and states, and keeps them. None for one that is removed if all is
            well, and kept, and named, if not.

    Returns:
        What happened, for JSON; and what must not have happened, empty if all is well.
    """
    place = folder or Path(tempfile.mkdtemp(dir=ON_DISK, prefix="dgs-faults-"))
    try:
        outcome = supervise(setting, place)
    except RunFailed as failure:
        return {"setting": _said(setting), "failure": str(failure)}, [str(failure)]
    except BaseException:
        if folder is None:
            shutil.rmtree(place, ignore_errors=True)
        raise
    if not setting.durable:
        verdict = Verdict([], 0.0)
    else:
        verdict = audit(place, setting.shards, setting.seed)
    problems = [f"{p} (seed {setting.seed}; see {place})" for p in verdict.problems]
    if folder is None and not problems:
        shutil.rmtree(place)
    return {"setting": _said(setting), **_facts(outcome, verdict)}, problems


def kills(count: int = 200, seed: int = 1) -> Report:
    """Kill servers so often while workers train, and count what is lost.

    Args:
        count: SIGKILLs of servers.
        seed: of the plan.
    """
    setting = Setting(
        seed=seed, seconds=3600.0, kills=count, weights={"kill server": 1.0}, mean_gap_s=1.0
    )
    report, problems = run(setting)
    report["problems"] = problems
    figures = as_rows(
        Figure(f"acknowledged updates lost in {report['kills']} SIGKILLs", report["lost"], 0),
        Figure("problems that the audit found", len(problems), 0),
    )
    return {**report, "figures": figures}


def _said(setting: Setting) -> Report:
    return {**asdict(setting), "weights": dict(setting.weights)}


def _facts(outcome: Outcome, verdict: Verdict) -> Report:
    return {
        **asdict(outcome),
        "faults": dict(outcome.faults),
        "acknowledged": verdict.acknowledged,
        "lost": verdict.lost,
        "distance": verdict.distance,
        "shards": [asdict(shard) for shard in verdict.shards],
        "problems": verdict.problems,
    }
