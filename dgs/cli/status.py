"""``dgs status``: what the servers and their workers do."""

from __future__ import annotations

import argparse
import itertools
import threading
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live

from dgs.cli.arguments import (
    SubParsers,
    add_command,
    add_server_option,
    add_timeout_option,
    positive_seconds,
)
from dgs.cli.console import (
    is_terminal,
    print_json,
    print_table,
    say,
    table,
    words_for_bytes,
    words_for_seconds,
)
from dgs.client import server_status
from dgs.config import RetryConfig
from dgs.transport.base import Transport
from dgs.transport.connect import connect, split_addresses

__all__ = ["add_parser", "describe", "run"]

EXAMPLE = """
dgs status --server 127.0.0.1:7070
dgs status --server host-a:7070,host-b:7070 --watch 5
dgs status --server 127.0.0.1:7070 --json
"""

SERVERS_TITLE = "servers (p50, p99: staleness)"
SHARD_COLUMNS = ("server", "shard", "range", "version", "refused", "up", "down", "p50", "p99")
WORKERS_TITLE = "workers"
WORKER_COLUMNS = ("worker", "joined", "exchanges", "up", "down", "p50", "p99")

LONGEST_AGE_S = 10 * 365 * 86400
"""Incarnations are clock readings; one that would be older than this is none."""

Described = dict[str, Any]
TableParts = tuple[str, Sequence[str], list[list[str]]]


def add_parser(subparsers: SubParsers[argparse.ArgumentParser]) -> None:
    """Add the command to the program."""
    parser = add_command(
        subparsers,
        "status",
        run,
        summary="show servers and workers",
        description=(
            "Show each server's shard, version and traffic, and each worker's exchanges and\n"
            "staleness (updates of others applied between two of its own)."
        ),
        example=EXAMPLE,
    )
    add_server_option(parser)
    add_timeout_option(parser, 5.0)
    parser.add_argument("--json", action="store_true", help="print JSON, one line per look")
    parser.add_argument(
        "--watch",
        nargs="?",
        type=positive_seconds,
        const=2.0,
        metavar="SECONDS",
        help="look again every so many seconds (default: 2), until Ctrl-C",
    )


def run(args: argparse.Namespace) -> int:
    """Carry out the command."""
    transports = connect(split_addresses(args.server), RetryConfig())
    try:
        if args.watch is None:
            _show(describe(transports, timeout_s=args.timeout_s), as_json=args.json)
        else:
            _watch(transports, args)
    finally:
        for transport in transports:
            transport.close()
    return 0


def describe(transports: Sequence[Transport], *, timeout_s: float) -> Described:
    """Ask all servers for their status.

    Args:
        transports: one per server.
        timeout_s: seconds to keep trying, for each.

    Returns:
        ``{"servers": [...]}``, each with its ``workers``; all values are JSON's.

    Raises:
        ServerUnavailableError: a server was not reached; names it and the time spent.
    """
    return {"servers": [_describe_one(t, timeout_s) for t in transports]}


def _describe_one(transport: Transport, timeout_s: float) -> Described:
    s = server_status(transport, timeout_s=timeout_s)
    return {
        "address": transport.address,
        "run": s.run,
        "ready": s.ready,
        "version": s.version,
        "shard": s.shard,
        "num_shards": s.num_shards,
        "range": [s.range_start, s.range_stop],
        "tensors": len(s.tensors),
        "refused": s.refused,
        "initialiser": s.initialiser,
        "staleness_p50": s.staleness_p50,
        "staleness_p99": s.staleness_p99,
        "bytes_up": s.bytes_up,
        "bytes_down": s.bytes_down,
        "workers": [
            {
                "worker": w.worker,
                "member": w.member,
                "incarnation": w.incarnation,
                "exchanges": w.exchanges,
                "staleness_p50": w.staleness_p50,
                "staleness_p99": w.staleness_p99,
                "bytes_up": w.bytes_up,
                "bytes_down": w.bytes_down,
            }
            for w in s.workers
        ],
    }


def _show(status: Described, *, as_json: bool) -> None:
    if as_json:
        print_json(status)
        return
    for number, (title, columns, rows) in enumerate(_tables(status)):
        if number:
            say("")
        print_table(title, columns, rows)


def _watch(transports: Sequence[Transport], args: argparse.Namespace) -> None:
    pause = threading.Event()  # never set: a wait that Ctrl-C ends
    if args.json or not is_terminal():
        for look in itertools.count():
            if look and not args.json:
                say("")
            _show(describe(transports, timeout_s=args.timeout_s), as_json=args.json)
            pause.wait(args.watch)
    console = Console(markup=False, highlight=False)
    with Live(console=console, auto_refresh=False) as live:
        while True:
            status = describe(transports, timeout_s=args.timeout_s)
            live.update(Group(*(table(*parts) for parts in _tables(status))), refresh=True)
            pause.wait(args.watch)


def _tables(status: Described) -> list[TableParts]:
    servers = status["servers"]
    return [
        (SERVERS_TITLE, SHARD_COLUMNS, [_shard_row(s) for s in servers]),
        (WORKERS_TITLE, WORKER_COLUMNS, _worker_rows(servers)),
    ]


def _shard_row(server: Described) -> list[str]:
    start, stop = server["range"]
    ready = server["ready"]
    return [
        server["address"],
        f"{server['shard']}/{server['num_shards']}" if ready else "-",
        f"{start:,}-{stop:,}" if ready else "-",
        str(server["version"]) if ready else "no model yet",
        str(server["refused"]),
        words_for_bytes(server["bytes_up"]),
        words_for_bytes(server["bytes_down"]),
        f"{server['staleness_p50']:g}",
        f"{server['staleness_p99']:g}",
    ]


def _worker_rows(servers: Sequence[Described]) -> list[list[str]]:
    """Make one row per worker: bytes of all shards together, the worst shard's staleness."""
    sessions: dict[tuple[str, int], list[Described]] = {}
    for server in servers:
        for w in server["workers"]:
            sessions.setdefault((w["worker"], w["member"]), []).append(w)
    several = {worker for worker, member in sessions if member > 0}
    return [
        [
            f"{worker}/{member}" if worker in several else worker,
            _age(parts[0]["incarnation"]),
            str(max(w["exchanges"] for w in parts)),
            words_for_bytes(sum(w["bytes_up"] for w in parts)),
            words_for_bytes(sum(w["bytes_down"] for w in parts)),
            f"{max(w['staleness_p50'] for w in parts):g}",
            f"{max(w['staleness_p99'] for w in parts):g}",
        ]
        for (worker, member), parts in sorted(sessions.items())
    ]


def _age(incarnation: int) -> str:
    age_s = time.time() - incarnation / 1e9
    return f"{words_for_seconds(age_s)} ago" if age_s < LONGEST_AGE_S else "-"
