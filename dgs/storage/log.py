"""The log of requests as a server writes it: many records, one write, one sync."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from typing import Final

from dgs.errors import StateError
from dgs.storage.disk import Disk, DiskFile, explained
from dgs.storage.records import (
    HEADER_BYTES,
    RECORD_BYTES,
    Record,
    check_record,
    encode_record,
    encode_segment_header,
    header_checksum,
    segment_name,
)
from dgs.storage.wal import SegmentFile, list_segments, read_log

__all__ = ["Log", "read_log"]

_ASIDE: Final = ".new"


class Log:
    """The end of a log, to which records are appended; made by `create` or `open`.

    Any thread may append while another one commits; commit, rotate, cut and close wait for each
    other.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from dgs.storage.disk import FolderDisk
        >>> from dgs.storage.wal import read_log
        >>> with tempfile.TemporaryDirectory() as folder, FolderDisk(Path(folder)) as disk:
        ...     log = Log.create(disk, run=1, position=0)
        ...     _ = log.append(Record("Exchange", 0, 1, 1, 0, b"frame"))
        ...     log.position, log.durable, log.commit(), log.durable
        ...     log.close()
        ...     [record.payload for record in read_log(disk, run=1, start=0)]
        (1, 0, 1, 1)
        [b'frame']
    """

    def __init__(self, disk: Disk, run: int, position: int) -> None:
        self._disk = disk
        self._run = run
        self._writing = threading.RLock()  # the file, and all that is said of it
        self._appending = threading.Lock()  # what is pending
        self._pending: deque[Record] = deque()
        self._pending_bytes = 0
        self._durable = position
        self._firsts = list_segments(disk)
        self._file: DiskFile | None = None
        self._seed = 0
        self._size = 0
        self._failed = ""

    @classmethod
    def create(cls, disk: Disk, run: int, position: int) -> Log:
        """Begin a log where there is none yet.

        Args:
            disk: where it is to be.
            run: number of the server's state, below 2**64.
            position: of the first record to come.

        Raises:
            StateError: there is a log, or the disk fails.
        """
        with explained(disk, "begin a log"):
            log = cls(disk, run, position)
            if log._firsts:
                raise StateError(
                    f"{disk.label} holds a log already, {segment_name(log._firsts[0])}; open that "
                    "one, or name another folder with --state-dir"
                )
            log._begin()
        return log

    @classmethod
    def open(cls, disk: Disk, run: int, position: int) -> Log:
        """Go on with a log that was read to its end; a torn write after that is cut off.

        Args:
            disk: where it is.
            run: number of the server's state.
            position: `LogContents.end`, after all records were read.

        Raises:
            StateError: the log does not end there, or the disk fails.
        """
        with explained(disk, "open the log"):
            log = cls(disk, run, position)
            try:
                if not log._go_on():
                    log._begin()
            except BaseException:
                log.close()
                raise
        return log

    @property
    def position(self) -> int:
        """Position after the last record appended."""
        with self._appending:
            return self._durable + len(self._pending)

    @property
    def durable(self) -> int:
        """Position up to which all records survive a loss of power."""
        return self._durable

    @property
    def size_bytes(self) -> int:
        """Length of the segment at the end of the log, with what is pending.

        What was rotated away does not count: a snapshot of that position makes up for it.
        """
        with self._appending:
            return self._size + self._pending_bytes

    @property
    def failed(self) -> str:
        """Why the log can never be written again; empty as long as it can."""
        return self._failed

    def append(self, record: Record) -> int:
        """Add a record, in memory only, and return the position after it.

        Raises:
            ValueError: the record is not one for a log; nothing was added.
        """
        check_record(record)
        with self._appending:
            self._pending.append(record)
            self._pending_bytes += RECORD_BYTES + len(record.payload)
            return self._durable + len(self._pending)

    def commit(self) -> int:
        """Write and sync all that was appended before the call; return the durable position.

        Raises:
            StateError: it could not be written, and may be tried again; or `failed` says why not.
        """
        with self._writing:
            file = self._check()
            with self._appending:
                batch = list(self._pending)
            if batch:
                data = self._encode(batch)
                self._put(file, data)
                self._settle(batch, len(data))
            return self._durable

    def rotate(self) -> None:
        """Commit, and begin a new segment, unless the last one is still empty.

        Raises:
            StateError: the disk fails; the log goes on as before, or `failed` says why not.
        """
        with self._writing:
            self.commit()
            if self._durable == self._firsts[-1]:
                return
            with explained(self._disk, "begin a new segment of the log"):
                self._begin()

    def cut(self, position: int) -> None:
        """Remove the segments that end at or before a position; never the last one.

        Raises:
            StateError: the disk fails; some may be left, and go the next time.
        """
        with self._writing, explained(self._disk, "remove old segments of the log"):
            while len(self._firsts) > 1 and self._firsts[1] <= position:
                with contextlib.suppress(FileNotFoundError):
                    self._disk.remove(segment_name(self._firsts[0]))
                del self._firsts[0]
            self._disk.sync()

    def close(self) -> None:
        """Close the file; what is pending is not written."""
        with self._writing:
            file, self._file = self._file, None
            if file is not None:
                file.close()

    def _check(self) -> DiskFile:
        """Return the file, unless it is not to be written."""
        if self._failed:
            raise StateError(self._failed)
        if self._file is None:
            raise StateError(f"the log in {self._disk.label} is closed")
        return self._file

    def _encode(self, batch: list[Record]) -> bytes:
        parts: list[bytes] = []
        for position, record in enumerate(batch, self._durable):
            parts += encode_record(record, position, self._durable, self._seed)
        return b"".join(parts)

    def _put(self, file: DiskFile, data: bytes) -> None:
        """Write and sync, or leave the file as it was, or fail for good."""
        doing = "write"
        try:
            file.write(data)
            doing = "sync"
            file.sync()
        except OSError as e:
            why = f"cannot {doing} the log in {self._disk.label}: {e.strerror or e}"
            if doing == "write" and self._cut_back(file):
                raise StateError(f"{why}; make room or mend the disk, it is tried again") from e
            self._fail(why)
            raise StateError(self._failed) from e
        except BaseException:
            self._fail(f"interrupted in the {doing} of the log in {self._disk.label}")
            raise

    def _cut_back(self, file: DiskFile) -> bool:
        """Take back what a failed write left; tell whether that worked."""
        try:
            file.truncate(self._size)
        except OSError:
            return False
        return True

    def _fail(self, why: str) -> None:
        self._failed = f"{why}; what the disk has is not known: restart the server, it reads it"

    def _settle(self, batch: list[Record], written_bytes: int) -> None:
        """Note that a batch is durable."""
        with self._appending:
            for _ in batch:
                self._pending.popleft()
            self._pending_bytes -= written_bytes
            self._size += written_bytes
            self._durable += len(batch)

    def _begin(self) -> None:
        """Make a new segment at the durable position, and write there from now on."""
        name = segment_name(self._durable)
        header = encode_segment_header(self._run, self._durable)
        self._write_aside(name + _ASIDE, header)
        try:
            self._disk.rename(name + _ASIDE, name)
            self._disk.sync()
            self._take(name, header, HEADER_BYTES)
            self._firsts = list_segments(self._disk)
        except OSError as e:
            self._fail(f"cannot publish {name} in {self._disk.label}: {e.strerror or e}")
            raise

    def _write_aside(self, name: str, header: bytes) -> None:
        """Make a file that counts only once it has its name; without it nothing has changed."""
        try:
            with contextlib.closing(self._disk.open(name)) as file:
                file.truncate(0)
                file.write(header)
                file.sync()
        except OSError:
            with contextlib.suppress(OSError):
                self._disk.remove(name)
            raise

    def _take(self, name: str, header: bytes, size: int) -> None:
        """Write to a segment from now on."""
        file = self._disk.open(name)
        if self._file is not None:
            self._file.close()
        self._file = file
        self._seed = header_checksum(header)
        with self._appending:
            self._size = size

    def _go_on(self) -> bool:
        """Take the last segment, if it ends where the log goes on."""
        if not self._firsts:
            return False
        first = self._firsts[-1]
        segment = SegmentFile(self._disk, self._run, first)
        for _ in segment.walk(last=True):
            pass
        if segment.end > self._durable:
            raise StateError(
                f"the log in {self._disk.label} ends with record {segment.end}, not "
                f"{self._durable}: read it to its end before it is written"
            )
        if segment.end < self._durable or not segment.good_bytes:
            return False
        self._take(segment_name(first), encode_segment_header(self._run, first), segment.good_bytes)
        file = self._check()
        if segment.torn:
            file.truncate(segment.good_bytes)
        # read, but maybe never synced: the records count as durable from here on
        file.sync()
        self._disk.sync()
        return True
