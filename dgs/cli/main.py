"""The program ``dgs``: its commands, its errors, its exit codes."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from dgs.errors import DgsError

__all__ = ["main", "make_parser"]

DONE, FAILED, WRONG_USE, INTERRUPTED, READER_GONE = 0, 1, 2, 130, 141

EXAMPLE = """
example:
  dgs launch --workers 4 train.py
  dgs demo

exit codes:
  0 done, 1 failed, 2 wrong use, 130 ended by Ctrl-C, 141 the reader of the output has gone;
  'dgs launch' passes on that of the worker that failed
"""


def make_parser() -> argparse.ArgumentParser:
    """Return the program's parser, with all commands."""
    # not before there is somebody to take Ctrl-C: they import torch, which takes seconds
    from dgs.cli import certs, demo, launch, pull, server, snapshot, status

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
    for command in (server, launch, pull, status, snapshot, certs, demo):
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        argv: the arguments, without the program's name; those of the process if None.

    Returns:
        The exit code: 0 done, 1 failed, 2 wrong use, 130 interrupted, 141 if whoever read the
        output has gone (what a shell reports of a program that SIGPIPE ended); `dgs launch` passes
        on that of the worker that failed.

    Raises:
        SystemExit: the arguments are wrong (code 2), or ask for help (code 0).
    """
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.stderr.write("dgs: interrupted\n")
        return INTERRUPTED
    except BrokenPipeError:
        # nothing more can be said, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE


def _run(argv: Sequence[str] | None) -> int:
    with _ended_at_once_by_ctrl_c():
        from dgs.transport.options import QUIET_GRPC

        os.environ.setdefault(*QUIET_GRPC)  # read when grpc is imported; children inherit it
        parser = make_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        # argparse would show the usage of the whole program for a wrong option of one command
        getattr(args, "parser", parser).error(f"unrecognized arguments: {' '.join(unknown)}")
    if not hasattr(args, "run"):
        parser.print_help(sys.stderr)
        return WRONG_USE
    logging.basicConfig(format="dgs: %(levelname)s: %(message)s", level=logging.WARNING)
    try:
        return int(args.run(args))
    except BrokenPipeError:
        raise
    except (DgsError, OSError) as failure:
        if args.debug:
            raise
        from dgs.cli.console import error

        error(str(failure))
        return FAILED


@contextmanager
def _ended_at_once_by_ctrl_c() -> Iterator[None]:
    """End the process at Ctrl-C while modules are imported; some swallow `KeyboardInterrupt`."""

    def end(number: int, frame: FrameType | None) -> None:
        os.write(2, b"dgs: interrupted\n")
        os._exit(INTERRUPTED)

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # ignored, or somebody else's
        return
    try:
        before = signal.signal(signal.SIGINT, end)
    except ValueError:  # not the main thread, which alone gets signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("dgs")
    except PackageNotFoundError:
        return "(not installed)"
