"""Servers in this process, with and without a model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import dgs
from tests.helpers.scripts.train import make_model


@pytest.fixture
def server() -> Iterator[str]:
    """Address of a server that no worker has joined."""
    with dgs.serve("127.0.0.1:0") as handle:
        yield handle.address


@pytest.fixture
def shards() -> Iterator[str]:
    """Addresses of two servers that hold a model, given by a worker called ``first``."""
    with dgs.serve("127.0.0.1:0") as a, dgs.serve("127.0.0.1:0") as b:
        addresses = f"{a.address},{b.address}"
        opt = join(addresses, seed=1)
        yield addresses
        opt.close()


def join(addresses: str, seed: int, worker: str = "first") -> dgs.DistributedOptimizer:
    """Join with the model of a seed."""
    model = make_model(seed)
    return dgs.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        named_parameters=model.named_parameters(),
        named_buffers=model.named_buffers(),
        server=addresses,
        worker=worker,
    )
