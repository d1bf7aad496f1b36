"""The format of the log of requests: its records and the segments they are in.

The log is a row of records, each one request that changed the state; a record's number is its
position. It is cut into segments, files named after their first record. A segment begins with a
header, and its records follow one another without gaps, all little-endian:

    header: magic "DGSL", format u32, run u64, first position u64, crc32 u32 of these
    record: magic "DGSR", crc32 u32, payload's length u64, position u64, durable u64,
            incarnation u64, seq u64, worker u32, crc32 of the reply u32, method u8, payload

A record's checksum covers all that follows it and starts from the header's, so that no record
passes for one of another run or segment. `durable` is the position up to which the log was known
to be on the disk when the record was written. It tells the two kinds of bad bytes apart: a write
that was under way when the power failed, which nobody was promised, and damage to what was.
"""

from __future__ import annotations

import re
import struct
import zlib
from typing import Final, NamedTuple

__all__ = [
    "FORMAT",
    "HEADER_BYTES",
    "METHODS",
    "RECORD_BYTES",
    "RECORD_MAGIC",
    "Found",
    "FoundHeader",
    "Record",
    "check_record",
    "encode_record",
    "encode_segment_header",
    "find_header",
    "find_record",
    "first_of",
    "header_checksum",
    "peek_record",
    "segment_name",
]

FORMAT: Final = 1
METHODS: Final = ("Join", "PutModel", "Exchange", "Leave")
"""Requests that change the state; a record has the place in this row, from 1 on."""

_HEADER: Final = struct.Struct("<4sIQQ")  # then the checksum
_CHECKSUM: Final = struct.Struct("<I")
HEADER_BYTES: Final = _HEADER.size + _CHECKSUM.size
_START: Final = struct.Struct("<4sI")
_FIELDS: Final = struct.Struct("<QQQQQIIB")
RECORD_BYTES: Final = _START.size + _FIELDS.size
_MAGIC: Final = b"DGSL"
RECORD_MAGIC: Final = b"DGSR"
_NAME: Final = re.compile(r"log-(\d{20})\.wal")


class Record(NamedTuple):
    """One request that changed the state.

    Attributes:
        method: one of `METHODS`.
        worker: number of the worker, below 2**32.
        incarnation: of its session.
        seq: of the exchange; 0 where there is none.
        reply_crc: crc32 of the reply, to check that the request does again what it did.
        payload: the request as it came.
    """

    method: str
    worker: int
    incarnation: int
    seq: int
    reply_crc: int
    payload: bytes


def segment_name(first: int) -> str:
    """Return the name of the segment that begins with a record.

    Example:
        >>> segment_name(7)
        'log-00000000000000000007.wal'
    """
    return f"log-{first:020d}.wal"


def first_of(name: str) -> int | None:
    """Return the position of a segment's first record by the file's name, if it is one."""
    found = _NAME.fullmatch(name)
    return int(found[1]) if found else None


def encode_segment_header(run: int, first: int) -> bytes:
    """Return what a segment begins with."""
    start = _HEADER.pack(_MAGIC, FORMAT, run, first)
    return start + _CHECKSUM.pack(zlib.crc32(start))


def header_checksum(header: bytes | memoryview) -> int:
    """Return the checksum at the end of a segment's header; those of its records start from it."""
    checksum: int = _CHECKSUM.unpack_from(header, _HEADER.size)[0]
    return checksum


def encode_record(record: Record, position: int, durable: int, seed: int) -> tuple[bytes, bytes]:
    """Return a record's beginning and its payload, to be written one after the other.

    Args:
        record: what to write.
        position: its number.
        durable: position up to which the log is on the disk.
        seed: `header_checksum` of its segment.

    Raises:
        ValueError: it is not a record for a log; see `check_record`.
    """
    fields = _pack(record, position, durable)
    checksum = zlib.crc32(record.payload, zlib.crc32(fields, seed))
    return _START.pack(RECORD_MAGIC, checksum) + fields, record.payload


def check_record(record: Record) -> None:
    """Make sure that a record can be written.

    Raises:
        ValueError: the method is not one of `METHODS`, or a field does not fit.
    """
    _pack(record, 0, 0)


def _pack(record: Record, position: int, durable: int) -> bytes:
    if record.method not in METHODS:
        raise ValueError(f"{record.method} does not change the state; it is not for the log")
    try:
        return _FIELDS.pack(
            len(record.payload),
            position,
            durable,
            record.incarnation,
            record.seq,
            record.worker,
            record.reply_crc,
            1 + METHODS.index(record.method),
        )
    except struct.error as e:
        raise ValueError(f"a field of a record does not fit: {record[:-1]}") from e


class Found(NamedTuple):
    """A sound record in the file of a segment.

    Attributes:
        position: its number.
        durable: position up to which the log was on the disk when it was written.
        body: its bytes after the checksum.
        stop: offset in the file where it ends.
    """

    position: int
    durable: int
    body: memoryview
    stop: int

    def to_record(self) -> Record:
        """Copy the record out of the file."""
        _, _, _, incarnation, seq, worker, reply_crc, method = _FIELDS.unpack_from(self.body)
        payload = bytes(self.body[_FIELDS.size :])
        return Record(METHODS[method - 1], worker, incarnation, seq, reply_crc, payload)


class FoundHeader(NamedTuple):
    """The header of a segment, of any version.

    Attributes:
        version: of the format; where it is a newer one, what follows is not known.
        run: number of the server's state.
        first: position of the first record.
    """

    version: int
    run: int
    first: int


def find_header(view: memoryview) -> FoundHeader | str:
    """Return the header at the beginning of a file, or what is there instead."""
    if len(view) < HEADER_BYTES:
        return f"{len(view)} bytes of a header of {HEADER_BYTES}"
    magic, version, run, first = _HEADER.unpack_from(view)
    if magic != _MAGIC:
        return f"{magic!r}, not {_MAGIC!r},"
    if version <= FORMAT and zlib.crc32(view[: _HEADER.size]) != header_checksum(view):
        return "a header that does not match its checksum"
    return FoundHeader(version, run, first)


def find_record(view: memoryview, offset: int, seed: int) -> Found | str:
    """Return the record at an offset, or what is there instead.

    Args:
        view: all of a segment.
        offset: where the record is to begin, in bytes.
        seed: `header_checksum` of the segment.
    """
    left = len(view) - offset
    if left < RECORD_BYTES:
        return f"{left} bytes of a record's first {RECORD_BYTES}"
    magic, checksum = _START.unpack_from(view, offset)
    if magic != RECORD_MAGIC:
        return f"{magic!r}, not {RECORD_MAGIC!r},"
    length, position, durable, *_, method = _FIELDS.unpack_from(view, offset + _START.size)
    if length > left - RECORD_BYTES:
        return f"{left} bytes of a record of {RECORD_BYTES + length}"
    stop = offset + RECORD_BYTES + length
    body = view[offset + _START.size : stop]
    if zlib.crc32(body, seed) != checksum or not 1 <= method <= len(METHODS):
        return "a record that does not match its checksum"
    return Found(position, durable, body, stop)


def peek_record(view: memoryview, offset: int) -> tuple[int, int] | None:
    """Return what would be position and `durable` of a record at an offset; nothing is checked."""
    if len(view) - offset < RECORD_BYTES:
        return None
    _, position, durable, *_ = _FIELDS.unpack_from(view, offset + _START.size)
    return position, durable
