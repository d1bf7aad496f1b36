"""Simulate many histories in several processes, up to the first that breaks a promise."""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from unittest.mock import patch

import torch

import dgs.kernels
from experiments.faults.report import RESULTS, origin
from experiments.faults.simulation.mutants import MUTANTS
from experiments.faults.simulation.stage import Tally
from experiments.faults.simulation.world import World

__all__ = ["Failure", "Report", "add_arguments", "hunt", "main", "prepared", "run_command"]

RECORD = RESULTS / "simulation.json"
_CHUNK = 50
_LINES = 60
"""Events before the end that are shown of a history that fails."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A seed whose history broke a promise."""

    seed: int
    what: str
    where: str
    """The traceback."""


@dataclass(slots=True)
class Report:
    """What a row of seeds came to."""

    first: int
    seeds: int = 0
    seconds: float = 0.0
    tally: Tally = field(default_factory=Tally)
    failure: Failure | None = None


@contextmanager
def prepared(mutant: str = "") -> Iterator[None]:
    """Make this process fit for many small histories.

    Small models get the compiled kernels as well, which give the same bits in half the time. What
    `dgs` logs about faults is not shown: here they are the rule.

    Args:
        mutant: name of a mistake to make, of `MUTANTS`; none if empty.
    """
    logger = logging.getLogger("dgs")
    level = logger.level
    with ExitStack() as stack:
        stack.callback(logger.setLevel, level)
        logger.setLevel(logging.CRITICAL)
        stack.enter_context(patch.object(dgs.kernels, "COMPILED_FROM", 0))
        if mutant:
            stack.enter_context(MUTANTS[mutant]())
        yield


def hunt(first: int, seeds: int, mutant: str = "") -> Report:
    """Run the histories of consecutive seeds, up to the first that fails.

    Whatever is raised is a failure: what a server may refuse, the simulation handles.
    """
    report, began = Report(first), time.perf_counter()
    with prepared(mutant):
        for seed in range(first, first + seeds):
            report.seeds += 1
            world = World(seed)
            try:
                world.run()
            except Exception as error:
                what = f"{type(error).__name__}: {error}"
                report.failure = Failure(seed, what, traceback.format_exc())
                break
            report.tally.add(world.tally)
    report.seconds = time.perf_counter() - began
    return report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("--seeds", type=int, default=3000, help="histories to run")
    parser.add_argument("--from", type=int, default=0, dest="first", help="the first seed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--seconds", type=float, help="end after so long, whatever was run")
    parser.add_argument(
        "--mutant",
        choices=[*MUTANTS, "all"],
        metavar="NAME",
        help="make a mistake: " + ", ".join([*MUTANTS, "all"]),
    )
    parser.add_argument("--trace", action="store_true", help="show all events of the first seed")
    parser.add_argument("--out", type=Path, default=RECORD, help="record to write")


def run_command(arguments: Sequence[str]) -> int:
    """Run the command with a list of arguments; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.faults simulate",
        description="Simulate histories of servers and workers under faults, and check them.",
    )
    add_arguments(parser)
    return main(parser.parse_args(arguments))


def main(args: argparse.Namespace) -> int:
    """Run what was asked for; 0 if every history kept every promise, or every mutant was caught."""
    if args.trace:
        return _show(args.first, args.mutant or "")
    if args.mutant:
        return _catch(args)
    report = _run_all(args)
    _print_report(report)
    if report.failure is not None:
        return 1
    _write(args.out, "histories", _record(report))
    return 0


def _run_all(args: argparse.Namespace) -> Report:
    """Spread the seeds over processes."""
    total, began = Report(args.first), time.perf_counter()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, spawn, initializer=_settle_process) as pool:
        chunks = _chunks(args.first, args.seeds)
        running: set[Future[Report]] = set()
        while True:
            total.seconds = time.perf_counter() - began
            is_over = total.failure is not None or (args.seconds and total.seconds > args.seconds)
            while not is_over and len(running) < 2 * args.jobs:
                if (chunk := next(chunks, None)) is None:
                    break
                running.add(pool.submit(hunt, *chunk))
            if not running:
                break
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                _join(total, future.result())
            _print_progress(total, args.seeds)
    return total


def _settle_process() -> None:
    torch.set_num_threads(1)


def _chunks(first: int, seeds: int) -> Iterator[tuple[int, int]]:
    for start in count(first, _CHUNK):
        if start >= first + seeds:
            return
        yield start, min(_CHUNK, first + seeds - start)


def _join(total: Report, one: Report) -> None:
    total.seeds += one.seeds
    total.tally.add(one.tally)
    known = total.failure
    if one.failure is not None and (known is None or one.failure.seed < known.seed):
        total.failure = one.failure


def _print_progress(report: Report, seeds: int) -> None:
    if sys.stderr.isatty():
        rate = report.seeds / max(report.seconds, 1e-9)
        line = f"{report.seeds} of {seeds} histories, {rate:.0f}/s"
        print(f"\r{line:<60}", end="", file=sys.stderr, flush=True)


def _print_report(report: Report) -> None:
    tally = report.tally
    print(
        f"\n{report.seeds} histories in {report.seconds:.1f} s: {tally.events} events, "
        f"{tally.applied} updates applied, {tally.acknowledged} exchanges acknowledged,\n"
        f"{tally.kills} servers killed, {tally.power_losses} power losses, "
        f"{tally.recoveries} recoveries, {tally.snapshots} snapshots, "
        f"{tally.worker_crashes} workers lost, {tally.worker_resumes} resumed, "
        f"{tally.rejoins} joined anew"
    )
    if report.failure is None:
        print("every promise was kept")
        return
    seed = report.failure.seed
    print(f"\nseed {seed}: {report.failure.what}\n\n{report.failure.where}")
    print(f"again, with all events: python -m experiments.faults simulate --from {seed} --trace")


def _show(seed: int, mutant: str) -> int:
    """Run one history and print all that happens."""
    with prepared(mutant):
        world = World(seed)
        try:
            world.run()
        except Exception:
            print("\n".join(world.lines()))
            traceback.print_exc()
            return 1
    print("\n".join(world.lines()))
    print(f"\nseed {seed}: every promise was kept; digest of its events: {world.digest()}")
    return 0


def _catch(args: argparse.Namespace) -> int:
    """See how many seeds it takes to notice each mistake."""
    _settle_process()
    names = list(MUTANTS) if args.mutant == "all" else [args.mutant]
    caught: dict[str, dict[str, object]] = {}
    for name in names:
        report = hunt(args.first, args.seeds, name)
        if report.failure is None:
            print(f"{name:<24} NOT caught by {report.seeds} histories")
            continue
        caught[name] = {"histories": report.seeds, "as": report.failure.what}
        print(f"{name:<24} caught by history {report.seeds:>4}: {report.failure.what[:100]}")
    if len(caught) < len(names):
        return 1
    if args.mutant == "all":
        _write(args.out, "mutants", {"first_seed": args.first, "caught": caught})
    return 0


def _record(report: Report) -> dict[str, object]:
    return {
        "first_seed": report.first,
        "seeds": report.seeds,
        "violations": 0,
        "seconds": round(report.seconds, 1),
        **asdict(report.tally),
    }


def _write(path: Path, name: str, content: dict[str, object]) -> None:
    """Put a record beside those that are in a file already."""
    known = json.loads(path.read_text()) if path.exists() else {}
    known[name] = origin() | content
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known, indent=2) + "\n")
    print(f"recorded in {path}")
