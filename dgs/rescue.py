"""Get the model out of state directories, as far as they still have it."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from dgs.agreement import Agreement
from dgs.errors import ConfigError, ModelMismatchError, StateError
from dgs.inspection import recovered, words_for_cut
from dgs.server import ParameterServer
from dgs.space import FloatArray, ParameterSpace
from dgs.storage.disk import Disk, explained
from dgs.storage.manifest import DamagedError, decode_manifest
from dgs.storage.repair import plan_repair
from dgs.storage.snapshot import list_snapshots, snapshot_name

__all__ = ["Rescued", "join_shards", "rescue"]

MODEL = "model"
"""Name of the part of a snapshot, and of the array in it, that holds the shard's model."""


@dataclass(frozen=True)
class Rescued:
    """One shard's part of a model."""

    label: str
    """Where it was found."""

    run: int
    """Number of the server's state."""

    version: int
    """Updates that it has had."""

    position: int
    """Requests that it comes from."""

    space: ParameterSpace
    """The whole model's tensors."""

    shard: int
    """Number of the shard."""

    num_shards: int
    """How many there are."""

    values: FloatArray
    """The shard's range of the flattened model."""

    notes: tuple[str, ...] = ()
    """What could not be used, in words."""

    lost_bytes: int = 0
    """Bytes of the log that could not be used."""

    @property
    def range(self) -> tuple[int, int]:
        """Coordinates of the flattened model that the shard holds."""
        return self.space.shard_ranges(self.num_shards)[self.shard]


def rescue(disk: Disk) -> Rescued:
    """Recover a shard's model as far as possible; the folder is not changed.

    That is the newest sound snapshot with the log behind it, up to damage if there is any, or the
    model of a newer snapshot of which other parts are damaged.

    Raises:
        StateError: nothing is left of it, or a part is of a newer release.
    """
    best: Rescued | None = None
    notes: list[str] = []
    try:
        best = _replayed(disk)
    except StateError as e:
        if isinstance(e.__cause__, OSError):
            raise
        notes.append(str(e))
    reached = best.position if best is not None else -1
    for position in [e.position for e in list_snapshots(disk) if e.position > reached]:
        try:
            best = _lone_model(disk, position, best.notes if best else tuple(notes))
            break
        except DamagedError as e:
            notes.append(str(e))
    if best is None:
        raise StateError(f"no model can be saved from {disk.label}: {'; '.join(notes)}")
    return best


def _replayed(disk: Disk) -> Rescued:
    plan = plan_repair(disk)
    notes = [text for texts in plan.damaged.values() for text in texts]
    if plan.cut is not None:
        notes.append(words_for_cut(plan.cut))
    try:
        durable = recovered(disk, plan)
    except StateError as e:
        try:
            return _lone_model(disk, plan.sound[0].position, (*notes, str(e)))
        except DamagedError:
            raise e from None
    durable.close()
    lost_bytes = plan.cut.lost_bytes if plan.cut else 0
    return _of_core(disk, durable.core, durable.position, tuple(notes), lost_bytes)


def _of_core(
    disk: Disk, core: ParameterServer, position: int, notes: tuple[str, ...], lost_bytes: int
) -> Rescued:
    state, agreed = core.state, core.state.agreed
    if state.shard is None:
        raise StateError(f"{disk.label} holds no model yet: no worker has joined that server")
    return Rescued(
        label=disk.label,
        run=state.run,
        version=state.version,
        position=position,
        space=agreed.require_space(),
        shard=agreed.shard,
        num_shards=agreed.num_shards,
        values=state.shard.model,
        notes=notes,
        lost_bytes=lost_bytes,
    )


def _lone_model(disk: Disk, position: int, notes: tuple[str, ...]) -> Rescued:
    """Take the model of a snapshot, whatever else is damaged in it.

    Raises:
        DamagedError: the manifest or the model is damaged, or there is none.
    """
    manifest = decode_manifest(_read(disk, snapshot_name(position)), position, disk.label)
    if MODEL not in manifest.files:
        raise DamagedError(f"{snapshot_name(position)}: has no model")
    file = manifest.files[MODEL]
    data = _read(disk, file.name)
    if len(data) != file.size_bytes or zlib.crc32(data) != file.crc32:
        raise DamagedError(f"{file.name}: damaged")
    try:
        values: Any = safetensors.numpy.load(data)[MODEL]
    except (SafetensorError, KeyError, ValueError) as e:
        raise DamagedError(f"{file.name}: {e}") from e
    agreed = Agreement.restored(manifest.facts["agreed"])
    return Rescued(
        label=disk.label,
        run=manifest.facts["run"],
        version=manifest.facts["version"],
        position=position,
        space=agreed.require_space(),
        shard=agreed.shard,
        num_shards=agreed.num_shards,
        values=values,
        notes=(*notes, f"what is saved is the model of snapshot {position:,}, without any log"),
    )


def _read(disk: Disk, name: str) -> bytes:
    with explained(disk, f"read {name}"):
        if name not in disk.names():  # opening would create it
            raise DamagedError(f"{name}: not there")
        with contextlib.closing(disk.open(name)) as file:
            return file.read()


def join_shards(parts: Sequence[Rescued]) -> tuple[dict[str, FloatArray], list[str]]:
    """Put together what several shards, or one, hold of a model.

    Returns:
        The tensors that are held whole, by name and by each further name that they are tied to, and
        the names of those that are missing, wholly or in part.

    Raises:
        ConfigError: these are not shards of one model, each given once.
    """
    space, count = parts[0].space, parts[0].num_shards
    seen: dict[int, Rescued] = {}
    for part in parts:
        difference = space.first_difference(part.space)
        if difference is not None:
            raise ModelMismatchError(
                f"{parts[0].label} (here) and {part.label} (there) hold different models: "
                f"{difference}"
            )
        if part.num_shards != count or part.shard in seen:
            raise ConfigError(
                f"{part.label} is shard {part.shard} of {part.num_shards}; give the folders of the "
                f"{count} servers of one model, each once"
            )
        seen[part.shard] = part
    flat, held = np.zeros(space.size, np.float32), np.zeros(space.size + 1, np.int64)
    for part in seen.values():
        start, stop = part.range
        flat[start:stop] = part.values
        held[start + 1 : stop + 1] = 1
    counted = np.cumsum(held)
    whole, missing = set[str](), list[str]()
    for spec, (a, b) in zip(space.tensors, pairwise(space.offsets.tolist()), strict=True):
        if counted[b] - counted[a] == b - a:
            whole |= {spec.name, *spec.aliases}
        else:
            missing.append(spec.name)
    if not whole:
        raise ConfigError(
            f"{parts[0].label} holds no tensor whole: the model is split over {count} servers; "
            "give all their folders"
        )
    return {n: v for n, v in space.unflatten(flat).items() if n in whole}, missing
