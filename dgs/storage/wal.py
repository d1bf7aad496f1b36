"""Reading the log of requests after anything may have happened to it.

`dgs.storage.records` has the format. What a lost write left at the end is told apart from damage
to what was on the disk: later records tell what was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from dgs.errors import StateError
from dgs.storage.disk import Disk, explained, remedy
from dgs.storage.records import (
    FORMAT,
    HEADER_BYTES,
    RECORD_BYTES,
    RECORD_MAGIC,
    Found,
    Record,
    encode_segment_header,
    find_header,
    find_record,
    first_of,
    header_checksum,
    peek_record,
    segment_name,
)

__all__ = ["LogContents", "Record", "SegmentFile", "list_segments", "read_log"]


def list_segments(disk: Disk) -> list[int]:
    """Return the first positions of the segments, in order.

    Raises:
        OSError: the disk fails.
    """
    firsts = map(first_of, disk.names())
    return [first for first in firsts if first is not None]


class SegmentFile:
    """A segment as it is on the disk, read whole.

    Args:
        disk: where it is.
        run: number of the server's state.
        first: position of its first record.

    Raises:
        StateError: it cannot be read, or is of another run or a newer release.

    Attributes:
        end: position after the last sound record that was walked over.
        good_bytes: length of the header and these records; 0 where the header is not sound.
        torn: what is wrong with the bytes after these, where a write did not get to its end.
    """

    def __init__(self, disk: Disk, run: int, first: int) -> None:
        self.end = first
        self.good_bytes = 0
        self.torn = ""
        self._disk = disk
        self._name = segment_name(first)
        self._header = encode_segment_header(run, first)
        self._seed = header_checksum(self._header)
        with explained(disk, f"read {self._name}"), contextlib.closing(disk.open(self._name)) as f:
            self._data = f.read()
        self._view = memoryview(self._data)
        self._fault = self._header_fault(run, first)

    def walk(self, *, last: bool) -> Iterator[Found]:
        """Yield the sound records, up to the end or to what a torn write left.

        Args:
            last: whether no segment follows; where one does, all of this one was durable.

        Raises:
            StateError: bytes that were durable are damaged.
        """
        why = "" if last else "the log goes on in another file, begun when all of this was durable"
        if self._fault:
            later = self._find_durable(-1, 0)
            self._settle(0, self._fault, why or _says(later, "a sound record"))
            return
        self.good_bytes = HEADER_BYTES
        while self.good_bytes < len(self._view):
            found = find_record(self._view, self.good_bytes, self._seed)
            if isinstance(found, str):
                later = self._find_durable(self.good_bytes, self.end + 1)
                why = why or _says(later, "a later record that calls this one durable")
                self._settle(self.good_bytes, found, why)
                return
            if found.position != self.end:
                self._settle(self.good_bytes, f"record {found.position}", "it is sound but alien")
            yield found
            self.end, self.good_bytes = found.position + 1, found.stop

    def _settle(self, offset: int, found: str, durable: str) -> None:
        """Take bad bytes for a torn write, unless there is a reason why they were durable."""
        place = f"{self._disk.label}/{self._name}, byte {offset}"
        self.torn = f"{place}: {found} in place of record {self.end}"
        if durable:
            raise StateError(f"{self.torn}; {durable}, so it is damaged: {remedy(self._disk)}")

    def _header_fault(self, run: int, first: int) -> str:
        """Return what is wrong with the header, if anything."""
        if self._view[:HEADER_BYTES] == self._header:
            return ""
        found = find_header(self._view)
        if isinstance(found, str):
            return found
        if found.version > FORMAT:
            raise StateError(
                f"{self._disk.label}/{self._name} was written by a newer release: it has format "
                f"{found.version}, this one reads up to {FORMAT}; start the release that wrote it"
            )
        raise StateError(
            f"{self._disk.label}/{self._name} is of run {found.run} from record {found.first} on, "
            f"expected run {run} from record {first} on: files of different servers were mixed; "
            "put back those of this one, or name another folder with --state-dir"
        )

    def _find_durable(self, offset: int, least: int) -> int | None:
        """Return where, beyond an offset, a sound record calls that many records durable."""
        while (offset := self._data.find(RECORD_MAGIC, offset + 1)) >= 0:
            if self._claims(offset, least) and isinstance(
                find_record(self._view, offset, self._seed), Found
            ):
                return offset
        return None

    def _claims(self, offset: int, least: int) -> bool:
        """Tell whether it may be worth the time to check what looks like a record."""
        claim = peek_record(self._view, offset)
        if claim is None:
            return False
        position, durable = claim
        most = self.end + len(self._view) // RECORD_BYTES
        return least <= durable <= position <= most


class LogContents:
    """The records of a log from one position on; made by `read_log`.

    Iterating reads one segment at a time. The attributes are those of the last iteration, and tell
    about the whole log once it has ended.

    Attributes:
        end: position after the last record.
        torn: what the last write left where it did not get to its end; empty if it did.
    """

    def __init__(self, disk: Disk, run: int, start: int) -> None:
        self.end = start
        self.torn = ""
        self._disk = disk
        self._run = run
        self._start = start

    def __iter__(self) -> Iterator[Record]:
        """Yield the records in order, the first one that of `start`.

        Raises:
            StateError: the log cannot be read, is damaged, or does not go back to `start`.
        """
        self.end, self.torn = self._start, ""
        firsts = self._choose()
        end = firsts[0] if firsts else self._start
        for first in firsts:
            if first != end:
                raise self._gap(f"{segment_name(first)} begins with record {first}", end)
            segment = SegmentFile(self._disk, self._run, first)
            for found in segment.walk(last=first == firsts[-1]):
                self.end = max(self._start, found.position + 1)
                if found.position >= self._start:
                    yield found.to_record()
            end, self.torn = segment.end, segment.torn

    def _choose(self) -> list[int]:
        """Return the segments to read: that which holds the first record wanted, and all later."""
        with explained(self._disk, "list the files"):
            firsts = list_segments(self._disk)
        earlier = sum(first <= self._start for first in firsts)
        if firsts and not earlier:
            raise self._gap(f"the log begins with record {firsts[0]}", self._start)
        if self._start and not firsts:
            raise self._gap("there is no log", self._start)
        return firsts[max(0, earlier - 1) :]

    def _gap(self, found: str, wanted: int) -> StateError:
        return StateError(
            f"{self._disk.label}: {found}, expected it to go on with record {wanted}: files are "
            f"missing; put them back, or {remedy(self._disk)}"
        )


def read_log(disk: Disk, run: int, start: int) -> LogContents:
    """Return the records from a position on, in order, without a gap; changes nothing.

    A torn write at the end of the log is reported, not an error: nobody was told that it was done.

    Args:
        disk: where the log is.
        run: number of the server's state; another one in the log is an error.
        start: position of the first record wanted.
    """
    return LogContents(disk, run, start)


def _says(offset: int | None, what: str) -> str:
    return "" if offset is None else f"at byte {offset} there is {what}"
