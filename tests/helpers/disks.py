"""A disk in memory that forgets what was not synced, and fails when it is told to."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from dgs.storage.disk import check_name

__all__ = ["ForgetfulDisk", "PowerLossError"]

SECTOR_BYTES = 16
"""Bytes that are written together or not at all; small, so that small files have many."""


class PowerLossError(Exception):
    """The machine went off in the middle of an operation; no program can catch that."""


@dataclass
class _Inode:
    """What is in a file."""

    now: bytearray = field(default_factory=bytearray)
    synced: bytes = b""
    safe: int = 0
    """Bytes from the start that were not touched since the last sync."""


class ForgetfulDisk:
    """One flat folder of files in memory, of which a power loss leaves some version.

    Args:
        rng: decides how much of a failed write gets through.

    Attributes:
        operations: how many changed something or made it durable, so far.
        trouble: called before each with its number and kind; what it raises stops the operation,
            a write half-way.
    """

    label = "disk"

    def __init__(self, rng: random.Random | None = None) -> None:
        self.operations = 0
        self.log: list[str] = []
        self.trouble: Callable[[int, str], None] = lambda number, kind: None
        self._rng = rng or random.Random(0)
        self._names: dict[str, _Inode] = {}
        self._synced: dict[str, _Inode] = {}
        self._since: dict[str, list[_Inode | None]] = {}

    def names(self) -> list[str]:
        """Return the names of the files, sorted."""
        return sorted(self._names)

    def open(self, name: str) -> _File:
        """Open a file, which is created where it is not there."""
        if check_name(name) not in self._names:
            self._step(f"create {name}")
            self._bind(name, _Inode())
        return _File(self, self._names[name], name)

    def rename(self, old: str, new: str) -> None:
        """Give a file another name, in place of any file that had it."""
        inode = self._find(check_name(old))
        check_name(new)
        self._step(f"rename {old} {new}")
        self._bind(old, None)
        self._bind(new, inode)

    def remove(self, name: str) -> None:
        """Remove a file."""
        self._find(check_name(name))
        self._step(f"remove {name}")
        self._bind(name, None)

    def sync(self) -> None:
        """Make the names durable."""
        self._step("sync names")
        self._synced = dict(self._names)
        self._since.clear()

    def fail_at(self, number: int, error: Callable[[], Exception] = PowerLossError) -> None:
        """Let one operation raise; after a power loss, so does every later one."""

        def trouble(n: int, kind: str) -> None:
            raised = error()
            if n == number or (n > number and isinstance(raised, PowerLossError)):
                raise raised

        self.trouble = trouble

    def after_kill(self) -> ForgetfulDisk:
        """Return what the next process finds: everything, as only the program is gone."""
        disk = ForgetfulDisk(self._rng)
        for name, inode in self._names.items():
            copied = _Inode(bytearray(inode.now), inode.synced, inode.safe)
            disk._names[name] = copied
        disk._synced = {n: disk._names[n] for n in self._synced if n in disk._names}
        disk._since = {n: [None, disk._names[n]] for n in self._since if n in disk._names}
        return disk

    def after_power_loss(self, rng: random.Random) -> ForgetfulDisk:
        """Return one of the disks that may be found when the power is back.

        Each name that was not synced is bound to any of the files it had since, or to none. Each
        sector that was not synced holds what was written, what was there before, zeros, or noise.
        """
        disk = ForgetfulDisk(rng)
        for name in sorted({*self._synced, *self._since}):
            choices = [self._synced.get(name), *self._since.get(name, [])]
            inode = rng.choice(choices)
            if inode is not None:
                data = _forget(inode, rng)
                disk._names[name] = _Inode(bytearray(data), data, len(data))
        disk._synced = dict(disk._names)
        return disk

    def damage(self, name: str, change: Callable[[bytearray], object]) -> None:
        """Change what is in a file, as a failing disk would."""
        inode = self._find(name)
        change(inode.now)
        inode.synced, inode.safe = bytes(inode.now), len(inode.now)

    def _find(self, name: str) -> _Inode:
        if name not in self._names:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        return self._names[name]

    def _bind(self, name: str, inode: _Inode | None) -> None:
        self._since.setdefault(name, []).append(inode)
        if inode is None:
            del self._names[name]
        else:
            self._names[name] = inode

    def _step(self, kind: str) -> None:
        number, self.operations = self.operations, self.operations + 1
        self.log.append(kind)
        self.trouble(number, kind)


class _File:
    """An open file of a `ForgetfulDisk`."""

    def __init__(self, disk: ForgetfulDisk, inode: _Inode, name: str) -> None:
        self._disk = disk
        self._inode = inode
        self._name = name
        self._closed = False

    def read(self) -> bytes:
        self._check()
        return bytes(self._inode.now)

    def write(self, data: bytes) -> None:
        self._check()
        inode = self._inode
        try:
            self._disk._step(f"write {self._name}")
        except Exception:
            inode.now += data[: self._disk._rng.randint(0, len(data))]
            raise
        inode.now += data

    def sync(self) -> None:
        self._check()
        inode = self._inode
        self._disk._step(f"sync {self._name}")
        inode.synced, inode.safe = bytes(inode.now), len(inode.now)

    def truncate(self, size: int) -> None:
        self._check()
        self._disk._step(f"truncate {self._name}")
        del self._inode.now[size:]
        self._inode.now.extend(bytes(size - len(self._inode.now)))
        self._inode.safe = min(self._inode.safe, size)

    def close(self) -> None:
        self._closed = True

    def _check(self) -> None:
        if self._closed:
            raise ValueError(f"{self._name} is closed")


def _forget(inode: _Inode, rng: random.Random) -> bytes:
    """Return what may be left of a file."""
    now, before = bytes(inode.now), inode.synced
    longest = max(len(now), len(before))
    if longest == inode.safe:
        return now
    mode = rng.choice(["nothing", "everything", "mixed"])
    if mode != "mixed":
        return before if mode == "nothing" else now
    found = bytearray(now[: inode.safe])
    # the first bytes of a file may share a sector with safe ones, which are not written again
    for start in range(inode.safe, longest, SECTOR_BYTES):
        stop = min(start + SECTOR_BYTES, longest)
        choices = [now[start:stop], before[start:stop], bytes(stop - start)]
        found += rng.choice([*choices, rng.randbytes(stop - start)]).ljust(stop - start, b"\0")
    # lengths that files have in between
    return bytes(found[: rng.choice([longest, len(now), rng.randint(inode.safe, longest)])])
