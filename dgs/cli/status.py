"""``dgs status``: what the servers and their workers do."""

from __future__ import annotations

import argparse
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import datetime
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from dgs.cli.arguments import (
    SubParsers,
    add_command,
    add_security_options,
    add_server_option,
    add_timeout_option,
    client_security,
    positive_seconds,
)
from dgs.cli.console import (
    is_terminal,
    print_json,
    print_table,
    say,
    table,
)
from dgs.cli.status_tables import Described, away, heading, tables, troubles
from dgs.client import server_status
from dgs.config import RetryConfig
from dgs.errors import ServerUnavailableError
from dgs.security import ClientSecurity
from dgs.transport.base import Transport
from dgs.transport.connect import connect, split_addresses
from dgs.transport.grpc_client import GrpcTransport

__all__ = ["add_parser", "describe", "describe_reply", "run"]

EXAMPLE = """
dgs status --server 127.0.0.1:7070
dgs status --server host-a:7070,host-b:7070 --watch 5
dgs status --server 127.0.0.1:7070 --json
"""


def add_parser(subparsers: SubParsers[argparse.ArgumentParser]) -> None:
    """Add the command to the program."""
    parser = add_command(
        subparsers,
        "status",
        run,
        summary="show servers and workers",
        description=(
            "Show each server's shard, version and traffic, and each worker's exchanges and\n"
            "staleness (updates of others applied between two of its own). A worker whose\n"
            "'behind' grows does not exchange: it is stuck, slow, or gone."
        ),
        example=EXAMPLE,
    )
    add_server_option(parser)
    add_security_options(parser)
    add_timeout_option(parser, 5.0)
    parser.add_argument("--json", action="store_true", help="print JSON, one line per look")
    parser.add_argument(
        "--watch",
        nargs="?",
        type=positive_seconds,
        const=2.0,
        metavar="SECONDS",
        help="look again every so many seconds (default: 2), also while a server is away, until "
        "Ctrl-C (exit code 130)",
    )


def run(args: argparse.Namespace) -> int:
    """Carry out the command."""
    addresses = split_addresses(args.server)
    security = client_security(args)
    transports = connect(addresses, RetryConfig(), security=security)
    try:
        first = describe(transports, timeout_s=args.timeout_s)
    finally:
        for transport in transports:
            transport.close()
    if args.watch is None:
        _show(first, as_json=args.json)
    else:
        _watch(first, addresses, security, args)
    return 0


def describe(transports: Sequence[Transport], *, timeout_s: float) -> Described:
    """Ask all servers for their status.

    Args:
        transports: one per server.
        timeout_s: seconds to keep trying, for each.

    Returns:
        ``{"time": ..., "servers": [...]}``, each with its ``workers``; all values are JSON's.

    Raises:
        ServerUnavailableError: a server was not reached; names it and the time spent.
    """
    return _now([_describe_one(t, timeout_s) for t in transports])


def _describe_reachable(transports: Sequence[Transport], timeout_s: float) -> Described:
    """Describe as `describe` does, and a server that does not answer by its ``error``."""
    servers: list[Described] = []
    for transport in transports:
        try:
            servers.append(_describe_one(transport, timeout_s))
        except ServerUnavailableError as error:
            why = str(error).removeprefix(f"{transport.address}: ")
            servers.append({"address": transport.address, "error": why, "workers": []})
    return _now(servers)


def _now(servers: list[Described]) -> Described:
    return {"time": datetime.now().astimezone().isoformat(timespec="seconds"), "servers": servers}


def _describe_one(transport: Transport, timeout_s: float) -> Described:
    return describe_reply(transport.address, server_status(transport, timeout_s=timeout_s))


def describe_reply(address: str, s: Any) -> Described:
    """Write the `StatusReply` of one server as JSON's values; what it did not tell is None."""
    return {
        "address": address,
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
        "evicted": s.evicted,
        "limits": _fields(s.limits) if s.HasField("limits") else None,
        "storage": _fields(s.storage) if s.HasField("storage") else None,
        "security": _fields(s.security) if s.HasField("security") else None,
        "workers": [
            {
                "worker": w.worker,
                "member": w.member,
                "incarnation": w.incarnation,
                "exchanges": w.exchanges,
                "behind": w.behind,
                "staleness_p50": w.staleness_p50,
                "staleness_p99": w.staleness_p99,
                "bytes_up": w.bytes_up,
                "bytes_down": w.bytes_down,
            }
            for w in s.workers
        ],
    }


def _fields(message: Any) -> Described:
    return {f.name: getattr(message, f.name) for f in message.DESCRIPTOR.fields}


def _show(status: Described, *, as_json: bool) -> None:
    if as_json:
        print_json(status)
        return
    for number, (title, columns, rows) in enumerate(tables(status)):
        if number:
            say("")
        print_table(title, columns, rows)
    for line in troubles(status):
        say(f"\x1b[31m{line}\x1b[0m" if is_terminal() else line)


def _watch(
    first: Described,
    addresses: Sequence[str],
    security: ClientSecurity,
    args: argparse.Namespace,
) -> None:
    looks = _looks(first, addresses, security, args.watch, args.timeout_s)
    if args.json:
        for status in looks:
            print_json(status)
    elif is_terminal():
        console = Console(markup=False, highlight=False)
        with Live(console=console, auto_refresh=False) as live:
            for status in looks:
                parts = (table(*t) for t in tables(status))
                red = (Text(line, style="red") for line in troubles(status))
                live.update(Group(heading(status), *parts, *red, *away(status)), refresh=True)
    else:
        for status in looks:
            say(heading(status))
            _show(status, as_json=False)
            for line in away(status):
                say(line)
            say("")


def _looks(
    first: Described,
    addresses: Sequence[str],
    security: ClientSecurity,
    pause_s: float,
    timeout_s: float,
) -> Iterator[Described]:
    """Yield what is seen at each look, without end."""
    pause = threading.Event()  # never set: a wait that Ctrl-C ends
    with ExitStack() as stack:
        # one attempt each: the next look is the retry, and a server that is away is shown as such
        transports = [GrpcTransport(address, security=security) for address in addresses]
        for transport in transports:
            stack.callback(transport.close)
        yield first
        while True:
            pause.wait(pause_s)
            yield _describe_reachable(transports, timeout_s)
