# ruff: noqa: T201 - a user's script prints
"""A worker that keeps a checkpoint and is killed: ``killed.py SERVERS FOLDER MODE MOMENT:N ...``.

One process after the other is that worker, and kills itself (SIGKILL) at its moment: before the
Nth exchange is sent (``send``), once its reply is there (``reply``), when the Nth checkpoint is
written, but not in its place yet (``write``), or after the Nth step (``step``). The last one
trains to the end. They are forked, so that torch is loaded once only.
"""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from collections.abc import Callable

import torch
from torch import nn

import dgs
from dgs.transport.base import Method
from dgs.transport.connect import Servers
from dgs.transport.grpc_client import GrpcTransport
from tests.helpers.training import Batches, flat, make_model, sgd, wrap

STEPS = 12

Passed = Callable[[str], None]


def make_worker(
    server: Servers, overlap: bool, **settings: str | int
) -> tuple[nn.Module, dgs.DistributedOptimizer]:
    """Return worker "w" and its model."""
    model = make_model()
    opt = wrap(
        model, server, sgd, worker="w", momentum=0.5, local_steps=2, overlap=overlap, **settings
    )
    return model, opt


def train(model: nn.Module, opt: dgs.DistributedOptimizer, passed: Passed) -> str:
    """Train from where the cursor says to the last step; return what the parameters are then."""
    for step in range(int(opt.cursor or b"0"), STEPS):
        opt.zero_grad()
        Batches(step).loss(model).backward()
        opt.cursor = str(step + 1).encode()
        opt.step()
        passed("step")
    opt.state_dict()  # lands what is in flight
    return flat(model).numpy().tobytes().hex()


class Dying(GrpcTransport):
    """A connection on which a process dies."""

    passed: Passed

    def call(self, method: Method, request: bytes, *, timeout_s: float) -> bytes:
        if method != Method.EXCHANGE:
            return super().call(method, request, timeout_s=timeout_s)
        self.passed("send")
        reply = super().call(method, request, timeout_s=timeout_s)
        self.passed("reply")
        return reply


def dying(where: str) -> Passed:
    """Return what is called at each moment, to die at one of them."""
    moment, _, number = where.partition(":")
    seen: Counter[str] = Counter()

    def passed(name: str) -> None:
        seen[name] += 1
        if name == moment and seen[name] == int(number):
            print("reached", where)
            os.kill(os.getpid(), signal.SIGKILL)

    return passed


def work(servers: str, folder: str, mode: str, where: str) -> None:
    """Be the worker, until the moment has come."""
    passed = dying(where)

    def watch(event: str, args: tuple[object, ...]) -> None:
        if event == "os.rename" and str(args[0]).endswith(".safetensors.new"):
            passed("write")

    sys.addaudithook(watch)
    links = [Dying(address) for address in servers.split(",")]
    for link in links:
        link.passed = passed
    model, opt = make_worker(links, mode == "overlap", checkpoint=folder, checkpoint_every=1)
    print("began at", opt.cursor.decode())
    print("ended with", train(model, opt, passed))
    print("exchanges", opt.stats.exchanges, "rejoins", opt.stats.rejoins)
    opt.close(leave=False)


def main() -> None:
    torch.set_num_threads(1)
    servers, folder, mode, *moments = sys.argv[1:]
    model, opt = make_worker(dgs.ParameterServer(), overlap=False)
    train(model, opt, lambda moment: None)  # loads what torch loads with the first steps
    opt.close()
    for where in [*moments, ""]:
        child = os.fork()
        if not child:
            work(servers, folder, mode, where)
            return
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code != (-signal.SIGKILL if where else 0):
            sys.exit(f"the worker to be killed at {where!r} ended with {code}")


if __name__ == "__main__":
    main()
