"""``dgs launch``: run a script as several workers, with their servers."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from dgs.cli.arguments import SubParsers, add_command, non_negative_int, positive_int
from dgs.cli.console import is_terminal, labelled, note, say, words_for_bytes
from dgs.cli.model_file import check_writable, read_model
from dgs.cli.pull import pull_to_file
from dgs.errors import ConfigError, ServerUnavailableError
from dgs.processes import Command, OnLine, ProcessGroup, start_servers
from dgs.transport.address import split_address
from dgs.transport.connect import split_addresses

__all__ = ["add_parser", "exit_code", "run", "worker_commands"]

THREADS = "OMP_NUM_THREADS"
"""Shared among the workers unless the user has set it: by default each would take all cores."""

INTERRUPT_S = 15.0
"""Seconds that workers get to end after Ctrl-C was passed on to them."""

SAVE_S = 60.0
"""Seconds for each call that fetches the final model."""

EXAMPLE = """
dgs launch --workers 4 train.py --epochs 3
dgs launch --workers 4 --servers 2 --save model.safetensors train.py
dgs launch --workers 2 --server host-a:7070 -m project.train --epochs 3
"""


def add_parser(subparsers: SubParsers[argparse.ArgumentParser]) -> None:
    """Add the command to the program."""
    parser = add_command(
        subparsers,
        "launch",
        run,
        summary="run a script as several workers, with their servers",
        description=(
            "Run a Python script as N workers on this machine, and servers for them unless\n"
            "--server names some. Workers get DGS_SERVER, DGS_WORKER (worker-0, ...), DGS_RANK,\n"
            "DGS_NUM_WORKERS, and OMP_NUM_THREADS unless it is set. Everything ends when the\n"
            "workers have ended, or when one fails; its exit code is returned (128 + n after\n"
            "signal n). Ctrl-C is passed on to the workers; a second one kills them."
        ),
        example=EXAMPLE,
    )
    parser.usage = "dgs launch [options] --workers N (SCRIPT | -m MODULE) [ARGUMENT ...]"
    parser.add_argument(
        "--workers", type=positive_int, required=True, metavar="N", help="number of workers"
    )
    servers = parser.add_mutually_exclusive_group()
    servers.add_argument(
        "--servers",
        type=positive_int,
        metavar="S",
        help="number of servers to start, each with a part of the model (default: 1)",
    )
    servers.add_argument(
        "--server", metavar="ADDR[,ADDR...]", help="servers that run already, in their order"
    )
    parser.add_argument(
        "--init",
        type=Path,
        metavar="FILE",
        help="safetensors file with the model to start from (default: the first worker's)",
    )
    parser.add_argument(
        "--save",
        type=Path,
        metavar="FILE",
        help="write the model to this safetensors file when all workers have ended well",
    )
    parser.add_argument(
        "--max-restarts",
        type=non_negative_int,
        default=0,
        metavar="R",
        help="how often a worker that fails is started again (default: 0)",
    )
    parser.add_argument(
        "--no-prefix", action="store_true", help="do not put '[worker 2] ' before output"
    )
    parser.add_argument(
        "-m",
        dest="module",
        nargs=argparse.REMAINDER,
        metavar="MODULE ARGUMENT",
        help="run a module; what follows is its own",
    )
    parser.add_argument(
        "script",
        nargs=argparse.REMAINDER,
        metavar="SCRIPT ARGUMENT",
        help="script to run; what follows is its own",
    )


def run(args: argparse.Namespace) -> int:
    """Carry out the command."""
    program = _program(args)
    if args.save is not None:
        check_writable(args.save)
    if args.init is not None:
        if args.server:
            args.parser.error("--init is for servers that launch starts; give it to 'dgs server'")
        read_model(args.init)  # a wrong file is told of here, rather than by each server
    with ProcessGroup(_printer(prefix=not args.no_prefix)) as group:
        if args.server:
            addresses = split_addresses(args.server)
            for address in addresses:
                split_address(address)
        else:
            addresses = start_servers(group, args.servers or 1, init=args.init)
        workers = worker_commands(program, addresses, args.workers, os.environ)
        plural = "s" if args.workers > 1 else ""
        note(f"{args.workers} worker{plural}, server {','.join(addresses)}")
        if threads := workers[0].env.get(THREADS):
            note(f"{THREADS}={threads} for each worker; set it to choose otherwise")
        code = _Run(group, workers, args.max_restarts).follow()
        if code == 0 and args.save is not None:
            saved = pull_to_file(addresses, args.save, timeout_s=SAVE_S)
            note(f"wrote {args.save}: {words_for_bytes(saved['bytes'])}")
    return code


def worker_commands(
    program: Sequence[str], addresses: Sequence[str], count: int, environ: Mapping[str, str]
) -> list[Command]:
    """Return what to run for each worker.

    Args:
        program: program and arguments, the same for all.
        addresses: of the servers, in their order.
        count: number of workers.
        environ: the environment that the workers inherit.
    """
    common = {
        "DGS_SERVER": ",".join(addresses),
        "DGS_NUM_WORKERS": str(count),
        "PYTHONUNBUFFERED": "1",
    }
    if THREADS not in environ:
        common[THREADS] = str(max(1, _cores() // count))
    return [
        Command(f"worker {i}", program, {**common, "DGS_WORKER": f"worker-{i}", "DGS_RANK": str(i)})
        for i in range(count)
    ]


def exit_code(returncode: int) -> int:
    """Turn a child's return code into an exit code, as a shell does.

    Example:
        >>> exit_code(3), exit_code(-9)
        (3, 137)
    """
    return returncode if returncode >= 0 else 128 - returncode


def _program(args: argparse.Namespace) -> list[str]:
    if args.module is not None:
        if not args.module:
            args.parser.error("-m needs the name of a module")
        return [sys.executable, "-m", *args.module]
    given = args.script[1:] if args.script[:1] == ["--"] else args.script
    if not given:
        args.parser.error("name the script to run, or -m and a module")
    if given[0].startswith("-"):
        args.parser.error(f"unknown option {given[0]}")
    if not Path(given[0]).exists():
        raise ConfigError(f"there is no script {given[0]!r}")
    return [sys.executable, *given]


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _printer(*, prefix: bool) -> OnLine:
    colour = is_terminal()

    def show(label: str, text: str) -> None:
        say(labelled(label, text, colour=colour) if prefix else text)

    return show


class _Run:
    """The workers' course, from their start to the exit code."""

    def __init__(self, group: ProcessGroup, workers: Sequence[Command], max_restarts: int) -> None:
        self._group = group
        self._workers = {w.label: w for w in workers}
        self._max_restarts = max_restarts
        self._restarts = dict.fromkeys(self._workers, 0)
        self._unfinished = set(self._workers)
        self._signals: list[int] = []

    def follow(self) -> int:
        """Start the workers and return the exit code once the run is over."""
        with self._caught_signals():
            for worker in self._workers.values():
                self._group.start(worker)
            while not self._signals and self._unfinished:
                for label, returncode in self._group.wait_any(3600.0):
                    failure = self._take_end(label, returncode)
                    if failure is not None:
                        return failure
            return self._end_early() if self._signals else 0

    def _take_end(self, label: str, returncode: int) -> int | None:
        """Note a child's end; return the exit code if it ends the run."""
        if self._signals:
            return None
        how = _how(returncode)
        if label not in self._workers:
            raise ServerUnavailableError(
                f"{label} {how} while workers were training; the run cannot go on without its model"
            )
        if returncode == 0:
            self._unfinished.remove(label)
            return None
        if self._restarts[label] < self._max_restarts:
            self._restarts[label] += 1
            note(f"{label} {how}; restart {self._restarts[label]} of {self._max_restarts}")
            self._group.start(self._workers[label])
            return None
        note(f"{label} {how}; ending the run")
        self._group.stop(labels=self._unfinished)
        return exit_code(returncode)

    def _end_early(self) -> int:
        """End the workers as the signal asks; the servers end after them."""
        first = self._signals[0]
        if first == signal.SIGINT:
            note("interrupted: waiting for the workers to end; Ctrl-C again to kill them")
            self._group.interrupt(self._unfinished)
            until = time.monotonic() + INTERRUPT_S
            while self._unfinished and len(self._signals) < 2 and time.monotonic() < until:
                ended = self._group.wait_any(max(0.0, until - time.monotonic()))
                self._unfinished -= {label for label, _ in ended}
        self._group.stop(10.0 if len(self._signals) < 2 else 0.0, self._unfinished)
        return 128 + first

    @contextmanager
    def _caught_signals(self) -> Iterator[None]:
        def take(number: int, frame: FrameType | None) -> None:
            self._signals.append(number)
            self._group.wake()

        before = {n: signal.signal(n, take) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _how(returncode: int) -> str:
    """Describe an end in words."""
    if returncode >= 0:
        return f"ended with exit code {returncode}"
    try:
        return f"was ended by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"was ended by signal {-returncode}"
