"""List what is in a state directory, also while a server uses it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from dgs.errors import StateError
from dgs.storage.disk import Disk, FolderDisk
from dgs.storage.records import segment_name
from dgs.storage.repair import holds_state
from dgs.storage.snapshot import list_snapshots, snapshot_name
from dgs.storage.wal import SegmentFile, list_segments

__all__ = ["Listing", "SegmentLine", "SnapshotLine", "look", "open_state", "steadily"]

LOOKS = 5
"""How often a folder is looked at while a server removes files from it."""

T = TypeVar("T")


class SnapshotLine(NamedTuple):
    """A snapshot in a list.

    Attributes:
        position: requests that it covers.
        version: updates that the model has had; None where there is no model, or no telling.
        workers: how many take part; None where there is no telling.
        time_s: when it was written, in seconds since the epoch.
        size_bytes: of all its files.
        problems: what is wrong at first sight.
    """

    position: int
    version: int | None
    workers: int | None
    time_s: float
    size_bytes: int
    problems: tuple[str, ...]


class SegmentLine(NamedTuple):
    """A piece of the log in a list.

    Attributes:
        first: position of its first record.
        records: how many are sound, from the first on.
        time_s: when it was last written to, in seconds since the epoch.
        size_bytes: of the file.
        torn: what is wrong with the bytes behind these records; nothing was promised of them.
        problem: damage to what was promised.
    """

    first: int
    records: int
    time_s: float
    size_bytes: int
    torn: str
    problem: str


class Listing(NamedTuple):
    """What is in a state directory, the newest first."""

    snapshots: list[SnapshotLine]
    segments: list[SegmentLine]


def open_state(path: Path, *, lock: bool) -> FolderDisk:
    """Open a state directory that is there.

    Args:
        path: the folder.
        lock: whether to keep servers from it meanwhile, and be able to change it.

    Raises:
        StateError: there is no such folder, it holds no state, or it is in use.
    """
    disk = FolderDisk(path, create=False, lock=False)
    try:
        names = disk.names()
        if not holds_state(names):
            raise StateError(f"{disk.label} holds no state of a server{_hint(disk)}")
    except BaseException:
        disk.close()
        raise
    if not lock:
        return disk
    disk.close()
    return FolderDisk(path, create=False)


def _hint(disk: FolderDisk) -> str:
    shards = sorted(child.name for child in disk.path.glob("shard-*"))
    if not shards:
        return ": it has no files snapshot-* or log-*; name the folder given to 'dgs server'"
    return f", but those of {len(shards)}: name one of its folders {', '.join(shards)}"


def steadily(disk: Disk, see: Callable[[], T]) -> T:
    """Look again while a server removes files from the folder under the looker's eyes.

    Args:
        disk: the folder.
        see: looks.

    Raises:
        StateError: as `see` does, where nothing was removed meanwhile.
        OSError: likewise.
    """
    for attempt in itertools.count(1):
        before = {name for name in disk.names() if not name.endswith(".new")}
        try:
            seen = see()
        except (StateError, OSError):
            if attempt == LOOKS or before <= set(disk.names()):
                raise
            continue
        if attempt == LOOKS or before <= set(disk.names()):
            return seen
    raise AssertionError("it counts for ever")


def look(disk: FolderDisk) -> Listing:
    """List what is in a state directory; a server may use it meanwhile.

    Raises:
        StateError: a part was written by a newer release, or cannot be read.
    """
    return steadily(disk, lambda: _look(disk))


def _look(disk: FolderDisk) -> Listing:
    entries = list_snapshots(disk)
    run = next((entry.facts["run"] for entry in entries if entry.facts), None)
    snapshots = []
    for entry in entries:
        state = entry.facts
        workers = len(state["registry"].get("workers", ())) if state else None
        written_s = (disk.path / snapshot_name(entry.position)).stat().st_mtime
        line = SnapshotLine(
            entry.position,
            state.get("version"),
            workers,
            written_s,
            entry.size_bytes,
            entry.problems,
        )
        snapshots.append(line)
    firsts = list_segments(disk)
    segments = [_segment(disk, run, first, last=first == firsts[-1]) for first in reversed(firsts)]
    return Listing(snapshots, segments)


def _segment(disk: FolderDisk, run: int | None, first: int, *, last: bool) -> SegmentLine:
    status = (disk.path / segment_name(first)).stat()
    time_s, size_bytes = status.st_mtime, status.st_size
    if run is None:
        why = "no snapshot tells which run it is of"
        return SegmentLine(first, 0, time_s, size_bytes, "", why)
    records, problem, torn = 0, "", ""
    try:
        segment = SegmentFile(disk, run, first)
        try:
            for _ in segment.walk(last=last):
                records += 1
        finally:
            torn = segment.torn
    except StateError as e:
        if isinstance(e.__cause__, OSError):
            raise
        torn, problem = "", torn or str(e)
    return SegmentLine(first, records, time_s, size_bytes, torn, problem)
