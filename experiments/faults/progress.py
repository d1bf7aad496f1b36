"""How a run comes along, as far as its files tell, while it lasts."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

from experiments.faults.witness import parse_acks

__all__ = ["Archive", "Progress"]

FIRST = f"snapshot-{0:020d}"
"""What the files of the snapshot that a state begins with are called."""

_SEGMENT = re.compile(r"log-\d{20}\.wal")


class Progress:
    """Follow the acknowledgements of all workers.

    Args:
        folder: holds their files.
    """

    def __init__(self, folder: Path) -> None:
        """Start with nothing read."""
        self._folder = folder
        self._read: dict[Path, int] = {}
        self.counts: Counter[tuple[str, int]] = Counter()
        """Acknowledgements by worker and shard."""
        self.last_s = 0.0
        """When the last one came, by the monotonic clock; 0 before the first."""
        self.longest_silence_s = 0.0
        """The longest time between two of them, whoever got them."""

    @property
    def total(self) -> int:
        """Acknowledgements so far."""
        return self.counts.total()

    def look(self) -> None:
        """Read what is new."""
        moments = []
        for path in self._folder.glob("*.acks"):
            for ack in parse_acks(self._news(path)):
                self.counts[path.stem, ack.shard] += 1
                moments.append(ack.at_us / 1e6)
        for moment in sorted(moments):
            if self.last_s:
                self.longest_silence_s = max(self.longest_silence_s, moment - self.last_s)
            self.last_s = max(self.last_s, moment)

    def _news(self, path: Path) -> bytes:
        start = self._read.get(path, 0)
        with open(path, "rb") as file:
            file.seek(start)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._read[path] = start + len(whole)
        return whole


class Archive:
    """Keep a shard's whole log, and the snapshot that it begins with, while the server cuts it.

    Segments are linked, not copied: what is appended later is in the archive as well, and a name
    that the server removes stays. A segment that was removed before it was linked leaves a gap,
    which reading the log reports.

    Args:
        state: the server's state directory.
        folder: where the links go; of the same file system.
    """

    def __init__(self, state: Path, folder: Path) -> None:
        """Start empty."""
        self._state = state
        self._folder = folder
        self._kept: dict[str, int] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def look(self) -> None:
        """Link what is new."""
        if not self._state.is_dir():
            return
        found = {e.name: e.inode() for e in os.scandir(self._state)}
        begun = f"{FIRST}.json" in found  # until then, a server that dies begins anew
        for name, inode in found.items():
            belongs = begun and name.startswith(f"{FIRST}.") and not name.endswith(".new")
            if (belongs or _SEGMENT.fullmatch(name)) and self._kept.get(name) != inode:
                link = self._folder / name
                try:
                    link.unlink(missing_ok=True)
                    os.link(self._state / name, link)
                except FileNotFoundError:  # removed meanwhile
                    continue
                self._kept[name] = inode
