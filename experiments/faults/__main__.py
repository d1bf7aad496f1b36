"""Prove that nothing is lost: ``python -m experiments.faults``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from experiments.faults import costs, endurance, noticing, real
from experiments.faults.report import Report, origin, save, table
from experiments.faults.supervisor import Setting, told

EXAMPLES = """\
examples:
  python -m experiments.faults --seeds 3000          simulated histories (also: simulate --help)
  python -m experiments.faults real --minutes 1      real processes under faults, then the audit
  python -m experiments.faults real --minutes 480 --seed 7 --pause-s 0.02 --keep run-7
  python -m experiments.faults storm                 kills in virtual time (also: storm --help)
  python -m experiments.faults figures               all that needs real processes: 25 minutes
  python -m experiments.faults figures --part noticing commit --json
"""

FIGURES: dict[str, Callable[[], Report]] = {
    "kills": real.kills,
    "noticing": noticing.measure,
    "back": endurance.shard_back,
    "stopped": costs.stopped_worker,
    "memory": endurance.memory_slope,
    "log": costs.logged_exchange,
    "commit": costs.group_commit,
}


def main(arguments: Sequence[str]) -> int:
    """Run one part; return the exit code."""
    if arguments and arguments[0].startswith("--seed"):
        arguments = ["simulate", *arguments]
    if arguments and arguments[0] == "simulate":
        from experiments.faults import simulation  # has a command line of its own

        return int(simulation.run(list(arguments[1:])))
    if arguments and arguments[0] == "storm":
        from experiments.faults.storm.run import run_command

        return run_command(list(arguments[1:]))
    given = _parser().parse_args(arguments)
    return int(given.part_of_it(given))


def _real(given: argparse.Namespace) -> int:
    setting = Setting(
        seed=given.seed,
        seconds=60.0 * given.minutes,
        shards=given.shards,
        workers=given.workers,
        mean_gap_s=given.mean_gap_s,
        snapshot_interval_s=given.snapshot_interval,
        pause_s=given.pause_s,
    )
    report, problems = real.run(setting, given.keep)
    if given.save:
        save("real", {f"seed {given.seed}": origin() | report})
    print(json.dumps(report, indent=2) if given.json else told(report))
    for problem in problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _figures(given: argparse.Namespace) -> int:
    torch.set_num_threads(1)  # the server has the other core
    reports: Report = {}
    for part in given.part:
        reports[part] = origin() | FIGURES[part]()
        if given.save:
            save("figures", {part: reports[part]})
    rows = [row for report in reports.values() for row in report["figures"]]
    print(json.dumps(reports, indent=2) if given.json else table(rows))
    return 0


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m experiments.faults",
        description="Prove that nothing is lost, and measure what that costs.",
        epilog=EXAMPLES,
        formatter_class=formatter,
    )
    parts = parser.add_subparsers(title="parts", required=True, metavar="PART")
    parts.add_parser("simulate", help="simulated histories; --seeds N alone means this as well")
    parts.add_parser("storm", help="kills in virtual time, beside synchronous groups; storm --help")
    one = parts.add_parser("real", help="real processes that are killed, stopped and cut off")
    add = one.add_argument
    add("--minutes", type=float, default=1.0, help="of faults (default: 1)")
    add("--seed", type=int, default=1, help="of plan and problem (default: 1)")
    add("--shards", type=int, default=2, help="servers (default: 2)")
    add("--workers", type=int, default=3, help="workers (default: 3)")
    add("--mean-gap-s", type=float, default=1.5, help="mean time between faults (default: 1.5)")
    add("--snapshot-interval", type=float, default=2.0, help="of the servers (default: 2)")
    add("--pause-s", type=float, default=0.0, help="of workers between steps (default: 0)")
    add("--keep", type=Path, metavar="DIR", help="keep logs and states in this new folder")
    one.set_defaults(part_of_it=_real)
    two = parts.add_parser("figures", help="what needs real processes, beside what it should reach")
    two.add_argument("--part", nargs="+", choices=tuple(FIGURES), default=list(FIGURES))
    two.set_defaults(part_of_it=_figures)
    for part in (one, two):
        part.add_argument("--json", action="store_true", help="print JSON")
        part.add_argument("--save", action="store_true", help="write it to results/")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
