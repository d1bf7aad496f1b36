"""A state directory to try things on: it begins as another one, and changes stay in memory."""

from __future__ import annotations

import errno
import os

from dgs.storage.disk import Disk, DiskFile, check_name

__all__ = ["ScratchDisk"]


class ScratchDisk:
    """Stand in for a folder that is not to be changed.

    What the real recovery and the real repair make of a folder can so be seen beforehand.

    Args:
        disk: the folder; read when one of its files is, and never changed.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from dgs.storage.disk import FolderDisk
        >>> with tempfile.TemporaryDirectory() as folder, FolderDisk(Path(folder)) as disk:
        ...     disk.open("a").close()
        ...     scratch = ScratchDisk(disk)
        ...     scratch.rename("a", "b")
        ...     scratch.open("b").write(b"new")
        ...     scratch.names(), scratch.open("b").read(), disk.names()
        (['b'], b'new', ['a'])
    """

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        # what a file holds: the bytes, or the name of the folder's file that has them
        self._files: dict[str, bytearray | str] = {name: name for name in disk.names()}

    @property
    def label(self) -> str:
        """What messages call the folder."""
        return self._disk.label

    def names(self) -> list[str]:
        """Return the names of the files, sorted."""
        return sorted(self._files)

    def open(self, name: str) -> DiskFile:
        """Open a file, which is created where it is not there."""
        self._files.setdefault(check_name(name), bytearray())
        return _ScratchFile(self, name)

    def rename(self, old: str, new: str) -> None:
        """Give a file another name, in place of any file that had it."""
        self._find(check_name(old))
        self._files[check_name(new)] = self._files.pop(old)

    def remove(self, name: str) -> None:
        """Remove a file."""
        self._find(check_name(name))
        del self._files[name]

    def sync(self) -> None:
        """Do nothing: nothing is to last."""

    def read(self, name: str) -> bytes:
        """Return what a file holds."""
        held = self._find(name)
        if not isinstance(held, str):
            return bytes(held)
        if held not in self._disk.names():  # opening would create it
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), held)
        file = self._disk.open(held)
        try:
            return file.read()
        finally:
            file.close()

    def edit(self, name: str) -> bytearray:
        """Return a file's bytes, to be changed."""
        held = self._find(name)
        if isinstance(held, str):
            held = self._files[name] = bytearray(self.read(name))
        return held

    def _find(self, name: str) -> bytearray | str:
        if name not in self._files:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        return self._files[name]


class _ScratchFile:
    """A file of a scratch disk."""

    def __init__(self, disk: ScratchDisk, name: str) -> None:
        self._disk = disk
        self._name = name

    def read(self) -> bytes:
        return self._disk.read(self._name)

    def write(self, data: bytes) -> None:
        self._disk.edit(self._name).extend(data)

    def sync(self) -> None:
        pass

    def truncate(self, size: int) -> None:
        del self._disk.edit(self._name)[size:]

    def close(self) -> None:
        pass
