"""A disk that forgets what was not synced, and on which a process can die at any operation.

What a power loss leaves of unsynced bytes is drawn: nothing, everything, a beginning, or pages of
which some arrived, some did not, some are zeros and some have a bit turned over. Of unsynced
creations, renames and removals some have happened and some have not. A killed process loses nothing
that it has written, but nothing of that is durable either.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from experiments.faults.simulation.clock import Trace
from experiments.faults.simulation.weather import Weather

__all__ = ["Crashed", "SimDisk", "SimFile"]

_PAGES = (16, 64, 512)


class Crashed(BaseException):
    """The process that uses the disk has died; nothing in it runs any further.

    Not an `Exception`: nothing that a server does about errors can hold up its death.
    """


class _Content:
    """What a name leads to: bytes as written, and bytes as they would be found without power."""

    __slots__ = ("bad", "data", "floor", "kept")

    def __init__(self) -> None:
        self.data = bytearray()
        self.kept = b""
        self.floor = 0
        """Shortest length since the last sync: what is before it is durable."""
        self.bad: tuple[int, bytes] | None = None
        """What a failed sync left on the disk, and where: no later sync writes it again."""

    def real(self) -> bytes:
        """Return what reading finds once memory no longer hides what a failed sync did."""
        if self.bad is None:
            return bytes(self.data)
        start, piece = self.bad
        return b"".join((self.data[:start], piece, self.data[start + len(piece) :]))

    def settle(self, data: bytes) -> None:
        """Hold these bytes, all of them durable."""
        self.data, self.kept, self.floor, self.bad = bytearray(data), data, len(data), None


@dataclass(slots=True)
class _Rename:
    """A change of names that is not durable yet: creation and removal are renames of a kind."""

    old: str
    new: str
    content: _Content

    def apply(self, names: dict[str, _Content]) -> None:
        if self.old:
            names.pop(self.old, None)
        if self.new:
            names[self.new] = self.content


class SimDisk:
    """A flat folder on a disk with faults; see `dgs.storage.disk.Disk`.

    Args:
        label: what messages call it.
        weather: how often a process dies at an operation, and how often a sync fails.
        rng: decides.
        trace: where failpoints are noted by name.

    Attributes:
        is_full: whether writing fails.
        failed: operations that have failed, so that a refusal can be told from a defect.
        meanwhile: called before each operation while set: other things that happen.
    """

    def __init__(self, label: str, weather: Weather, rng: Random, trace: Trace) -> None:
        self._label = label
        self._weather = weather
        self._rng = rng
        self._trace = trace
        self._names: dict[str, _Content] = {}
        self._kept_names: dict[str, _Content] = {}
        self._unsynced: list[_Rename] = []
        self._life = 0
        self.is_full = False
        self.failed = 0
        self.meanwhile: Callable[[], None] | None = None

    @property
    def label(self) -> str:
        """What messages call the folder."""
        return self._label

    def names(self) -> list[str]:
        """Return the names of the files, sorted."""
        return sorted(self._names)

    def open(self, name: str) -> SimFile:
        """Open a file, which is created where it is not there."""
        life = self._life
        if name not in self._names:
            self.reach("create", name, life)
            self._change(_Rename("", name, _Content()))
            self.reach("created", name, life)
        return SimFile(self, name, self._names[name])

    def rename(self, old: str, new: str) -> None:
        """Give a file another name, in place of any file that had it."""
        life = self._life
        self.reach("rename", new, life)
        if old not in self._names:
            raise FileNotFoundError(errno.ENOENT, "no such file", old)
        self._change(_Rename(old, new, self._names[old]))
        self.reach("renamed", new, life)

    def remove(self, name: str) -> None:
        """Remove a file."""
        life = self._life
        self.reach("remove", name, life)
        if name not in self._names:
            raise FileNotFoundError(errno.ENOENT, "no such file", name)
        self._change(_Rename(name, "", self._names[name]))
        self.reach("removed", name, life)

    def sync(self) -> None:
        """Make the names durable."""
        life = self._life
        self.reach("sync", "folder", life)
        if self._fails("folder"):
            raise OSError(errno.EIO, "input/output error")
        self._kept_names = dict(self._names)
        self._unsynced = []
        self.reach("synced", "folder", life)

    def close(self) -> None:
        """Do nothing: nothing is locked."""

    @property
    def life(self) -> int:
        """Number of the process that uses the disk; those of earlier ones can do nothing more."""
        return self._life

    def reach(self, point: str, name: str, life: int) -> None:
        """Pass a failpoint: let other things happen, and perhaps die.

        Raises:
            Crashed: the process dies here, or has died meanwhile.
        """
        if self.meanwhile is not None:
            self.meanwhile()
        if life != self._life:
            raise Crashed
        if self._rng.random() < self._weather.failpoint:
            self._trace.add("failpoint", self._label, point, kind_of(name))
            raise Crashed

    def _fails(self, name: str) -> bool:
        fails = self._rng.random() < self._weather.bad_sync
        if fails:
            self.failed += 1
            self._trace.add("sync failed", self._label, kind_of(name))
        return fails

    def torn(self, data: bytes) -> bytes | None:
        """Return what is written of `data` where the disk is full; None where it is not."""
        if not self.is_full:
            return None
        self.failed += 1
        self._trace.add("disk full", self._label)
        return data[: self._rng.randint(0, max(0, len(data) - 1))]

    def die(self, *, power: bool) -> None:
        """End the process; without power, also what was not synced."""
        self._life += 1
        self.meanwhile = None
        if not power:
            for content in self._names.values():
                content.data, content.bad = bytearray(content.real()), None
            return
        self._names = self._left_names()
        self._kept_names, self._unsynced = dict(self._names), []
        for content in self._names.values():
            content.settle(self.left_of(content))

    def fail_sync(self, name: str, content: _Content) -> None:
        """Let a file's sync fail, sometimes: part of it arrived, the rest never will."""
        if self._fails(name):
            left, safe = self.left_of(content), min(content.floor, len(content.kept))
            size = len(content.data) - safe
            content.bad = (safe, left[safe : safe + size].ljust(size, b"\0"))
            content.kept, content.floor = left, safe
            raise OSError(errno.EIO, "input/output error")

    def left_of(self, content: _Content) -> bytes:
        """Draw what a power loss leaves of a file."""
        data, kept, floor, rng = content.real(), content.kept, content.floor, self._rng
        if data == kept:
            return kept
        luck, safe = rng.random(), min(floor, len(kept))
        if luck < 0.35:
            return kept
        if luck < 0.5:
            return data
        longest = max(len(data), len(kept))
        length = rng.randint(safe, longest)
        if luck < 0.7:
            return (data if len(data) >= length else kept)[:length]
        return self._scrambled(data, kept, safe, length)

    def _scrambled(self, data: bytes, kept: bytes, safe: int, length: int) -> bytes:
        """Return pages of the new and the old bytes and of zeros, with bits turned over."""
        rng, page = self._rng, self._rng.choice(_PAGES)
        left = bytearray(length)
        left[:safe] = data[:safe]
        for start in range(safe, length, page):
            source = rng.choice((data, data, kept, b""))
            piece = source[start : min(start + page, length)]
            left[start : start + len(piece)] = piece
        if length > safe and rng.random() < 0.5:
            for _ in range(rng.randint(1, 3)):
                left[rng.randrange(safe, length)] ^= 1 << rng.randrange(8)
        return bytes(left)

    def _change(self, change: _Rename) -> None:
        change.apply(self._names)
        self._unsynced.append(change)

    def _left_names(self) -> dict[str, _Content]:
        """Draw which unsynced changes of names a power loss leaves."""
        rng, changes = self._rng, self._unsynced
        luck = rng.random()
        if luck < 0.35:
            changes = []
        elif luck < 0.6:
            changes = changes[: rng.randint(0, len(changes))]
        elif luck < 0.85:
            changes = [c for c in changes if rng.random() < 0.5]
        names = dict(self._kept_names)
        for change in changes:
            change.apply(names)
        return names


class SimFile:
    """An open file, for as long as the process that has opened it lives."""

    def __init__(self, disk: SimDisk, name: str, content: _Content) -> None:
        self._disk = disk
        self._name = name
        self._content = content
        self._life = disk.life

    def read(self) -> bytes:
        """Return everything that is in the file."""
        if self._disk.life != self._life:
            raise Crashed
        return bytes(self._content.data)

    def write(self, data: bytes) -> None:
        """Append all of `data`; where that fails, part of it may be there."""
        disk, content = self._disk, self._content
        disk.reach("write", self._name, self._life)
        part = disk.torn(data)
        if part is not None:
            content.data += part
            raise OSError(errno.ENOSPC, "no space left on device")
        half = len(data) // 2
        content.data += data[:half]
        disk.reach("halfway", self._name, self._life)
        content.data += data[half:]
        disk.reach("written", self._name, self._life)

    def sync(self) -> None:
        """Make the bytes durable."""
        disk, content = self._disk, self._content
        disk.reach("sync", self._name, self._life)
        disk.fail_sync(self._name, content)
        content.kept, content.floor = content.real(), len(content.data)
        disk.reach("synced", self._name, self._life)

    def truncate(self, size: int) -> None:
        """Drop what lies beyond the first `size` bytes."""
        disk, content = self._disk, self._content
        disk.reach("truncate", self._name, self._life)
        del content.data[size:]
        content.floor = min(content.floor, size)
        if content.bad is not None:
            start, piece = content.bad
            content.bad = (start, piece[: size - start]) if size > start else None
        disk.reach("truncated", self._name, self._life)

    def close(self) -> None:
        """Do nothing: nothing is held."""


def kind_of(name: str) -> str:
    """Return what kind of file a name is of, for the names of failpoints.

    Example:
        >>> kind_of("snapshot-00000000000000000012.json.new")
        'manifest.new'
        >>> kind_of("log-00000000000000000000.wal"), kind_of("folder")
        ('log', 'folder')
    """
    aside = ".new" if name.endswith(".new") else ""
    stem = name.removesuffix(".new")
    for suffix, kind in ((".wal", "log"), (".json", "manifest"), (".safetensors", "part")):
        if stem.endswith(suffix):
            return kind + aside
    return stem + aside
