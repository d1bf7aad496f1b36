"""Run storms of several strengths for several methods, and put them side by side."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.faults.report import origin
from experiments.faults.simulation.command import prepared
from experiments.faults.storm import asynchronous, synchronous
from experiments.faults.storm.ledger import LAST_LOOKS, Ledger, Report
from experiments.faults.storm.setting import Setting

__all__ = ["METHODS", "Job", "add_arguments", "main", "measure", "run_command", "summary"]

METHODS: dict[str, Callable[[Setting], Ledger]] = {
    "dgs": asynchronous.run_asynchronous,
    "elastic": synchronous.run_elastic,
    "static": lambda s: synchronous.run_static(s, checkpoints=False),
    "static, checkpoints": lambda s: synchronous.run_static(s, checkpoints=True),
}
"""By name; all but the first are synchronous all-reduce groups."""

FIGURES = (
    "participation_of_ready",
    "participation_of_all",
    "goodput_of_calm",
    "goodput_of_available",
    "throughput_samples_per_s",
    "up_share",
    "lost_steps",
    "lost_steps_per_kill",
    "loss",
    "loss_above_calm",
    "loss_above_calm_at_equal_samples",
    "accuracy",
)


@dataclass(frozen=True)
class Job:
    """One run."""

    method: str
    setting: Setting

    @property
    def case(self) -> str:
        """What the runs of all seeds have in common."""
        s = self.setting
        away = f", {s.restart_s:g} s away" if s.kills_per_hour else ""
        return f"{self.method}, {s.kills_per_hour:g} kills/h{away}"


def run(job: Job) -> Report:
    """Run one job, in a process of its own."""
    torch.set_num_threads(1)
    with prepared():
        return METHODS[job.method](job.setting).report()


def measure(
    jobs: Sequence[Job], processes: int, note: Callable[[Report], None] = lambda report: None
) -> Report:
    """Run jobs, and put the runs of a case together.

    Args:
        jobs: those without kills, of each method and seed, are what the others are compared with.
        processes: how many run at a time; results do not depend on it.
        note: called with the report so far, whenever a job has ended.

    Returns:
        By case: its setting, its runs, and median and range of each figure.
    """
    done: dict[Job, Report] = {}
    report: Report = {}
    if processes == 1:
        for job in jobs:
            done[job] = run(job)
            note(together(done))
        return together(done)
    with ProcessPoolExecutor(processes, get_context("spawn"), initializer=_be_nice) as pool:
        futures = {pool.submit(run, job): job for job in jobs}
        for future in as_completed(futures):
            done[futures[future]] = future.result()
            report = together(done)
            note(report)
    return report


def _be_nice() -> None:
    os.nice(10)


def together(done: dict[Job, Report]) -> Report:
    """Compare each run with the calm one of its method and seed, and sum up each case."""
    calm = {(j.method, j.setting.seed): r for j, r in done.items() if j.setting.kills_per_hour == 0}
    cases: dict[str, Report] = {}
    for job in sorted(done, key=_order):
        base = calm.get((job.method, job.setting.seed))
        if base is None:
            continue
        case = cases.setdefault(job.case, {"method": job.method, **_said(job.setting), "runs": []})
        case["runs"].append({**done[job], **compared(done[job], base)})
    for case in cases.values():
        case["figures"] = summary(case["runs"])
    return cases


def _order(job: Job) -> tuple[Any, ...]:
    s = job.setting
    return (list(METHODS).index(job.method), s.restart_s, s.kills_per_hour, s.seed)


def _said(setting: Setting) -> Report:
    return {"kills_per_hour": setting.kills_per_hour, "restart_s": setting.restart_s}


def compared(report: Report, calm: Report) -> Report:
    """Compare a run with the calm run of the same method, seed and horizon."""
    curve = np.array(calm["curve"])
    smooth = [curve[max(0, i - LAST_LOOKS + 1) : i + 1, 2].mean() for i in range(len(curve))]
    there = float(np.interp(report["samples"], curve[:, 1], smooth))
    goodput = report["samples"] / calm["samples"]
    return {
        "goodput_of_calm": goodput,
        "goodput_of_available": goodput / report["up_share"],
        "loss_above_calm": report["loss"] - calm["loss"],
        "loss_above_calm_at_equal_samples": report["loss"] - there,
    }


def summary(runs: Sequence[Report]) -> dict[str, list[float]]:
    """Return median, least and most of each figure."""
    columns = {name: [float(run[name]) for run in runs] for name in FIGURES}
    return {
        name: [round(f(values), 5) for f in (statistics.median, min, max)]
        for name, values in columns.items()
    }


def table(cases: Report) -> str:
    """Return the medians as text."""
    names = ("ready", "all", "goodput", "of avail.", "lost/kill", "loss", "accuracy")
    keys = (*FIGURES[:4], "lost_steps_per_kill", "loss", "accuracy")
    lines = [f"{'':<46}" + "".join(f"{name:>10}" for name in names)]
    for name, case in cases.items():
        medians = [case["figures"][key][0] for key in keys]
        shown = [f"{m:10.1%}" for m in medians[:4]] + [f"{m:10.3f}" for m in medians[4:]]
        lines.append(f"{name:<46}" + "".join(shown))
    return "\n".join(lines)


def planned(given: argparse.Namespace) -> list[Job]:
    """Return the jobs of a command: all rates at the usual restart time, the others at one seed."""
    jobs = []
    first, *others = given.restart_s
    calm_first = sorted({0.0, *given.kills_per_hour})
    for seed, rate, name in product(range(given.seeds), calm_first, METHODS):
        jobs.append(Job(name, _setting(given, seed, rate, first)))
    for away, rate, name in product(others, calm_first, METHODS):
        if rate:
            jobs.append(Job(name, _setting(given, 0, rate, away)))
    return jobs


def _setting(given: argparse.Namespace, seed: int, rate: float, away_s: float) -> Setting:
    return Setting(
        seed=seed,
        workers=given.workers,
        horizon_s=3600.0 * given.hours,
        kills_per_hour=rate,
        restart_s=away_s,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    add = parser.add_argument
    add("--workers", type=int, default=32, help="workers, or members of a group (default: 32)")
    add("--kills-per-hour", type=_numbers, default=[0.0, 100.0, 200.0, 500.0], metavar="K,K,...")
    add("--hours", type=float, default=1.0, help="virtual time of each run (default: 1)")
    add("--seeds", type=int, default=3, help="runs of each (default: 3)")
    add(
        "--restart-s",
        type=_numbers,
        default=[30.0, 10.0, 120.0],
        metavar="S,S,...",
        help="median time that a killed worker is away; all but the first run with one seed only "
        "(default: 30,10,120)",
    )
    add("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    add("--real", action="store_true", help="two minutes of real processes as well, or alone:")
    add("--only-real", action="store_true", help="leave the virtual storms out")
    add("--json", type=Path, metavar="OUT", help="write this file, and pictures beside it")


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def run_command(arguments: Sequence[str]) -> int:
    """Run the command with a list of arguments; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.faults storm",
        description="Kill workers and server in virtual time, beside synchronous groups.",
    )
    add_arguments(parser)
    return main(parser.parse_args(arguments))


def main(args: argparse.Namespace) -> int:
    """Run storms; 0 always: what the figures are is for the reader to judge."""
    report = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    if not args.only_real:
        report |= {"origin": origin(), "setting": asdict(_setting(args, 0, 0.0, args.restart_s[0]))}

        def note(cases: Report) -> None:
            report["virtual"] = cases
            _write(report, args.json)

        measure(planned(args), args.jobs, note)
        print(table(report["virtual"]))
    if args.real or args.only_real:
        from experiments.faults.storm import real  # starts processes

        report["real"] = {"origin": origin(), **real.measure()}
        _write(report, args.json)
        print(real.told(report["real"]))
    if args.json and "virtual" in report:
        from experiments.faults.storm.plots import draw  # needs matplotlib

        draw(report["virtual"], args.json.parent)
    return 0


def _write(report: Report, path: Path | None) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(sys.argv[1:]))
