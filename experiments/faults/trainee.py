"""A worker to be killed: it trains until it is told to end, and writes down what was acknowledged.

    python -m experiments.faults.trainee --server ADDR,ADDR --name worker-0 --acks FILE

The exit code says why it ended: `Ended`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import queue
import signal
import sys
import time
from enum import IntEnum
from pathlib import Path
from types import FrameType

import torch

import dgs
from dgs.config import Rule
from dgs.errors import DgsError, FencedError, ServerUnavailableError
from dgs.transport.connect import connect, split_addresses
from experiments.faults.problem import Rows
from experiments.faults.witness import AckFile, Witness

__all__ = ["Ended", "main"]

RETRY = dgs.RetryConfig(
    connect_budget_s=120.0, budget_s=120.0, attempt_s=3.0, first_wait_s=0.05, longest_wait_s=1.0
)
"""Attempts are short, so that some are repeated while their first try is still being carried out;
budgets outlast what the supervisor does."""

RULES: tuple[Rule, ...] = ("samomentum", "residual", "dgc")


class Ended(IntEnum):
    """Why a worker ended; anything else is a defect."""

    TOLD = 0
    """SIGTERM, or all exchanges were made."""
    FENCED = 3
    """Another process has taken its name."""
    DIVERGED = 4
    """Its base was not the server's record of it."""
    DROPPED = 5
    """A server did not know its session any more."""


def main() -> None:
    """Train."""
    given = _parser().parse_args()
    logging.basicConfig(format="%(asctime)s %(name)s %(message)s", stream=sys.stdout)
    torch.set_num_threads(1)
    stop: queue.SimpleQueue[int] = queue.SimpleQueue()  # whose put() a signal handler may call

    def end(number: int, frame: FrameType | None) -> None:
        stop.put(number)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    acks = AckFile(given.acks)
    try:
        code = _train(given, acks, stop)
    except FencedError as error:
        print(f"fenced: {error}", flush=True)
        code = Ended.FENCED
    finally:
        acks.close()
    sys.exit(code)


def _train(given: argparse.Namespace, acks: AckFile, stop: queue.SimpleQueue[int]) -> Ended:
    point = torch.nn.Parameter(torch.zeros(given.size))
    rows = Rows(given.size, given.seed, (1 + given.index, os.getpid()))
    transports = connect(split_addresses(given.server), RETRY)
    checkpoint = given.checkpoint if given.index % 2 else None
    optimizer = dgs.DistributedOptimizer(
        torch.optim.SGD([point], lr=given.rate),
        named_parameters=[("x", point)],
        server=[Witness(t, acks) for t in transports],
        worker=f"worker-{given.index}",
        rule=RULES[given.index % len(RULES)],
        momentum=0.5,
        density=given.density,
        download_density=given.density,
        dense_below=0,
        overlap=given.index % 4 == 3,
        checkpoint=checkpoint or "",
        checkpoint_every=1 if checkpoint else 0,
        retry=RETRY,
    )
    print(f"worker-{given.index}, pid {os.getpid()}, from {optimizer.cursor!r}", flush=True)
    stats, code = optimizer.stats, Ended.TOLD
    try:
        for position in itertools.count(int(optimizer.cursor or b"0") + 1):
            if stats.resyncs or stats.rejoins:
                code = Ended.DIVERGED if stats.resyncs else Ended.DROPPED
                break
            if not stop.empty() or stats.exchanges == given.exchanges:
                break
            optimizer.cursor = str(position).encode()
            _step(optimizer, point, rows)
            time.sleep(given.pause_s)
    finally:
        optimizer.close(leave=not given.stay)
    print(json.dumps({"steps": stats.steps, "exchanges": stats.exchanges}), flush=True)
    return code


def _step(optimizer: dgs.DistributedOptimizer, point: torch.Tensor, rows: Rows) -> None:
    optimizer.zero_grad()
    rows.loss(point).backward()
    try:
        optimizer.step()
    except ServerUnavailableError as error:  # the next step finishes the exchange
        print(f"still waiting: {error}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.faults.trainee",
        description="Train a convex problem with other workers until SIGTERM.",
    )
    add = parser.add_argument
    add("--server", required=True, help="addresses of the shards, separated by commas")
    add("--index", type=int, required=True, help="number of this worker; its name follows from it")
    add("--acks", type=Path, required=True, help="file that acknowledgements are appended to")
    add("--seed", type=int, default=0, help="of the problem (default: 0)")
    add("--size", type=int, default=64, help="unknowns (default: 64)")
    add("--density", type=float, default=0.25, help="fraction that is sent (default: 0.25)")
    add("--rate", type=float, default=0.02, help="learning rate (default: 0.02)")
    add("--pause-s", type=float, default=0.0, help="seconds between steps (default: 0)")
    add("--exchanges", type=int, default=-1, help="end after so many (default: go on)")
    add("--checkpoint", metavar="DIR/", help="workers with odd numbers keep their state here")
    add("--stay", action="store_true", help="do not leave the servers at the end")
    return parser


if __name__ == "__main__":
    try:
        main()
    except DgsError as error:
        sys.exit(f"{type(error).__name__}: {error}")
