"""A worker with its client, fed with progress that was drawn beforehand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dgs.client import Client
from dgs.config import WorkerConfig
from dgs.space import FloatArray, ParameterSpace, TensorSpec
from dgs.transport.base import Transport
from dgs.view import View
from dgs.worker import Worker

__all__ = ["Site", "draw_progress"]


def draw_progress(total: int, count: int = 4) -> list[torch.Tensor]:
    """Draw what a worker's rounds bring, flat; rounds take turns with them."""
    rng = np.random.default_rng(2)
    return [torch.from_numpy(rng.standard_normal(total, dtype=np.float32)) for _ in range(count)]


class Site:
    """One worker, joined to the shards behind some transports.

    Args:
        sizes: of the tensors.
        transports: one per shard.
        config: of the worker.
        name: of the worker.
        progress: what its rounds bring.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        transports: Sequence[Transport],
        config: WorkerConfig,
        name: str,
        progress: Sequence[torch.Tensor],
    ) -> None:
        """Join; the first to join gives a model of zeros."""
        tensors = tuple(TensorSpec(f"t{i}", (n,)) for i, n in enumerate(sizes))
        view = View.whole(ParameterSpace(tensors))
        self.client = Client(transports, config, name, [view])
        self.worker = Worker(view, len(transports), config)
        self._progress, self._turn = progress, 0
        self._zeros = torch.zeros(view.size)
        joined = self.client.join(self._model)
        assert joined.models is not None
        self.worker.join(joined.tickets, joined.models)

    def _model(self) -> FloatArray:
        return np.zeros(self._zeros.numel(), np.float32)

    def collect(self) -> list[bytes]:
        """Accumulate the next progress, select and encode: one frame per shard."""
        flat = self._progress[self._turn % len(self._progress)]
        self._turn += 1
        ranges = self.worker.ranges
        self.worker.collect(lambda unit: (flat[ranges[unit]], self._zeros[ranges[unit]]))
        assert self.worker.dialog.pending is not None
        return self.worker.dialog.pending

    def exchange(self) -> None:
        """Do all that one exchange takes."""
        self.worker.absorb(self.client.exchange(self.collect()))
