"""What the commands' arguments have in common."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping

from dgs.security import ClientSecurity

__all__ = [
    "Run",
    "SubParsers",
    "add_command",
    "add_file_options",
    "add_security_options",
    "add_server_option",
    "add_timeout_option",
    "client_security",
    "non_negative_int",
    "non_negative_seconds",
    "positive_int",
    "positive_seconds",
]

Run = Callable[[argparse.Namespace], int]
"""Carries out a command; returns the process's exit code."""

SubParsers = argparse._SubParsersAction  # argparse has no public name for it


def add_command(
    subparsers: SubParsers[argparse.ArgumentParser],
    name: str,
    run: Run,
    *,
    summary: str,
    description: str,
    example: str,
) -> argparse.ArgumentParser:
    """Add a command whose help ends with an example.

    Args:
        subparsers: the commands of the program.
        name: what the user types.
        run: carries the command out.
        summary: one line, for the list of commands.
        description: what the command does, in a few lines.
        example: command lines that work as they stand.

    Returns:
        The command's parser, to add arguments to.
    """
    parser = subparsers.add_parser(
        name,
        help=summary,
        description=description,
        epilog="example:\n" + "\n".join(f"  {line}" for line in example.strip().splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--debug",
        action="store_true",
        default=argparse.SUPPRESS,
        help="show where an error was raised",
    )
    parser.set_defaults(run=run, parser=parser)
    return parser


def add_server_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--server``, which ``DGS_SERVER`` stands in for."""
    known = os.environ.get("DGS_SERVER") or None
    parser.add_argument(
        "--server",
        metavar="ADDR[,ADDR...]",
        default=known,
        required=known is None,
        help="address of the server, or of all shards in their order (default: $DGS_SERVER)",
    )


def add_security_options(parser: argparse.ArgumentParser) -> None:
    """Add what a client shows of itself."""
    add_file_options(
        parser.add_argument_group("security"),
        {
            "--tls-ca": "CA certificate of the servers; encrypts",
            "--tls-cert": "certificate to show to them",
            "--tls-key": "its private key",
            "--token-file": "file with the token to send",
        },
    )


def add_file_options(group: argparse._ArgumentGroup, helps: Mapping[str, str]) -> None:
    """Add options that name files, each of which an environment variable stands in for.

    Args:
        group: to add them to.
        helps: help texts, by option.
    """
    for option, text in helps.items():
        variable = "DGS_" + option[2:].replace("-", "_").upper()
        group.add_argument(
            option,
            metavar="FILE",
            default=os.environ.get(variable, ""),
            help=f"{text} (default: ${variable})",
        )


def client_security(args: argparse.Namespace) -> ClientSecurity:
    """Return what the options of `add_security_options` say.

    Raises:
        ConfigError: they contradict each other.
    """
    return ClientSecurity(
        tls_ca=args.tls_ca,
        tls_cert=args.tls_cert,
        tls_key=args.tls_key,
        token_file=args.token_file,
    )


def add_timeout_option(parser: argparse.ArgumentParser, default_s: float) -> None:
    """Add ``--timeout-s``."""
    parser.add_argument(
        "--timeout-s",
        type=positive_seconds,
        default=default_s,
        metavar="S",
        help="seconds to keep trying to reach each server (default: %(default)g)",
    )


def positive_int(text: str) -> int:
    """Read a whole number of at least 1.

    Example:
        >>> positive_int("4")
        4
    """
    return _whole(text, 1)


def non_negative_int(text: str) -> int:
    """Read a whole number of at least 0."""
    return _whole(text, 0)


def positive_seconds(text: str) -> float:
    """Read a positive number of seconds.

    Example:
        >>> positive_seconds("0.5")
        0.5
    """
    value = non_negative_seconds(text)
    if value == 0.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value


def non_negative_seconds(text: str) -> float:
    """Read a number of seconds, 0 included."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value


def _whole(text: str, least: int) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return int(text)
