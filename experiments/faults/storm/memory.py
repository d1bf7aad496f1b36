"""A disk in memory on which nothing fails: what a killed process has written is there."""

from __future__ import annotations

__all__ = ["MemoryDisk"]


class MemoryDisk:
    """A flat folder; see `dgs.storage.disk.Disk`.

    Example:
        >>> disk = MemoryDisk()
        >>> disk.open("a").write(b"1")
        >>> disk.rename("a", "b")
        >>> disk.names(), disk.open("b").read()
        (['b'], b'1')
    """

    label = "the disk in memory"

    def __init__(self) -> None:
        """Start empty."""
        self._files: dict[str, bytearray] = {}

    def names(self) -> list[str]:
        """Return the names of the files, sorted."""
        return sorted(self._files)

    def open(self, name: str) -> _File:
        """Open a file, which is created where it is not there."""
        return _File(self._files.setdefault(name, bytearray()))

    def rename(self, old: str, new: str) -> None:
        """Give a file another name."""
        self._files[new] = self._files.pop(old)

    def remove(self, name: str) -> None:
        """Remove a file."""
        del self._files[name]

    def sync(self) -> None:
        """Do nothing: kills take processes, not power."""

    def close(self) -> None:
        """Do nothing."""


class _File:
    def __init__(self, data: bytearray) -> None:
        self._data = data

    def read(self) -> bytes:
        return bytes(self._data)

    def write(self, data: bytes) -> None:
        self._data += data

    def sync(self) -> None:
        pass

    def truncate(self, size: int) -> None:
        del self._data[size:]

    def close(self) -> None:
        pass
