"""State directories with real requests in them, and what may happen to one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dgs.config import ServerConfig, WorkerConfig
from dgs.durable import Durable
from dgs.state import fingerprint
from dgs.storage.disk import Disk, FolderDisk
from tests.helpers.sites import FloatArray, Site, dyadic, model_of, space_of

CONFIG = WorkerConfig(rule="residual", density=0.2, download_density=0.2, selection="exact")
SPACE = space_of([(40, 5), (64,), (30, 4)], [(8,)])


class Made(NamedTuple):
    """What was put into state directories; lists have one entry per shard."""

    history: list[dict[int, str]]
    """Fingerprint of the state after so many requests, where all shards had been asked."""
    model: FloatArray
    versions: list[int]

    @property
    def fingerprints(self) -> list[str]:
        """Of the states at the end."""
        return [seen[max(seen)] for seen in self.history]


def fill(disks: Sequence[Disk], snapshots: Sequence[int] = (), rounds: int = 12) -> Made:
    """Let two workers exchange with servers that keep a state each, and die without a goodbye.

    Args:
        disks: one per shard.
        snapshots: rounds after which one is made.
        rounds: exchanges of each worker.
    """
    rng = np.random.default_rng(0)
    shards = [
        Durable.open(disk, ServerConfig(hash_interval=1), run=11 + i)
        for i, disk in enumerate(disks)
    ]
    history: list[dict[int, str]] = [{0: fingerprint(s.core.state)} for s in shards]
    model = dyadic(rng, SPACE.size)
    sites = [Site(f"site-{i}", shards, CONFIG, model, SPACE) for i in range(2)]
    for number in range(rounds):
        for site in sites:
            site.exchange(dyadic(rng, SPACE.num_parameters))
            for shard, seen in zip(shards, history, strict=True):
                seen[shard.commit()] = fingerprint(shard.core.state)
        if number in snapshots:
            for shard in shards:
                shard.finish_snapshot(shard.begin_snapshot())
    cores = [shard.core for shard in shards]
    for shard in shards:
        shard.close()
    return Made(
        history,
        np.concatenate([model_of(core) for core in cores]),
        [core.version for core in cores],
    )


def make_states(folders: Sequence[Path], snapshots: Sequence[int] = (), rounds: int = 12) -> Made:
    """Do the same in folders, which are closed then."""
    with ExitStack() as stack:
        disks = [stack.enter_context(FolderDisk(folder)) for folder in folders]
        return fill(disks, snapshots, rounds)


def damage(path: Path, change: Callable[[bytearray], object]) -> None:
    """Change what is in a file."""
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def flip(path: Path, at: float) -> None:
    """Flip a bit of a file, at a share of its length."""

    def change(data: bytearray) -> None:
        data[int(at * len(data))] ^= 4

    damage(path, change)


def files(folder: Path) -> dict[str, bytes]:
    """Return what is in a folder, without the lock."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "LOCK"}
