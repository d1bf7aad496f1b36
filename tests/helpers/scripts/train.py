# ruff: noqa: T201 - a user's script prints
"""A user's own script: a plain torch loop with its SGD line replaced."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import dgs
from tests.helpers.scripts.act import find_server

BATCH = 32


def make_model(seed: int) -> nn.Sequential:
    """Return the plain model that the script trains."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))


def make_data() -> tuple[Tensor, Tensor]:
    """Return 512 samples of 20 features, and which of the first three is the largest."""
    inputs = torch.randn(512, 20, generator=torch.Generator().manual_seed(0))
    return inputs, inputs[:, :3].argmax(dim=1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--fail-once", type=Path)
    parser.add_argument("--kill-server-at", type=int, help="step after which worker 0 does so")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rank = int(os.environ["DGS_RANK"])
    model, (inputs, labels) = make_model(seed=rank), make_data()
    opt = dgs.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.05),
        named_parameters=model.named_parameters(),
        named_buffers=model.named_buffers(),
        density=0.1,
        download_density=0.1,
    )
    print("start", model.get_parameter("0.weight").double().sum().item())
    order = torch.Generator().manual_seed(rank)
    for step in range(args.steps):
        batch = torch.randint(len(inputs), (BATCH,), generator=order)
        loss = functional.cross_entropy(model(inputs[batch]), labels[batch])
        opt.zero_grad()
        loss.backward()
        opt.step()
        if args.fail_once and step == 5 and not args.fail_once.exists():
            args.fail_once.touch()
            print("failing on purpose", file=sys.stderr)
            os._exit(5)
        if rank == 0 and step == args.kill_server_at:
            os.kill(find_server(), signal.SIGKILL)
    print("exchanges", opt.stats.exchanges)
    opt.close()


if __name__ == "__main__":
    main()
