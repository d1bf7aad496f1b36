"""The program ``dgs``: its commands, its errors, its exit codes."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from dgs.cli import demo, launch, pull, server, status
from dgs.cli.console import error, note
from dgs.errors import DgsError

__all__ = ["main", "make_parser"]

DONE, FAILED, WRONG_USE, INTERRUPTED = 0, 1, 2, 130

EXAMPLE = """
example:
  dgs launch --workers 4 train.py
  dgs demo
"""


def make_parser() -> argparse.ArgumentParser:
    """Return the program's parser, with all commands."""
    parser = argparse.ArgumentParser(
        prog="dgs",
        description="Train one model with many workers over slow links, through parameter servers.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dgs {_version()}")
    parser.add_argument("--debug", action="store_true", help="show where an error was raised")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in (server, launch, pull, status, demo):
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        argv: the arguments, without the program's name; those of the process if None.

    Returns:
        The exit code: 0 done, 1 failed, 2 wrong use, 130 interrupted; `dgs launch` passes on that
        of the worker that failed.

    Raises:
        SystemExit: the arguments are wrong (code 2), or ask for help (code 0).
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    if not hasattr(args, "run"):
        parser.print_help(sys.stderr)
        return WRONG_USE
    logging.basicConfig(format="dgs: %(levelname)s: %(message)s", level=logging.WARNING)
    try:
        code = int(args.run(args))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        note("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # whoever read the output has gone; nothing more can be said, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (DgsError, OSError) as failure:
        if args.debug:
            raise
        error(str(failure))
        return FAILED


def _version() -> str:
    try:
        return version("dgs")
    except PackageNotFoundError:
        return "(not installed)"
