"""All that the replies of one shard's server depend on; saved, and rebuilt bit for bit."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Self

import numpy as np

from dgs.agreement import Agreement
from dgs.config import ServerConfig
from dgs.errors import UnknownWorkerError
from dgs.metrics import Histogram
from dgs.registry import Registry
from dgs.session import Session
from dgs.shard import Shard
from dgs.space import FloatArray
from dgs.tracker import Arrays

__all__ = ["SavedState", "ServerState", "Totals", "fingerprint"]


class SavedState(NamedTuple):
    """A server's state at one moment.

    Attributes:
        facts: numbers, strings, lists and dictionaries, as JSON has them.
        arrays: functions that compute named groups of arrays. Cheap to make; they may be called
            later and in another thread, while the server goes on.
    """

    facts: dict[str, Any]
    arrays: dict[str, Callable[[], Arrays]]


@dataclass(slots=True)
class Totals:
    """Counts over the whole run, departed workers included."""

    staleness: Histogram = field(default_factory=Histogram)
    bytes_up: int = 0
    bytes_down: int = 0
    refused: int = 0


@dataclass(slots=True)
class ServerState:
    """What a server knows; changed by its requests only.

    Example:
        >>> state = ServerState.begun(ServerConfig(), init=None, run=7)
        >>> saved = state.save()
        >>> arrays = {name: compute() for name, compute in saved.arrays.items()}
        >>> ServerState.restored(saved.facts, arrays).run
        7
    """

    config: ServerConfig
    run: int
    """Number that identifies this state, stamped on every frame."""
    agreed: Agreement
    registry: Registry
    shard: Shard | None = None
    init: dict[str, FloatArray] | None = None
    """Model to start from, until the first worker has named its order."""
    is_fresh: bool = False
    """Whether the model is one that a worker began with, and did not save from a training."""
    changes: int = 0
    """Number of requests that changed the state: carrying out these alone gives the same."""
    totals: Totals = field(default_factory=Totals)
    is_torn: bool = False
    """Whether a request broke off half done: this is not what its requests give any more."""
    reply_bytes: int = 0
    """No more than this do the kept replies take."""

    @classmethod
    def begun(
        cls, config: ServerConfig, *, init: Mapping[str, FloatArray] | None, run: int | None
    ) -> Self:
        """Begin without a model, or with one of which the order is not known yet."""
        run = (secrets.randbits(62) | 1) if run is None else run
        agreed = Agreement()
        registry = Registry(config.max_workers, agreed)
        return cls(config, run, agreed, registry, init=dict(init) if init is not None else None)

    @property
    def version(self) -> int:
        """Number of updates applied."""
        return self.shard.version if self.shard else 0

    @property
    def untrained(self) -> bool:
        """Whether the model is one that a worker began with and nobody has trained: replaceable."""
        return self.is_fresh and self.version == 0

    def bound_replies(self, latest: Session) -> None:
        """Drop the oldest replies if all take too much, but never the latest."""
        self.reply_bytes += len(latest.reply)
        if self.reply_bytes <= self.config.max_reply_bytes:
            return
        kept = sorted(self.registry.all_sessions(), key=lambda s: s.version)
        self.reply_bytes = sum(len(s.reply) for s in kept)
        for session in kept:
            if session is not latest and self.reply_bytes > self.config.max_reply_bytes:
                self.reply_bytes -= len(session.reply)
                session.reply = b""

    def configure(self, config: ServerConfig) -> None:
        """Change limits and intervals; which replies carry hashes depends on them."""
        self.config = config
        self.registry.max_workers = config.max_workers

    def worker_of(self, run: int, number: int) -> str | None:
        """Return the name of the worker that requests of a run know by a number, None if none."""
        if run != self.run:
            return None
        try:
            return self.registry.worker_numbered(number).name
        except UnknownWorkerError:
            return None

    def save(self) -> SavedState:
        """Return the state as it is now; cheap, for nothing is copied before it changes."""
        shard, totals, init = self.shard, self.totals, self.init
        facts = {
            "run": self.run,
            "config": asdict(self.config),
            "version": shard.version if shard else None,
            "fresh": self.is_fresh,
            "changes": self.changes,
            "refused": totals.refused,
            "bytes": [totals.bytes_up, totals.bytes_down],
            "staleness": totals.staleness.items(),
            "init": init is not None,
            "agreed": self.agreed.facts(),
            "registry": self.registry.facts(),
        }
        arrays = self.registry.lend()
        if shard is not None:
            model = shard.lend()
            arrays["model"] = lambda: {"model": model}
        if init is not None:
            arrays["init"] = lambda: {n: np.asarray(v) for n, v in init.items()}
        return SavedState(facts, arrays)

    @classmethod
    def restored(cls, facts: Mapping[str, Any], arrays: Mapping[str, Arrays]) -> Self:
        """Rebuild a state with which replies are, bit for bit, those of the one that was saved.

        Args:
            facts: of `SavedState`, also after a round through JSON.
            arrays: what the functions of `SavedState` computed.
        """
        config, version = ServerConfig(**facts["config"]), facts["version"]
        shard = None if version is None else Shard(arrays["model"]["model"], version)
        agreed = Agreement.restored(facts["agreed"])
        registry = Registry.restored(config.max_workers, facts["registry"], agreed, shard, arrays)
        bytes_up, bytes_down = facts["bytes"]
        return cls(
            config,
            facts["run"],
            agreed,
            registry,
            shard,
            init=arrays["init"] if facts["init"] else None,
            is_fresh=facts["fresh"],
            changes=facts["changes"],
            totals=Totals(Histogram.of(facts["staleness"]), bytes_up, bytes_down, facts["refused"]),
            reply_bytes=sum(len(s.reply) for s in registry.all_sessions()),
        )


def fingerprint(state: ServerState) -> str:
    """Hash all that replies depend on: equal for equal states, however they came about.

    Model, replicas, versions, sequence numbers, cached replies, what selections carry, who takes
    part. What was refused is left out: it is counted, but changes nothing.
    """
    facts, arrays = state.save()
    facts["refused"] = 0
    result = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16)
    for part, compute in sorted(arrays.items()):
        for name, array in sorted(compute().items()):
            result.update(f"{part}/{name}/{array.dtype}/{array.shape}".encode())
            result.update(np.ascontiguousarray(array).tobytes())
    return result.hexdigest()
