"""``dgs server``: hold one shard of a model."""

from __future__ import annotations

import argparse
import logging
import os
import queue
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from dgs.cli.arguments import (
    SubParsers,
    add_command,
    add_file_options,
    non_negative_int,
    non_negative_seconds,
    positive_int,
    positive_seconds,
)
from dgs.cli.console import note, print_json, say
from dgs.cli.model_file import read_model
from dgs.client import server_status
from dgs.config import ServerConfig, StorageConfig
from dgs.errors import DgsError, ModelMismatchError, StateError
from dgs.security import ServerSecurity
from dgs.serving import serve
from dgs.tracker import FloatArray
from dgs.transport.address import is_loopback, split_address
from dgs.transport.guard import Handler
from dgs.transport.local import LocalTransport

__all__ = ["add_parser", "run"]

logger = logging.getLogger("dgs.server")

DRAIN_S = 5.0
"""Seconds that exchanges in progress get when the server is told to end."""

EXAMPLE = """
dgs server --listen 127.0.0.1:7070 --state-dir state/
dgs server --listen 127.0.0.1:7070 --init model.safetensors --verbose
"""


def add_parser(subparsers: SubParsers[argparse.ArgumentParser]) -> None:
    """Add the command to the program."""
    config, storage = ServerConfig(), StorageConfig()
    parser = add_command(
        subparsers,
        "server",
        run,
        summary="hold the model, or one shard of it",
        description=(
            "Hold one shard of a model, apply what workers send, and answer each with what it\n"
            "lacks. Prints its address when it listens and serves until SIGTERM or Ctrl-C, which\n"
            "let exchanges in progress end; a second one ends it at once. A model is split among\n"
            "as many servers as the workers list.\n\n"
            "With --state-dir, nothing that was acknowledged is lost, whatever ends the process:\n"
            "start the same command again, and workers go on where they were. Without it the\n"
            "model is in memory only. If the folder's disk fails, the server ends with code 1."
        ),
        example=EXAMPLE,
    )
    parser.add_argument(
        "--listen",
        required=True,
        metavar="HOST:PORT",
        help="where to listen; port 0 lets the system choose",
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
        help="keep the state in this folder; what it holds goes before --init",
    )
    parser.add_argument(
        "--snapshot-interval",
        type=positive_seconds,
        default=storage.snapshot_interval_s,
        metavar="S",
        help="with --state-dir: seconds between two snapshots (default: %(default)g)",
    )
    parser.add_argument(
        "--lease",
        type=non_negative_seconds,
        default=config.lease_s,
        metavar="S",
        help="close sessions that have not exchanged for so many seconds, to free their memory; "
        "their workers join again if they come back; 0: never (default: %(default)g)",
    )
    parser.add_argument(
        "--max-workers",
        type=positive_int,
        default=config.max_workers,
        metavar="N",
        help="sessions admitted at a time (default: %(default)s)",
    )
    parser.add_argument(
        "--hash-interval",
        type=non_negative_int,
        default=config.hash_interval,
        metavar="N",
        help="every Nth reply carries a check of the worker's copy; 0: none (default: %(default)s)",
    )
    _add_security_options(parser)
    parser.add_argument("--json", action="store_true", help="print the address as JSON")
    parser.add_argument("--verbose", action="store_true", help="log joins, leaves and refusals")


def _add_security_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "security",
        "Beyond loopback, a server wants TLS, and certificates or tokens of its clients. All "
        "files are read again when they change. 'dgs certs' and 'dgs token' make them.",
    )
    add_file_options(
        group,
        {
            "--tls-cert": "the server's certificate",
            "--tls-key": "its private key",
            "--tls-ca": "CA certificate of the clients, which must then show certificates of it; "
            "without --token-file, each may act as the workers that its certificate names",
            "--token-file": "file with the tokens that clients must send, a line 'NAME ROLE "
            "sha256:HEX' each; they then say who may act as which worker",
        },
    )
    group.add_argument(
        "--insecure",
        action="store_true",
        help="listen beyond loopback although all who reach the port can read and change the model",
    )


def run(args: argparse.Namespace) -> int:
    """Carry out the command."""
    config = ServerConfig(
        max_workers=args.max_workers, hash_interval=args.hash_interval, lease_s=args.lease
    )
    storage = StorageConfig(snapshot_interval_s=args.snapshot_interval)
    security = ServerSecurity(
        tls_cert=args.tls_cert,
        tls_key=args.tls_key,
        tls_ca=args.tls_ca,
        token_file=args.token_file,
        insecure=args.insecure,
    )
    host, _ = split_address(args.listen, port_zero=True)
    if args.verbose:
        logging.getLogger("dgs").setLevel(logging.INFO)

    def wrap(handler: Handler) -> Handler:
        handler = _NamingInit(handler, args.init) if args.init else handler
        return _Chronicle(handler) if args.verbose else handler

    with _signals() as signals:
        handle = serve(
            args.listen,
            init=_initial(args.init) if args.init else None,
            config=config,
            state_dir=args.state_dir,
            storage=storage,
            security=security,
            wrap=wrap,
            on_trouble=lambda trouble: signals.put(0),
        )
        if not is_loopback(host) and not (security.tls and security.authenticates):
            note(
                f"warning: {handle.address} is not confined to this machine, and --insecure was "
                "given: whoever reaches the port can read and change the model"
            )
        _announce(handle.address, as_json=args.json)
        signals.get()
        logger.info("ending; exchanges in progress have %g s", DRAIN_S)
        handle.stop(DRAIN_S)
    if handle.trouble:
        raise StateError(handle.trouble)
    return 0


def _initial(path: Path) -> dict[str, FloatArray]:
    model, ignored = read_model(path)
    if ignored:
        some = ", ".join(ignored[:3]) + (", ..." if len(ignored) > 3 else "")
        note(f"{path}: {len(ignored)} integer or boolean tensors are not trained: {some}")
    return model


def _announce(address: str, *, as_json: bool) -> None:
    if as_json:
        print_json({"address": address, "pid": os.getpid()})
    else:
        say(f"listening on {address}")


@contextmanager
def _signals() -> Iterator[queue.SimpleQueue[int]]:
    """Queue the first SIGTERM or SIGINT; end the process at the second."""
    # SimpleQueue is the one primitive of the library whose put() a signal handler may call
    arrived: queue.SimpleQueue[int] = queue.SimpleQueue()

    def take(number: int, frame: FrameType | None) -> None:
        for awaited in (signal.SIGTERM, signal.SIGINT):
            signal.signal(awaited, _end_at_once)
        arrived.put(number)

    before = {number: signal.signal(number, take) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_at_once(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


class _NamingInit:
    """Name the file that the server starts from, to a worker whose model is another.

    The server itself knows tensors only.
    """

    def __init__(self, core: Handler, path: Path) -> None:
        self._core = core
        self._path = path
        self._look = LocalTransport(core)

    def handle(self, method: str, request: bytes) -> bytes:
        """Answer one request."""
        try:
            return self._core.handle(method, request)
        except ModelMismatchError as error:
            if server_status(self._look, timeout_s=1.0).ready:
                raise
            text = f"the server starts from {self._path}, which is not this worker's model: {error}"
            note(f"refused a worker: {text}")
            raise ModelMismatchError(text) from error

    def max_request_bytes(self, method: str) -> int:
        """Return the server's limit."""
        return self._core.max_request_bytes(method)


class _Chronicle:
    """Log who joins and leaves a server, and what it refuses.

    Calls come one at a time, as to the server itself.
    """

    def __init__(self, core: Handler) -> None:
        self._core = core
        self._look = LocalTransport(core)
        self._known: set[tuple[str, int, int]] = set()

    def handle(self, method: str, request: bytes) -> bytes:
        """Answer one request and log what it changed."""
        try:
            return self._core.handle(method, request)
        except DgsError as error:
            logger.info("refused %s: %s: %s", method, error.reason, error)
            raise
        finally:
            if method in ("Join", "Leave"):
                self._compare()

    def max_request_bytes(self, method: str) -> int:
        """Return the server's limit."""
        return self._core.max_request_bytes(method)

    def _compare(self) -> None:
        status = server_status(self._look, timeout_s=1.0)
        now = {(w.worker, w.member, w.incarnation) for w in status.workers}
        before = {key[:2] for key in self._known}
        for worker, member, _ in sorted(now - self._known):
            known = (worker, member) in before
            how = "joined again, in place of its earlier process," if known else "joined"
            logger.info(
                "worker %s (member %d) %s at version %d", worker, member, how, status.version
            )
        present = {key[:2] for key in now}
        for worker, member in sorted(before - present):
            logger.info("worker %s (member %d) left", worker, member)
        self._known = now
