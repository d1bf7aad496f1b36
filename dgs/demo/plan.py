"""What the demonstration trains and with which settings; pure data, decided before it starts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from dgs.config import Rule, Values, WorkerConfig

__all__ = [
    "CIFAR10",
    "DIGITS",
    "Method",
    "Plan",
    "Task",
    "dense_method",
    "learning_rate_share",
    "sparse_method",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A data set, a network, and how one worker trains it; the same for all methods."""

    name: str
    train_images: int
    batch: int
    """Images per step of one worker."""
    epochs: float
    """Passes over the training set, of all workers together, where nothing else is asked for."""
    step_size: float
    """Learning rate without momentum; with momentum m it is ``step_size * (1 - m)``, so that one
    gradient moves the model by the same amount in the end."""
    weight_decay: float
    clip: float
    """Largest norm of a gradient; longer ones are scaled down to it."""
    warmup: float = 0.05
    """Fraction of the steps over which the learning rate rises; after it, it follows a cosine to
    zero."""

    def steps_for(self, epochs: float, workers: int) -> int:
        """Return the steps of one worker with which all see the training set `epochs` times."""
        return max(1, math.ceil(epochs * self.train_images / (self.batch * workers)))


DIGITS = Task(
    name="digits",
    train_images=1300,
    batch=16,
    epochs=20,
    step_size=0.07,
    weight_decay=0.0,
    clip=1.0,
)

CIFAR10 = Task(
    name="cifar10",
    train_images=50_000,
    batch=64,
    epochs=20,
    step_size=0.1,
    weight_decay=5e-4,
    clip=5.0,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """How the workers exchange."""

    name: str
    rule: Rule
    momentum: float
    density: float
    download_density: float
    values: Values

    def __post_init__(self) -> None:
        """Check the settings, before any process is started with them."""
        WorkerConfig(
            rule=self.rule,
            momentum=self.momentum,
            density=self.density,
            download_density=self.download_density,
            values=self.values,
        )


def dense_method() -> Method:
    """Return asynchronous SGD: everything is sent both ways, nothing is remembered."""
    return Method(
        name="dense ASGD",
        rule="none",
        momentum=0.0,
        density=1.0,
        download_density=1.0,
        values="float32",
    )


def sparse_method(
    *, momentum: float, density: float, download_density: float, values: Values
) -> Method:
    """Return DGS: sparse both ways, with the momentum that is made for it.

    Raises:
        ConfigError: a setting is out of range.
    """
    return Method(
        name=f"DGS {100 * density:g} %",
        rule="samomentum",
        momentum=momentum,
        density=density,
        download_density=download_density,
        values=values,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One run of the demonstration."""

    task: Task
    methods: tuple[Method, ...]
    workers: int
    steps: int
    """Of one worker."""
    seed: int
    device: str
    """``cpu`` or ``cuda``."""
    data_dir: Path | None = None

    def learning_rate(self, method: Method) -> float:
        """Return the highest learning rate of a method."""
        return round(self.task.step_size * (1.0 - method.momentum), 6)

    def arguments(self, method: Method, out: Path) -> list[str]:
        """Return what the worker's script is told, but its rank, which its environment has."""
        values: dict[str, object] = {
            "task": self.task.name,
            "device": self.device,
            "steps": self.steps,
            "batch": self.task.batch,
            "lr": self.learning_rate(method),
            "warmup": self.task.warmup,
            "weight-decay": self.task.weight_decay,
            "clip": self.task.clip,
            "seed": self.seed,
            "rule": method.rule,
            "momentum": method.momentum,
            "density": method.density,
            "download-density": method.download_density,
            "values": method.values,
            "out": out,
        }
        if self.data_dir is not None:
            values["data-dir"] = self.data_dir.resolve()
        return [f"--{name}={value}" for name, value in values.items()]


def learning_rate_share(step: int, steps: int, warmup: float) -> float:
    """Return which share of the highest learning rate a step has: a rise, then half a cosine.

    Args:
        step: counted from 0.
        steps: of the whole training.
        warmup: fraction of the steps that the rise takes.

    Example:
        >>> [round(learning_rate_share(s, 100, 0.05), 2) for s in (0, 4, 50, 99)]
        [0.2, 1.0, 0.5, 0.0]
    """
    rise = max(1, round(warmup * steps))
    cosine = 0.5 * (1.0 + math.cos(math.pi * step / steps))
    return min(1.0, (step + 1) / rise) * cosine
