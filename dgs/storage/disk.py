"""The files of a state directory, as the log and the snapshots see them: one flat folder.

Bytes are durable once their file was synced, names once the disk was. Until then a power loss may
take them, in part and in any order. `FolderDisk` is a real folder; anything else that keeps these
two protocols, such as a disk that forgets on purpose, does as well.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol

from dgs.errors import StateError

__all__ = ["LOCK", "Disk", "DiskFile", "FolderDisk", "check_name", "explained", "remedy"]

LOCK: Final = "LOCK"
"""File that the process using a folder holds locked; not among the disk's names."""


class DiskFile(Protocol):
    """A file that grows at its end. Everything raises `OSError` where the disk fails."""

    def read(self) -> bytes:
        """Return everything that is in the file."""

    def write(self, data: bytes) -> None:
        """Append all of `data`; where that fails, part of it may be there."""

    def sync(self) -> None:
        """Make the bytes durable. After a failure nothing is known of what was not yet."""

    def truncate(self, size: int) -> None:
        """Drop what lies beyond the first `size` bytes; durable after the next sync."""

    def close(self) -> None:
        """Free the file, once or more often; says nothing about durability."""


class Disk(Protocol):
    """One flat folder of files. Everything raises `OSError` where the disk fails."""

    @property
    def label(self) -> str:
        """What messages call the folder, such as its path."""

    def names(self) -> list[str]:
        """Return the names of the files, sorted."""

    def open(self, name: str) -> DiskFile:
        """Open a file, which is created where it is not there."""

    def rename(self, old: str, new: str) -> None:
        """Give a file another name, at once, in place of any file that had it."""

    def remove(self, name: str) -> None:
        """Remove a file."""

    def sync(self) -> None:
        """Make the names durable: creations, renames and removals."""


def check_name(name: str) -> str:
    """Return the name of a file, if it is one and no path.

    Raises:
        ValueError: it is empty, leads out of the folder, or is the lock's.

    Example:
        >>> check_name("log.wal")
        'log.wal'
        >>> check_name("../log.wal")
        Traceback (most recent call last):
            ...
        ValueError: '../log.wal' does not name a file of a flat folder
    """
    if name in ("", ".", "..", LOCK) or any(c in name for c in ("/", "\\", "\0")):
        raise ValueError(f"{name!r} does not name a file of a flat folder")
    return name


def remedy(disk: Disk) -> str:
    """Return what to do about damaged files, for the end of a message."""
    return (
        f"run 'dgs snapshot repair --state-dir {disk.label}' to go on with what is sound, or "
        f"'dgs snapshot export --state-dir {disk.label} --out FILE' to save the model"
    )


@contextlib.contextmanager
def explained(disk: Disk, doing: str) -> Iterator[None]:
    """Turn what a disk raises into a `StateError`.

    Args:
        disk: whose trouble it is.
        doing: what was tried, such as "read log.wal".
    """
    try:
        yield
    except OSError as e:
        raise StateError(f"cannot {doing} in {disk.label}: {e.strerror or e}") from e


class FolderDisk:
    """A folder of this machine, locked against every other process for as long as it is open.

    Args:
        path: the folder.
        create: whether to make it, and its parents, where it is not there.
        lock: whether to lock it. Without the lock its files can be read only, and may vanish or
            grow meanwhile.

    Raises:
        StateError: the folder is not there, in use, or not to be written by this user.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as parent, FolderDisk(Path(parent, "ps")) as disk:
        ...     file = disk.open("a")
        ...     file.write(b"kept")
        ...     file.sync(), disk.sync(), file.read(), file.close(), disk.names()
        (None, None, b'kept', None, ['a'])
    """

    def __init__(self, path: Path, *, create: bool = True, lock: bool = True) -> None:
        self._path = Path(path)
        self._reads_only = not lock
        self._folder = self._lock = -1
        try:
            if create:
                _make_folder(self._path.absolute())
            self._folder = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if lock:
                self._lock = self._open(LOCK)
                self._take_lock()
        except OSError as e:
            self.close()
            raise StateError(
                f"cannot use {self._path} as a state directory: {e.strerror}; name a folder that "
                f"this user may {'write' if lock else 'read'} with --state-dir"
            ) from e
        except StateError:
            self.close()
            raise

    @property
    def path(self) -> Path:
        """The folder."""
        return self._path

    @property
    def label(self) -> str:
        """The folder's path."""
        return str(self._path)

    def names(self) -> list[str]:
        """Return the names of the regular files, sorted, without the lock's."""
        with os.scandir(self._fd()) as entries:
            found = [entry.name for entry in entries if entry.is_file(follow_symlinks=False)]
        return sorted(name for name in found if name != LOCK)

    def open(self, name: str) -> DiskFile:
        """Open a file, which is created where it is not there, readable by its owner only.

        Without the lock, a file that is not there raises `FileNotFoundError`.
        """
        return _FolderFile(self._open(check_name(name)), "r" if self._reads_only else "a+")

    def rename(self, old: str, new: str) -> None:
        """Give a file another name, at once, in place of any file that had it."""
        source, target = check_name(old), check_name(new)
        self._check_locked()
        os.replace(source, target, src_dir_fd=self._fd(), dst_dir_fd=self._fd())

    def remove(self, name: str) -> None:
        """Remove a file."""
        check_name(name)
        self._check_locked()
        os.unlink(name, dir_fd=self._fd())

    def sync(self) -> None:
        """Make the names durable."""
        os.fsync(self._fd())

    def close(self) -> None:
        """Let others use the folder; every later call but this one raises `OSError`."""
        if self._lock >= 0:
            with contextlib.suppress(OSError):  # a forked child may have the same lock open
                fcntl.flock(self._lock, fcntl.LOCK_UN)
            os.close(self._lock)
        if self._folder >= 0:
            os.close(self._folder)
        self._folder = self._lock = -1

    def __enter__(self) -> FolderDisk:
        """Return the disk."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the disk."""
        self.close()

    def _fd(self) -> int:
        if self._folder < 0:  # which some of the system's calls take for the working directory
            raise OSError(errno.EBADF, os.strerror(errno.EBADF), self.label)
        return self._folder

    def _check_locked(self) -> None:
        if self._reads_only:
            raise OSError(errno.EROFS, "opened for reading only, without the lock", self.label)

    def _open(self, name: str) -> int:
        flags = os.O_RDONLY if self._reads_only else os.O_RDWR | os.O_CREAT | os.O_APPEND
        return os.open(name, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=self._fd())

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            holder = os.pread(self._lock, 20, 0).decode("ascii", "replace").strip()
            raise StateError(
                f"{self._path} is in use by process {holder or 'unknown'}; stop that one first, or "
                "name another folder with --state-dir"
            ) from e
        os.ftruncate(self._lock, 0)
        os.write(self._lock, f"{os.getpid()}\n".encode())


class _FolderFile:
    """A file of a folder."""

    def __init__(self, fd: int, mode: str) -> None:
        self._file = io.FileIO(fd, mode)

    def read(self) -> bytes:
        # from the disk, not from memory: what a failed sync left there looks written, but is not
        if hasattr(os, "posix_fadvise"):
            self.sync()
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._file.seek(0)
        return self._file.readall()

    def write(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[self._file.write(left) :]

    def sync(self) -> None:
        sync = getattr(os, "fdatasync", os.fsync)
        sync(self._file.fileno())

    def truncate(self, size: int) -> None:
        self._file.truncate(size)

    def close(self) -> None:
        self._file.close()


def _make_folder(path: Path) -> None:
    """Make a folder and its parents, each durable in the one it is in."""
    if path.is_dir():
        return
    _make_folder(path.parent)
    path.mkdir(mode=0o700, exist_ok=True)
    above = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(above)
    finally:
        os.close(above)
