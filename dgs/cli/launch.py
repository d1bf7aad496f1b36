"""``dgs launch``: run a script as several workers, with their servers."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from dgs.cli.arguments import SubParsers, add_command, non_negative_int, positive_int
from dgs.cli.console import is_terminal, labelled, note, say
from dgs.cli.course import Course, Revive
from dgs.cli.model_file import check_writable, read_model
from dgs.cli.revival import SERVER_RESTARTS, Revival, choose_folders
from dgs.cli.saving import (
    nobody_joined,
    not_saved,
    save_final,
    save_reached,
    words_for_start,
)
from dgs.errors import ConfigError, ServerUnavailableError
from dgs.processes import Command, LocalServer, OnLine, ProcessGroup, start_all
from dgs.security import WITHIN_THE_MACHINE, ClientSecurity
from dgs.transport.address import check_resolvable, split_address
from dgs.transport.connect import split_addresses

__all__ = ["add_parser", "run", "worker_commands"]

THREADS = "OMP_NUM_THREADS"
"""Shared among the workers unless the user has set it: by default each would take all cores."""

EXAMPLE = """
dgs launch --workers 4 train.py --epochs 3
dgs launch --workers 4 --servers 2 --save model.safetensors train.py
dgs launch --workers 4 --state-dir state/ train.py
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
            "signal n). Ctrl-C is passed on to the workers; a second one kills them. When the\n"
            "reader of the output goes away (dgs launch ... | head), the run ends with code 141.\n"
            "\n"
            "With --state-dir, nothing that a server has acknowledged is lost: one that dies is\n"
            "started again, and the workers go on. Launch again with the same folder to go on\n"
            "with a run that has ended, whatever ended it."
        ),
        example=EXAMPLE,
    )
    parser.usage = "dgs launch [options] --workers N (SCRIPT | -m MODULE) [ARGUMENT ...]"
    parser.add_argument(
        "--workers", type=positive_int, required=True, metavar="N", help="number of workers"
    )
    _add_server_options(parser)
    parser.add_argument(
        "--save",
        type=Path,
        metavar="FILE",
        help="write the servers' model to this safetensors file when the workers have ended; if "
        "the run fails or is interrupted, what it has reached",
    )
    parser.add_argument(
        "--max-restarts",
        type=non_negative_int,
        default=0,
        metavar="R",
        help="how often each worker that fails is started again, with the same arguments; it joins "
        "under its old name and goes on from the servers' model. With 2, the third failure of one "
        "worker ends the run (default: 0, the first one does)",
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


def _add_server_options(parser: argparse.ArgumentParser) -> None:
    servers = parser.add_mutually_exclusive_group()
    servers.add_argument(
        "--servers",
        type=positive_int,
        metavar="S",
        help="number of servers to start, each with a part of the model (default: 1)",
    )
    servers.add_argument(
        "--server",
        metavar="ADDR[,ADDR...]",
        help="servers that run already, in their order; certificates and tokens as DGS_TLS_CA, "
        "DGS_TLS_CERT, DGS_TLS_KEY and DGS_TOKEN_FILE say",
    )
    parser.add_argument(
        "--init",
        type=Path,
        metavar="FILE",
        help="safetensors file with the model to start from (default: the first worker's)",
    )
    parser.add_argument(
        "--state-dir",
        type=Path,
        metavar="DIR",
        help="keep the servers' states in DIR/shard-0, DIR/shard-1, ...; what they hold goes "
        "before --init",
    )
    parser.add_argument(
        "--max-server-restarts",
        type=non_negative_int,
        metavar="R",
        help="with --state-dir: how often in a row a server that dies is started again (default: "
        f"{SERVER_RESTARTS}); a minute of service begins a new row",
    )


def run(args: argparse.Namespace) -> int:
    """Carry out the command."""
    program = _program(args)
    _check(args)
    given = _given_servers(args.server) if args.server else []
    with ProcessGroup(_printer(prefix=not args.no_prefix)) as group:
        servers = [] if given else _started(group, args)
        addresses = given or [server.address for server in servers]
        more = {} if given else WITHIN_THE_MACHINE
        workers = worker_commands(program, addresses, args.workers, os.environ, more)
        plural = "s" if args.workers > 1 else ""
        note(f"{args.workers} worker{plural}, server {','.join(addresses)}")
        if threads := workers[0].env.get(THREADS):
            note(f"{THREADS}={threads} for each worker; set it to choose otherwise")
        revive = _reviver(servers, args) if args.state_dir is not None else None
        code = _train(Course(group, workers, args.max_restarts, revive), addresses, args)
        if code == 0 and not given and nobody_joined(addresses[0]):
            note(
                "no worker has joined the server, so nothing was trained together: does the script "
                "make a dgs.DistributedOptimizer? (without server=..., it reads DGS_SERVER)"
            )
        if code == 0 and args.save is not None:
            save_final(addresses, args.save, _security(args))
    return code


def _security(args: argparse.Namespace) -> ClientSecurity | None:
    """Return how to reach the servers: those of the user's as the environment says."""
    return None if args.server else ClientSecurity()


def _check(args: argparse.Namespace) -> None:
    """Refuse, before anything is started, what cannot work."""
    if args.save is not None:
        check_writable(args.save)
    if args.server and args.init is not None:
        args.parser.error("--init is for servers that launch starts; give it to 'dgs server'")
    if args.server and args.state_dir is not None:
        args.parser.error("--state-dir is for servers that launch starts; give it to 'dgs server'")
    if args.max_server_restarts is not None and args.state_dir is None:
        args.parser.error("--max-server-restarts needs --state-dir, to start servers again from")
    if args.init is not None:
        read_model(args.init)  # a wrong file is told of here, rather than by each server


def _started(group: ProcessGroup, args: argparse.Namespace) -> list[LocalServer]:
    """Start the servers, and say what they go on from."""
    given = ["--init", str(args.init)] if args.init is not None else []
    if args.state_dir is None:
        servers = [LocalServer(group, i, given) for i in range(args.servers or 1)]
        start_all(servers)
        return servers
    folders, is_new = choose_folders(args.state_dir, args.servers)
    servers = [
        LocalServer(group, i, [*given, "--state-dir", str(folder)])
        for i, folder in enumerate(folders)
    ]
    start_all(servers)
    if not is_new:
        note(f"going on {words_for_start([s.address for s in servers])} in {args.state_dir}")
        if args.init is not None:
            note(f"{args.init} is not used: the model in {args.state_dir} goes before it")
    return servers


def _reviver(servers: Sequence[LocalServer], args: argparse.Namespace) -> Revive:
    most = args.max_server_restarts
    return Revival(servers, SERVER_RESTARTS if most is None else most).revive


def _given_servers(text: str) -> list[str]:
    """Split the user's list of servers, and look their names up before anything is started."""
    addresses = split_addresses(text)
    for address in addresses:
        split_address(address)
    for address in addresses:
        check_resolvable(address)
    return addresses


def _train(course: Course, addresses: Sequence[str], args: argparse.Namespace) -> int:
    """Follow the workers to the end; if it is not a good one, save what was reached."""
    save: Path | None = args.save
    try:
        code = course.follow()
    except ServerUnavailableError:
        if args.state_dir is not None:
            note(
                f"what the servers have acknowledged is in {args.state_dir}: launch again to go "
                f"on, or save it with 'dgs snapshot export --state-dir {args.state_dir} --out FILE'"
            )
        elif save is not None:
            not_saved(save, "the model was in the server that has ended")
        raise
    except BrokenPipeError:  # nobody reads the output any more
        if save is not None:
            save_reached(addresses, save, _security(args))
        raise
    if code != 0 and save is not None:
        if course.hurried:
            not_saved(save, "interrupted twice")
        else:
            save_reached(addresses, save, _security(args))
    return code


def worker_commands(
    program: Sequence[str],
    addresses: Sequence[str],
    count: int,
    environ: Mapping[str, str],
    more: Mapping[str, str] = MappingProxyType({}),
) -> list[Command]:
    """Return what to run for each worker.

    Args:
        program: program and arguments, the same for all.
        addresses: of the servers, in their order.
        count: number of workers.
        environ: the environment that the workers inherit.
        more: what they get besides.
    """
    common = {
        **more,
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
