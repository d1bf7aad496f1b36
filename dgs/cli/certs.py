"""``dgs certs`` and ``dgs token``: what a first set-up with TLS needs."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from dgs.authority import Authority, Issued
from dgs.cli.arguments import SubParsers, add_command
from dgs.cli.console import note, say
from dgs.errors import ConfigError
from dgs.transport.tokens import make_token, token_line

__all__ = ["add_parser", "run_certs", "run_token"]

CERTS_EXAMPLE = """
dgs certs --out certs --server ps.example.org,10.0.0.1 --workers berlin,tokyo
dgs certs --out certs --workers paris
dgs certs --out certs --server ps.example.org,10.0.0.1 --overwrite
"""

TOKEN_EXAMPLE = """
dgs token --name 'berlin-*' --role exchange --out berlin.token >> tokens
dgs token --name dashboard --role read --out dashboard.token >> tokens
"""

MOST_DAYS = 3650.0


def add_parser(subparsers: SubParsers[argparse.ArgumentParser]) -> None:
    """Add both commands to the program."""
    parser = add_command(
        subparsers,
        "certs",
        run_certs,
        summary="make certificates for servers and workers",
        description=(
            "Make a CA, a certificate for the servers and one per worker, and print the commands\n"
            "that use them. Where the folder has a CA already, it signs the new ones. Keep ca.key\n"
            "to yourself: whoever has it can make certificates; servers and workers do not need it."
        ),
        example=CERTS_EXAMPLE,
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the files"
    )
    parser.add_argument(
        "--server",
        type=_names,
        default=[],
        metavar="HOST[,HOST...]",
        help="names and addresses that workers reach the servers under",
    )
    parser.add_argument(
        "--workers",
        type=_names,
        default=[],
        metavar="NAME[,NAME...]",
        help="names of workers; 'berlin-*' may act as all whose names begin so",
    )
    parser.add_argument(
        "--days",
        type=_days,
        default=365.0,
        metavar="N",
        help="until the certificates end; the CA's own after ten years (default: %(default)g)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace certificates that are there, not the CA"
    )
    _add_token_parser(subparsers)


def _add_token_parser(subparsers: SubParsers[argparse.ArgumentParser]) -> None:
    parser = add_command(
        subparsers,
        "token",
        run_token,
        summary="make a token for a worker, or for reading",
        description=(
            "Make a token. The client's file gets the token itself (mode 0600); what is printed\n"
            "is the line for the server's --token-file, from which the token cannot be found.\n"
            "Take the line away to withdraw it: the server reads its file again when it changes."
        ),
        example=TOKEN_EXAMPLE,
    )
    parser.add_argument(
        "--name",
        required=True,
        help="name of the worker; 'berlin-*' for all that begin so; for reading, any label",
    )
    parser.add_argument(
        "--role",
        choices=("exchange", "read"),
        default="exchange",
        help="read: status and pull only (default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the client's token file"
    )


def run_certs(args: argparse.Namespace) -> int:
    """Carry out ``dgs certs``."""
    if not args.server and not args.workers:
        args.parser.error("give --server, --workers or both")
    authority = Authority(args.out, overwrite=args.overwrite)
    if authority.is_new:
        note(f"made a new CA in {args.out}; keep {args.out / 'ca.key'} to yourself")
    ca = shlex.quote(str(authority.path))
    if args.server:
        issued = authority.issue_server(args.server, args.days)
        _tell_server(issued, ca)
    for worker in args.workers:
        issued = authority.issue_worker(worker, args.days)
        _tell_worker(issued, worker, args.server)
    return 0


def _tell_server(issued: Issued, ca: str) -> None:
    shown = f"--tls-cert {_quoted(issued.certificate)} --tls-key {_quoted(issued.key)}"
    say(f"# server, until {issued.ends:%Y-%m-%d}:")
    say(f"dgs server --listen 0.0.0.0:7070 --state-dir state/ {shown} --tls-ca {ca}")


def _tell_worker(issued: Issued, worker: str, hosts: Sequence[str]) -> None:
    host = hosts[0] if hosts else "HOST"
    address = f"[{host}]:7070" if ":" in host else f"{host}:7070"
    name = worker.replace("*", "1") if worker.endswith("*") else worker
    settings = {
        "DGS_SERVER": address,
        "DGS_WORKER": name,
        "DGS_TLS_CA": str(issued.certificate.with_name("ca.pem")),
        "DGS_TLS_CERT": str(issued.certificate),
        "DGS_TLS_KEY": str(issued.key),
    }
    say(f"# worker {worker}, until {issued.ends:%Y-%m-%d}; it needs ca.pem and these two files:")
    say(" ".join(f"{k}={shlex.quote(v)}" for k, v in settings.items()) + " python train.py")


def run_token(args: argparse.Namespace) -> int:
    """Carry out ``dgs token``."""
    token = make_token()
    line = token_line(args.name, args.role, token)
    try:
        descriptor = os.open(args.out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise ConfigError(f"{args.out} is there already: name another file") from error
    with os.fdopen(descriptor, "w") as file:
        file.write(token + "\n")
    note(f"{args.out} is for the client (DGS_TOKEN_FILE); the line for the server's --token-file:")
    say(line)
    return 0


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of names with commas between")
    return names


def _days(text: str) -> float:
    try:
        days = float(text)
    except ValueError:
        days = 0.0
    if not 0.0 < days <= MOST_DAYS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of days, at most {MOST_DAYS:g}")
    return days
