"""What is timed: the worker's and the server's work for one exchange, and its yardsticks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from dgs import codec
from dgs.config import Values
from dgs.kernels import Kernels

__all__ = ["Server", "Worker", "resnet18_sizes"]

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]


def resnet18_sizes(scale: float = 1.0) -> list[int]:
    """Return the sizes of the 62 parameter tensors of ResNet-18 with ten classes.

    Args:
        scale: factor on all of them.
    """
    sizes = [64 * 3 * 9, 64, 64]
    width = 64
    for wider in (64, 128, 256, 512):
        for block in range(2):
            sizes += [wider * width * 9, wider, wider, wider * wider * 9, wider, wider]
            if block == 0 and wider != width:
                sizes += [wider * width, wider, wider]
            width = wider
    return [max(1, int(scale * size)) for size in [*sizes, 5120, 10]]


class Worker:
    """One worker's arrays, with a threshold per tensor that the density's share is above."""

    def __init__(self, sizes: list[int], density: float, kernels: Kernels, seed: int) -> None:
        """Draw velocity, base and local."""
        rng = np.random.default_rng(seed)
        self.sizes, self.density, self._kernels = np.array(sizes), density, kernels
        total = int(self.sizes.sum())
        self.velocity = rng.standard_normal(total, dtype=np.float32)
        self.base = rng.standard_normal(total, dtype=np.float32) * np.float32(1e-3)
        self.local = self.base + rng.standard_normal(total, dtype=np.float32) * np.float32(1e-6)
        self.progress = self.base - self.local
        bounds = np.concatenate(([0], np.cumsum(self.sizes))).tolist()
        self.ranges = [slice(a, b) for a, b in pairwise(bounds)]
        self._wanted = [int(np.ceil(round(density * n, 9))) for n in sizes]
        self.thresholds = [
            float(np.partition(np.abs(self.velocity[r]), -k)[-k])
            for r, k in zip(self.ranges, self._wanted, strict=True)
        ]
        self._indices = np.zeros(2 * sum(self._wanted) + 2048, np.int64)
        self._values = np.zeros(self._indices.size, np.float32)

    def add(self) -> None:
        """Run the yardstick."""
        np.add(self.velocity, self.progress, out=self.velocity)

    def select_given(self) -> tuple[Indices, Floats]:
        """Accumulate progress that is given, and select by the thresholds."""
        return self._tracked(
            lambda part, *rest, first: self._kernels.add_and_select(
                self.velocity[part], self.progress[part], *rest, first=first
            )
        )

    def select(self) -> tuple[Indices, Floats]:
        """Accumulate ``base - local``, and select by the thresholds."""
        return self._tracked(
            lambda part, *rest, first: self._kernels.accumulate_and_select(
                self.velocity[part], self.base[part], self.local[part], *rest, first=first
            )
        )

    def _tracked(self, kernel: Callable[..., int]) -> tuple[Indices, Floats]:
        count = 0
        for part, threshold in zip(self.ranges, self.thresholds, strict=True):
            room = self._indices[count:], self._values[count:]
            count += kernel(part, threshold, *room, first=part.start)
        return self._indices[:count], self._values[:count]

    def select_exactly(self) -> tuple[Indices, Floats]:
        """Accumulate ``base - local``, and select the exact top-k of each tensor."""
        count = 0
        for part, k in zip(self.ranges, self._wanted, strict=True):
            count += self._kernels.accumulate_and_top_k(
                self.velocity[part],
                self.base[part],
                self.local[part],
                k,
                self._indices[count:],
                self._values[count:],
                first=part.start,
            )
        return self._indices[:count], self._values[:count]

    def select_with_torch(self) -> tuple[Indices, Floats]:
        """Accumulate ``base - local``, and select with `torch.topk`."""
        velocity, base, local = map(torch.from_numpy, (self.velocity, self.base, self.local))
        chosen = []
        for part, k in zip(self.ranges, self._wanted, strict=True):
            candidates = velocity[part].add_(base[part] - local[part])
            largest = torch.topk(candidates.abs(), k, sorted=False).indices
            chosen.append(largest.sort().values + part.start)
        indices = torch.cat(chosen)
        return indices.numpy(), velocity[indices].numpy()

    def encode(self, chosen: tuple[Indices, Floats], kind: Values = "float32") -> bytes:
        """Quantise and code what was selected."""
        return self._kernels.encode_body(*chosen, self.sizes, kind).body

    def encode_plainly(self, chosen: tuple[Indices, Floats]) -> bytes:
        """Code what was selected without the compiled kernels."""
        return codec.encode_body(*chosen, self.sizes, "float32").body

    def settle(self, chosen: tuple[Indices, Floats]) -> None:
        """Decay what was sent, by a momentum of one, so that the next round finds the same."""
        self._kernels.settle(self.velocity, *chosen, 1.0)

    def turn(self) -> None:
        """Reverse the progress, so that the velocity stays where it is."""
        self.base, self.local = self.local, self.base
        np.negative(self.progress, out=self.progress)


class Server:
    """One session's model and replica, with an update that arrives over and over."""

    def __init__(self, worker: Worker, kernels: Kernels, seed: int) -> None:
        """Draw a replica whose differences are those that the worker's thresholds fit."""
        rng = np.random.default_rng(seed)
        self._worker, self._kernels = worker, kernels
        self.model = rng.standard_normal(worker.velocity.size, dtype=np.float32)
        self.replica = self.model - worker.velocity
        self._room = np.zeros(worker.velocity.size // 20, np.int64)
        self._found = np.zeros(self._room.size, np.float32)
        self._original = self.replica.copy()
        self._changed = self._room[:0]
        self.temporary = np.zeros_like(self.model)
        indices = np.flatnonzero(rng.random(self.model.size) < worker.density)
        self._count = indices.size
        self._body = worker.encode((indices, np.full(indices.size, 1e-6, np.float32)))

    def subtract(self) -> None:
        """Run the yardstick."""
        np.subtract(self.model, self.replica, out=self.temporary)

    def scan(self) -> Indices:
        """Find what is above the thresholds."""
        count = 0
        for part, threshold in self._segments():
            pair = self.model[part], self.replica[part]
            room = self._room[count:], self._found[count:]
            count += self._kernels.scan(*pair, threshold, *room, first=part.start)
        return self._room[:count]

    def scan_exactly(self) -> Indices:
        """Find the exact top-k of each segment."""
        count = 0
        for part, _ in self._segments():
            pair = self.model[part], self.replica[part]
            k = int(np.ceil(round(self._worker.density * (part.stop - part.start), 9)))
            room = self._room[count:], self._found[count:]
            count += self._kernels.scan_top_k(*pair, k, *room, first=part.start)
        return self._room[:count]

    def exchange(self, find: Callable[[], Indices]) -> bytes:
        """Decode, apply, find the difference, record and encode it."""
        sizes = self._worker.sizes
        update = self._kernels.decode_body(self._body, sizes, "float32", self._count)
        if self._kernels.apply_update(self.model, *update) >= 0:
            raise RuntimeError("the update is not finite")
        chosen = find()
        values = self._found[: chosen.size]
        self._kernels.record(self.replica, self.model, chosen, values)
        self._changed = chosen
        return self._kernels.encode_body(chosen, values, sizes, "float32").body

    def restore(self) -> None:
        """Take the last difference back, so that the next exchange finds it again."""
        self.replica[self._changed] = self._original[self._changed]

    def _segments(self) -> Iterator[tuple[slice, float]]:
        return zip(self._worker.ranges, self._worker.thresholds, strict=True)
