"""A small real training problem, and workers that take turns on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import dgs
from dgs.transport.connect import Servers

MakeOptimizer = Callable[[nn.Module], Optimizer]


def make_model(seed: int = 1, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Build a network with weights of several shapes."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 3))
    return model.to(dtype)


def make_data() -> tuple[Tensor, Tensor]:
    """Draw inputs, and labels that a small network can learn."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(256, 12, generator=generator)
    return x, x[:, :3].argmax(1)


def sgd(model: nn.Module) -> Optimizer:
    """Plain SGD, with a power of two as learning rate: products with it are exact."""
    return torch.optim.SGD(model.parameters(), lr=0.125)


def wrap(
    model: nn.Module,
    server: Servers,
    make_inner: MakeOptimizer = sgd,
    **settings: Any,
) -> dgs.DistributedOptimizer:
    """Wrap a model's optimizer; exact selection and a few per cent unless told otherwise."""
    defaults: dict[str, Any] = {"density": 0.1, "download_density": 0.1, "selection": "exact"}
    return dgs.DistributedOptimizer(
        make_inner(model),
        named_parameters=model.named_parameters(),
        named_buffers=model.named_buffers(),
        server=server,
        **{**defaults, **settings},
    )


class Batches:
    """The batches of one worker: a function of its seed and the step."""

    def __init__(self, seed: int = 0) -> None:
        """Start at the first batch."""
        self._x, self._y = make_data()
        self._generator = torch.Generator().manual_seed(seed)

    def loss(self, model: nn.Module) -> Tensor:
        """Evaluate the next batch."""
        i = torch.randint(0, len(self._x), (32,), generator=self._generator)
        x = self._x[i].to(next(model.parameters()).dtype)
        return nn.functional.cross_entropy(model(x).float(), self._y[i])


def train_step(model: nn.Module, opt: Optimizer, batches: Batches) -> float:
    """Make one ordinary training step."""
    opt.zero_grad()
    loss = batches.loss(model)
    loss.backward()
    opt.step()
    return float(loss.detach())


def full_loss(model: nn.Module) -> float:
    """Evaluate all data."""
    x, y = make_data()
    with torch.no_grad():
        logits = model(x.to(next(model.parameters()).dtype))
    return float(nn.functional.cross_entropy(logits.float(), y))


def server_loss(opt: dgs.DistributedOptimizer) -> float:
    """Evaluate the server's model."""
    model = make_model()
    model.load_state_dict(opt.pull_model())
    return full_loss(model)


def flat(model: nn.Module) -> Tensor:
    """Concatenate all parameters."""
    return torch.cat([p.detach().float().reshape(-1) for p in model.parameters()])


def train_in_turns(
    opts: Sequence[dgs.DistributedOptimizer], models: Sequence[nn.Module], steps: int
) -> None:
    """Let each worker make `steps` steps, one after another."""
    batches = [Batches(i) for i in range(len(models))]
    for _ in range(steps):
        for model, opt, data in zip(models, opts, batches, strict=True):
            train_step(model, opt, data)
