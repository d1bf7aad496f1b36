"""``dgs demo``: train a small network with a server and workers on this machine, and compare."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console

from dgs.cli.arguments import SubParsers, add_command, non_negative_int, positive_int
from dgs.cli.console import is_terminal, print_json, print_table, say
from dgs.config import Values
from dgs.demo.plan import CIFAR10, DIGITS, Plan, dense_method, sparse_method
from dgs.demo.progress import make_watcher
from dgs.demo.report import COLUMNS, footnotes, report, rows
from dgs.demo.run import run_demo
from dgs.errors import ConfigError

__all__ = ["add_parser", "make_plan", "run"]

EXAMPLE = """
dgs demo
dgs demo --density 0.001 --values int8 --json
dgs demo --data-dir cifar-10-batches-bin --epochs 20 --device cuda
"""

MOMENTUM = 0.3
"""Of DGS; the best of 0.3, 0.5 and 0.7 at this number of workers and steps."""


def add_parser(subparsers: SubParsers[argparse.ArgumentParser]) -> None:
    """Add the command to the program."""
    parser = add_command(
        subparsers,
        "demo",
        run,
        summary="train a small network here, dense and sparse, and compare",
        description=(
            "Start a server and workers on this machine and train a small network on real 8 x 8\n"
            "images (scikit-learn's digits), first with dense asynchronous SGD, then with DGS, on\n"
            "as many samples. With --data-dir: ResNet-18 on CIFAR-10. Ends with a table of\n"
            "accuracy, bytes per step and staleness. Progress goes to standard error."
        ),
        example=EXAMPLE,
    )
    _add_run_options(parser)
    _add_method_options(parser)


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers", type=positive_int, default=4, metavar="N", help="default: %(default)s"
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--steps",
        type=positive_int,
        metavar="N",
        help="steps of each worker (default: by --epochs)",
    )
    length.add_argument(
        "--epochs",
        type=_positive_number,
        metavar="E",
        help="passes over the training images, of all workers together "
        f"(default: {DIGITS.epochs:g}; CIFAR-10: {CIFAR10.epochs:g})",
    )
    parser.add_argument(
        "--seed", type=non_negative_int, default=0, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="cifar-10-batches-bin (CIFAR-10, binary version), or the folder that holds it",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: a GPU for CIFAR-10 if there is one (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")


def _add_method_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("settings of DGS")
    group.add_argument(
        "--density",
        type=float,
        default=0.01,
        metavar="F",
        help="fraction of each tensor sent per step, in (0, 1] (default: %(default)g)",
    )
    group.add_argument(
        "--download-density",
        type=float,
        metavar="F",
        help="the same for the server's answers (default: as --density)",
    )
    group.add_argument(
        "--momentum", type=float, default=MOMENTUM, metavar="M", help="default: %(default)g"
    )
    group.add_argument(
        "--values",
        choices=get_args(Values),
        default="float32",
        help="how values are coded, both ways (default: %(default)s)",
    )


def make_plan(args: argparse.Namespace) -> Plan:
    """Decide what is trained, and how.

    Raises:
        ConfigError: a setting is out of range, or there is no GPU where one is asked for.
    """
    task = DIGITS if args.data_dir is None else CIFAR10
    steps = args.steps
    if steps is None:
        steps = task.steps_for(args.epochs or task.epochs, args.workers)
    sparse = sparse_method(
        momentum=args.momentum,
        density=args.density,
        download_density=args.density if args.download_density is None else args.download_density,
        values=args.values,
    )
    return Plan(
        task=task,
        methods=(dense_method(), sparse),
        workers=args.workers,
        steps=steps,
        seed=args.seed,
        device=_device(args.device, small=args.data_dir is None),
        data_dir=args.data_dir,
    )


def _device(wanted: str, *, small: bool) -> str:
    """Choose a device; the small network is faster on a CPU."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no GPU here; use --device cpu")
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() and not small else "cpu"
    return wanted


def _positive_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def run(args: argparse.Namespace) -> int:
    """Carry out the command."""
    plan = make_plan(args)
    console = Console(stderr=True, force_terminal=is_terminal(sys.stderr))
    parameters, outcomes = run_demo(plan, make_watcher(console))
    if args.json:
        print_json(report(plan, parameters, outcomes))
        return 0
    print_table("the server's model after equal samples", COLUMNS, rows(outcomes))
    for line in footnotes(plan, parameters):
        say(line)
    return 0
