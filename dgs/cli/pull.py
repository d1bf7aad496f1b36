"""``dgs pull``: write the servers' model to a file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dgs.cli.arguments import (
    SubParsers,
    add_command,
    add_security_options,
    add_server_option,
    add_timeout_option,
    client_security,
)
from dgs.cli.console import print_json, say, words_for_bytes
from dgs.cli.model_file import check_writable, write_model
from dgs.client import pull_model, server_status
from dgs.config import RetryConfig
from dgs.security import ClientSecurity
from dgs.transport.connect import connect, split_addresses

__all__ = ["add_parser", "pull_to_file", "run"]

EXAMPLE = """
dgs pull --server 127.0.0.1:7070 --out model.safetensors
dgs pull --server host-a:7070,host-b:7070 --out model.safetensors --json
"""


def add_parser(subparsers: SubParsers[argparse.ArgumentParser]) -> None:
    """Add the command to the program."""
    parser = add_command(
        subparsers,
        "pull",
        run,
        summary="write the servers' model to a safetensors file",
        description=(
            "Fetch the model from its servers, during training or after it, and write it to a\n"
            "safetensors file, whole or not at all; an existing file is replaced. The file loads\n"
            "into the plain model: load_state_dict(safetensors.torch.load_file(FILE))."
        ),
        example=EXAMPLE,
    )
    add_server_option(parser)
    add_security_options(parser)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="safetensors file to write"
    )
    add_timeout_option(parser, 30.0)
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")


def run(args: argparse.Namespace) -> int:
    """Carry out the command."""
    security = client_security(args)
    addresses = split_addresses(args.server)
    written = pull_to_file(addresses, args.out, timeout_s=args.timeout_s, security=security)
    if args.json:
        print_json(written)
    else:
        say(
            f"wrote {written['out']}: {written['tensors']} tensors, {written['parameters']:,} "
            f"values, {words_for_bytes(written['bytes'])}, version {written['version']}"
        )
    return 0


def pull_to_file(
    addresses: Sequence[str],
    out: Path,
    *,
    timeout_s: float,
    security: ClientSecurity | None = None,
) -> dict[str, Any]:
    """Fetch the model and write it.

    Args:
        addresses: of all shards, in their order.
        out: the safetensors file; its metadata are ``format`` ("pt"), and ``version`` and ``run``
            of each shard, separated by commas. The model holds at least the updates that
            ``version`` counts.
        timeout_s: seconds to keep trying, for each call.
        security: certificates and token; None reads the environment.

    Returns:
        What was written: ``out``, ``version``, ``run``, ``tensors``, ``parameters``, ``bytes``.

    Raises:
        ServerUnavailableError: a server was not reached; names it and the time spent.
        NotReadyError: the servers have no model yet.
        ConfigError: these are not all shards in order, or the file cannot be written.
    """
    check_writable(out)
    transports = connect(list(addresses), RetryConfig(), security=security)
    try:
        statuses = [server_status(t, timeout_s=timeout_s) for t in transports]
        model = pull_model(transports, timeout_s=timeout_s)
    finally:
        for transport in transports:
            transport.close()
    metadata = {
        "format": "pt",
        "version": ",".join(str(s.version) for s in statuses),
        "run": ",".join(str(s.run) for s in statuses),
    }
    write_model(out, model, metadata)
    return {
        "out": str(out),
        "version": metadata["version"],
        "run": metadata["run"],
        "tensors": len(model),
        "parameters": sum(v.size for v in model.values()),
        "bytes": out.stat().st_size,
    }
