"""Workers without optimizers: progress goes in by hand, so that laws can be checked exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from dgs.client import Client
from dgs.config import ServerConfig, WorkerConfig
from dgs.server import ParameterServer
from dgs.session import Session
from dgs.space import ParameterSpace, TensorSpec
from dgs.transport.base import Transport
from dgs.transport.local import LocalTransport
from dgs.view import View
from dgs.worker import Answer, Worker

FloatArray = npt.NDArray[np.float32]
SHAPES = [(7, 5), (), (64,), (0, 3), (3, 2, 4), (1,)]


def space_of(
    shapes: Sequence[tuple[int, ...]], buffers: Sequence[tuple[int, ...]] = ()
) -> ParameterSpace:
    """Name tensors t0, t1, ... and buffers b0, b1, ..."""
    tensors = [TensorSpec(f"t{i}", s) for i, s in enumerate(shapes)]
    tensors += [TensorSpec(f"b{i}", s, buffer=True) for i, s in enumerate(buffers)]
    return ParameterSpace(tuple(tensors))


class Site:
    """One worker with its client."""

    def __init__(
        self,
        name: str,
        servers: Sequence[ParameterServer],
        config: WorkerConfig,
        model: FloatArray,
        space: ParameterSpace | None = None,
        *,
        wrap: Callable[[Transport], Transport] = lambda t: t,
    ) -> None:
        """Join the servers; the first site to join gives them `model`."""
        space = space or space_of(SHAPES)
        view: View = View.whole(space)
        self.transports = [wrap(LocalTransport(s)) for s in servers]
        self.client = Client(self.transports, config, name, [view])
        self.worker = Worker(view, len(servers), config)
        self.join(model)

    def join(self, model: FloatArray) -> None:
        """Join anew."""
        joined = self.client.join(lambda: model)
        assert joined.models is not None
        self.worker.join(joined.tickets, joined.models)

    @property
    def base(self) -> FloatArray:
        """The worker's base."""
        return self.worker.base.numpy()

    def collect(self, progress: FloatArray) -> list[bytes]:
        """Make the update of a round."""
        flat, ranges = torch.from_numpy(progress), self.worker.ranges
        self.worker.collect(lambda i: (flat[ranges[i]], torch.zeros_like(flat[ranges[i]])))
        assert self.worker.dialog.pending is not None
        return self.worker.dialog.pending

    def exchange(self, progress: FloatArray) -> Answer:
        """Send the update of a round and take the difference."""
        return self.worker.absorb(self.client.exchange(self.collect(progress)))

    def waiting(self) -> FloatArray:
        """Return what the momentum rule holds back, flat."""
        parts = [self.worker._rule.waiting(r) for r in self.worker.ranges]
        zeros = [torch.zeros(r.stop - r.start) for r in self.worker.ranges]
        return torch.cat([z if p is None else p for p, z in zip(parts, zeros, strict=True)]).numpy()


def make_servers(count: int = 1, hash_interval: int = 1) -> list[ParameterServer]:
    """Make the shards of one run; each reply carries a hash."""
    return [ParameterServer(ServerConfig(hash_interval=hash_interval), run=9) for _ in range(count)]


def sessions(server: ParameterServer) -> Iterator[Session]:
    """Iterate over a server's live sessions."""
    return server.state.registry.sessions()


def replica(servers: Sequence[ParameterServer], name: str) -> FloatArray:
    """Concatenate the shards' records of one worker."""
    found = [s.record.replica for server in servers for s in sessions(server) if s.worker == name]
    return np.concatenate(found)


def model_of(server: ParameterServer) -> FloatArray:
    """Return one shard's model, buffers included."""
    assert server.state.shard is not None
    return server.state.shard.model


def server_model(servers: Sequence[ParameterServer]) -> FloatArray:
    """Concatenate the shards' models, buffers included."""
    return np.concatenate([model_of(s) for s in servers])


def overwrite(server: ParameterServer, value: float) -> None:
    """Set the model to a value that no worker has, as nothing that workers can send would."""
    for session in sessions(server):
        session.record.materialise()
        session.record.version = -1  # before the log: all of the model may differ
    assert server.state.shard is not None
    server.state.shard.model[:] = value


def gaussian(rng: np.random.Generator, size: int) -> FloatArray:
    """Draw float32 normal values."""
    return rng.standard_normal(size).astype(np.float32)


def dyadic(rng: np.random.Generator, size: int) -> FloatArray:
    """Draw multiples of 1/64: their float32 sums are exact, so laws can be held to equality."""
    return (rng.integers(-64, 65, size) / 64).astype(np.float32)
