"""Snapshots: the state at one position of the log, as arrays and facts.

A snapshot is some safetensors files, the parts, and a manifest that is written last. It counts
once the manifest has its name, and nothing that counts is ever written over.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from safetensors import SafetensorError

from dgs.errors import StateError
from dgs.storage.disk import Disk, explained, remedy
from dgs.storage.manifest import (
    DamagedError,
    Manifest,
    PartFile,
    decode_manifest,
    encode_manifest,
    is_part,
    list_positions,
    part_name,
    position_of_part,
    snapshot_name,
)

__all__ = [
    "Contents",
    "Entry",
    "Snapshot",
    "clean",
    "list_snapshots",
    "prune",
    "read_snapshot",
    "set_aside",
    "snapshot_name",
    "verify_snapshot",
    "write_snapshot",
]

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]

ASIDE: Final = ".new"
DAMAGED: Final = "damaged-"


@dataclass(frozen=True)
class Snapshot:
    """What is to be written."""

    position: int
    """Records of the log that are in it: replay goes on from there."""

    facts: dict[str, Any]
    """Whatever JSON can say."""

    parts: dict[str, Callable[[], Arrays]]
    """Arrays by name, by part; called one after the other, so that one is in memory at a time."""


class Contents(NamedTuple):
    """What was read.

    Attributes:
        facts: as they were written.
        parts: arrays by name, by part; each has its own memory and may be written.
    """

    facts: dict[str, Any]
    parts: dict[str, dict[str, Array]]


class Entry(NamedTuple):
    """A snapshot in a list.

    Attributes:
        position: records of the log that are in it.
        size_bytes: length of all its files, by its manifest; 0 where that is damaged.
        facts: from the manifest; empty where that is damaged.
        problems: what is wrong at first sight; `verify_snapshot` reads everything.
    """

    position: int
    size_bytes: int
    facts: dict[str, Any]
    problems: tuple[str, ...]


def write_snapshot(disk: Disk, snapshot: Snapshot) -> int:
    """Write a snapshot, durable on return; nothing counts before all of it is there.

    A snapshot of the same position is replaced at once.

    Args:
        disk: where to.
        snapshot: what; the log has to be durable up to its position.

    Returns:
        The length of all files, in bytes.

    Raises:
        StateError: the disk fails; snapshots that were there still are.
        ValueError: a part's name is not of lower-case letters, digits, "-" and "_", or the facts
            hold what is not finite.
        TypeError: the facts hold what JSON cannot say.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from dgs.storage.disk import FolderDisk
        >>> model = Snapshot(5, {"run": 1}, {"model": lambda: {"theta": np.ones(2)}})
        >>> with tempfile.TemporaryDirectory() as folder, FolderDisk(Path(folder)) as disk:
        ...     size_bytes = write_snapshot(disk, model)
        ...     [entry.position for entry in list_snapshots(disk)]
        ...     read_snapshot(disk, 5).parts["model"]["theta"]
        [5]
        array([1., 1.])
    """
    for part in snapshot.parts:
        if not is_part(part):
            raise ValueError(f"{part!r} does not name a part of a snapshot")
    name = snapshot_name(snapshot.position)
    with explained(disk, f"write {name}"):
        files = {
            part: _write_part(disk, snapshot.position, part, make())
            for part, make in snapshot.parts.items()
        }
        disk.sync()
        manifest = encode_manifest(snapshot.position, snapshot.facts, files)
        _publish(disk, name, manifest)
        disk.sync()
    return len(manifest) + sum(file.size_bytes for file in files.values())


def list_snapshots(disk: Disk) -> list[Entry]:
    """Return the snapshots, the newest first, without reading their parts.

    Raises:
        StateError: the disk fails, or a snapshot was written by a newer release.
    """
    with explained(disk, "list the files"):
        names = disk.names()
    return [_look(disk, position, names) for position in reversed(list_positions(names))]


def read_snapshot(disk: Disk, position: int) -> Contents:
    """Read a snapshot whole, and believe nothing before its size and checksum are right.

    Raises:
        StateError: it is not there, or damaged; the message names the file and what to do.
    """
    try:
        manifest = _read_manifest(disk, position)
        parts = {part: _read_part(disk, file) for part, file in manifest.files.items()}
    except DamagedError as e:
        raise StateError(f"{disk.label}/{e}: {remedy(disk)}") from e
    return Contents(manifest.facts, parts)


def verify_snapshot(disk: Disk, position: int) -> list[str]:
    """Read a snapshot whole and return what is wrong with it, file by file.

    Raises:
        StateError: the disk fails, or a newer release wrote it.
    """
    try:
        manifest = _read_manifest(disk, position)
    except DamagedError as e:
        return [str(e)]
    problems = []
    for file in manifest.files.values():
        try:
            _read_part(disk, file)
        except DamagedError as e:
            problems.append(str(e))
    return problems


def prune(disk: Disk, keep: int = 2) -> int:
    """Remove all but the newest snapshots without problems; not while one is written.

    Damaged ones that are newer than the oldest kept are left as they are.

    Args:
        disk: where they are.
        keep: how many to keep, at least 1.

    Returns:
        The position of the oldest one kept, up to which the log may be cut; 0 if there is none.

    Raises:
        StateError: the disk fails.
    """
    sound = [entry.position for entry in list_snapshots(disk) if not entry.problems]
    if not sound:
        return 0
    oldest = sound[:keep][-1]
    with explained(disk, "remove old snapshots"):
        names = disk.names()
        old = [snapshot_name(position) for position in list_positions(names) if position < oldest]
        for name in old:
            disk.remove(name)
        disk.sync()  # first the manifests: one without its parts would look damaged
        for name in _stray_parts(disk, [name for name in names if name not in old]):
            disk.remove(name)
        disk.sync()
    return oldest


def clean(disk: Disk) -> list[str]:
    """Remove what writing left when it did not get to its end; not while anything is written.

    Returns:
        The names of the files removed: "log-*.new", "snapshot-*.new", parts without a manifest.

    Raises:
        StateError: the disk fails.
    """
    with explained(disk, "remove unfinished files"):
        names = disk.names()
        ours = [name for name in names if name.startswith(("log-", "snapshot-"))]
        unfinished = [name for name in ours if name.endswith(ASIDE)]
        unfinished += _stray_parts(disk, names)
        for name in unfinished:
            disk.remove(name)
        disk.sync()
    return unfinished


def set_aside(disk: Disk, position: int) -> list[str]:
    """Rename the files of a snapshot, so that an older one is used; nothing is deleted.

    Returns:
        Their new names, each "damaged-" and the old one.

    Raises:
        StateError: the disk fails.
    """
    with explained(disk, f"set {snapshot_name(position)} aside"):
        prefix = f"{snapshot_name(position).removesuffix('.json')}."
        # the manifest last: parts without one would be taken for leftovers, and removed
        files = sorted(
            (name for name in disk.names() if name.startswith(prefix)),
            key=lambda name: (name == snapshot_name(position), name),
        )
        for name in files:
            disk.rename(name, DAMAGED + name)
            disk.sync()
    return [DAMAGED + name for name in files]


def _stray_parts(disk: Disk, names: list[str]) -> list[str]:
    """Return the parts that no manifest names; where one is damaged, it may be any of its own."""
    wanted: set[str] = set()
    unclear: set[int] = set()
    for position in list_positions(names):
        try:
            wanted |= {file.name for file in _read_manifest(disk, position).files.values()}
        except DamagedError:
            unclear.add(position)
    at = {name: position_of_part(name) for name in names}
    return [
        name
        for name, position in at.items()
        if position is not None and position not in unclear and name not in wanted
    ]


def _look(disk: Disk, position: int, names: list[str]) -> Entry:
    try:
        manifest = _read_manifest(disk, position)
    except DamagedError as e:
        return Entry(position, 0, {}, (str(e),))
    missing = [file.name for file in manifest.files.values() if file.name not in names]
    problems = tuple(f"{name}: not there" for name in missing)
    return Entry(position, manifest.size_bytes, manifest.facts, problems)


def _publish(disk: Disk, name: str, data: bytes) -> None:
    """Write a file, whole or not at all; its name is durable after the disk's next sync."""
    try:
        with contextlib.closing(disk.open(name + ASIDE)) as file:
            file.truncate(0)
            file.write(data)
            file.sync()
    except OSError:
        with contextlib.suppress(OSError):
            disk.remove(name + ASIDE)
        raise
    disk.rename(name + ASIDE, name)


def _write_part(disk: Disk, position: int, part: str, arrays: Arrays) -> PartFile:
    plain = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    data = safetensors.numpy.save(plain)
    checksum = zlib.crc32(data)
    file = PartFile(part_name(position, part, checksum), len(data), checksum)
    _publish(disk, file.name, data)
    return file


def _read_part(disk: Disk, file: PartFile) -> dict[str, Array]:
    data = _read(disk, file.name)
    if len(data) != file.size_bytes:
        raise DamagedError(f"{file.name}: {len(data)} bytes, expected {file.size_bytes}")
    checksum = zlib.crc32(data)
    if checksum != file.crc32:
        raise DamagedError(
            f"{file.name}: checksum {checksum:08x} of {len(data)} bytes, expected {file.crc32:08x}"
        )
    try:
        arrays: dict[str, Array] = safetensors.numpy.load(data)
    except (SafetensorError, KeyError, ValueError) as e:
        raise DamagedError(f"{file.name}: not safetensors, though as it was written: {e}") from e
    return arrays


def _read(disk: Disk, name: str) -> bytes:
    with explained(disk, f"read {name}"):
        if name not in disk.names():  # opening would create it
            raise DamagedError(f"{name}: not there")
        with contextlib.closing(disk.open(name)) as file:
            return file.read()


def _read_manifest(disk: Disk, position: int) -> Manifest:
    data = _read(disk, snapshot_name(position))
    return decode_manifest(data, position, disk.label)
