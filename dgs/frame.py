"""Frames: how model data travels, one per direction of an exchange; specified in `WIRE.md`.

A frame is a fixed little-endian header, a body, a tail and a cursor. The header says for whom it
is, what it means and how long it is; the body holds coordinates (`dgs.codec`), the tail dense
float32 values that are not trained, the cursor what a user wants kept with an update. One checksum
covers everything. Reading makes views and copies nothing.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from dgs.codec import max_body_bytes
from dgs.config import Values
from dgs.errors import ChecksumError, MalformedError, TooLargeError
from dgs.quantize import VALUE_KINDS, payload_bytes

__all__ = [
    "HEADER_BYTES",
    "MAGIC",
    "MAX_CURSOR_BYTES",
    "WIRE_VERSION",
    "Frame",
    "FrameKind",
    "Header",
    "decode_frame",
    "encode_frame",
    "frame_checksum",
    "max_frame_bytes",
    "peek_header",
    "restamp",
]

Buffer = bytes | bytearray | memoryview
Payload = Buffer | npt.NDArray[np.float32]

MAGIC: Final = b"DGSF"
WIRE_VERSION: Final = 1
HEADER_BYTES: Final = 96
MAX_CURSOR_BYTES: Final = 4096

_FIELDS: Final = struct.Struct("<4sBBBBIHHQQQQQQIIQQI")  # then the checksum
_CHECKSUM: Final = struct.Struct("<I")
_INCARNATION: Final = slice(24, 32)
_SET: Final = 1
_HASH: Final = 2


class FrameKind(IntEnum):
    """What a frame carries."""

    UPDATE = 1
    """From a worker: what to subtract from the model."""

    DIFFERENCE = 2
    """To a worker: what to change in its replica."""

    MODEL = 3
    """Either way: every coordinate, as raw float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """The fields of a frame's header, without magic and checksum."""

    kind: FrameKind
    """What the frame carries."""

    values: Values
    """How the body's values are coded."""

    worker_id: int = 0
    """Number that the server gave the worker."""

    member: int = 0
    """Position of the sender or receiver in the worker's group."""

    shard: int = 0
    """Part of the model that the server holds."""

    run: int = 0
    """Number of the server's state, from Join."""

    incarnation: int = 0
    """Number of the worker's session; the newest wins."""

    seq: int = 0
    """Number of the exchange in the session."""

    version: int = 0
    """Updates applied: when the worker was last answered (UPDATE), after this update (DIFFERENCE),
    or to this model (MODEL)."""

    size: int
    """Coordinates of the session on this shard (N), the tail not counted."""

    nnz: int
    """Entries of the body; equal to `size` for MODEL."""

    staleness: int = 0
    """Updates applied between the worker's last answer and this one; 0 unless DIFFERENCE."""

    replaces: bool = False
    """Whether values take the place of what the receiver has, instead of being added to it; the
    SET flag, for DIFFERENCE only."""

    hash: int | None = None
    """Hash of the replica after this frame, or None if the frame has none."""

    tail: int = 0
    """Float32 values in the tail; `encode_frame` sets it."""

    body_bytes: int = 0
    """Length of the body; `encode_frame` sets it."""

    cursor_bytes: int = 0
    """Length of the cursor, 0 unless UPDATE; `encode_frame` sets it."""

    @property
    def frame_bytes(self) -> int:
        """Return the length of the whole frame."""
        return HEADER_BYTES + self.body_bytes + 4 * self.tail + self.cursor_bytes


class Frame(NamedTuple):
    """A frame that was read; body, tail and cursor are views of the bytes it was read from.

    Attributes:
        header: the fields.
        body: input of `dgs.codec.decode_body`, or N raw float32 for MODEL.
        tail: float32, not aligned in memory; may be NaN or infinite, the caller's to check.
        cursor: what the worker wants kept with its update, opaque; at most `MAX_CURSOR_BYTES`.
    """

    header: Header
    body: memoryview
    tail: npt.NDArray[np.float32]
    cursor: memoryview


def encode_frame(header: Header, body: Payload, tail: Payload = b"", cursor: bytes = b"") -> bytes:
    """Make a frame; the lengths in `header` are replaced by the right ones.

    Args:
        header: the fields.
        body: bytes from `dgs.codec.encode_body`, or N float32 for MODEL.
        tail: float32 values, as an array or as little-endian bytes.
        cursor: what to keep with an UPDATE, at most `MAX_CURSOR_BYTES`; none for other kinds.

    Raises:
        MalformedError: the header contradicts itself or the body; see `WIRE.md`.

    Example:
        >>> header = Header(kind=FrameKind.MODEL, values="float32", size=2, nnz=2)
        >>> frame = encode_frame(header, np.ones(2, np.float32))
        >>> len(frame), decode_frame(frame).header.body_bytes
        (104, 8)
    """
    body, tail = _to_view(body), _to_view(tail)
    if tail.nbytes % 4:
        raise MalformedError(f"a tail of {tail.nbytes} bytes does not hold whole float32 values")
    header = replace(
        header, body_bytes=body.nbytes, tail=tail.nbytes // 4, cursor_bytes=len(cursor)
    )
    _check(header)
    start = _pack(header)
    checksum = zlib.crc32(cursor, zlib.crc32(tail, zlib.crc32(body, zlib.crc32(start))))
    return b"".join((start, _CHECKSUM.pack(checksum), body, tail, cursor))


def decode_frame(data: Buffer, *, max_size: int | None = None) -> Frame:
    """Read a frame and check its form, its length and its checksum, but not its body.

    Args:
        data: one whole frame.
        max_size: longest frame to accept, in bytes.

    Raises:
        MalformedError: the bytes are not a frame, or the header contradicts itself.
        ChecksumError: the bytes were damaged on the way; sending them again may help.
        TooLargeError: the frame is longer than `max_size`.
    """
    view = memoryview(data).cast("B")
    raw = _unpack(view)
    _check_limit(view.nbytes, max_size)
    checksum = zlib.crc32(view[HEADER_BYTES:], zlib.crc32(view[: _FIELDS.size]))
    # before anything the header says is believed: what was damaged or cut short may be sent again
    if _CHECKSUM.unpack_from(view, _FIELDS.size)[0] != checksum:
        raise ChecksumError(
            f"the checksum of a frame does not match its {view.nbytes} bytes; send it again"
        )
    if view.nbytes != raw.frame_bytes:
        raise MalformedError(f"{view.nbytes} bytes received of a frame of {raw.frame_bytes}")
    header = _to_header(raw)
    _check(header)
    stop = HEADER_BYTES + header.body_bytes
    end = stop + 4 * header.tail
    tail = np.frombuffer(view[stop:end], "<f4")
    return Frame(header, view[HEADER_BYTES:stop], tail, view[end:])


def peek_header(data: Buffer, *, max_size: int | None = None) -> Header:
    """Read the header of a frame of which at least the first 96 bytes are there.

    Neither length nor checksum is verified: it is for deciding whether to go on receiving.

    Args:
        data: the beginning of a frame.
        max_size: longest frame to accept, in bytes.

    Raises:
        MalformedError: the bytes do not begin a frame, or the header contradicts itself.
        TooLargeError: the header announces a frame longer than `max_size`.
    """
    raw = _unpack(memoryview(data).cast("B"))
    _check_limit(raw.frame_bytes, max_size)
    header = _to_header(raw)
    _check(header)
    return header


def max_frame_bytes(size: int, num_segments: int, tail: int) -> int:
    """Return the most bytes that a valid frame can have, of any kind: what a reader must accept.

    Args:
        size: coordinates of the session on the shard, the tail not counted.
        num_segments: segments of these, empty ones included.
        tail: values of the tail. A MODEL that holds them in its body is not longer.

    Example:
        >>> max_frame_bytes(10**6, 4, 0) - HEADER_BYTES
        6880098
    """
    return HEADER_BYTES + max_body_bytes(size, num_segments) + 4 * tail + MAX_CURSOR_BYTES


def frame_checksum(data: Buffer) -> int:
    """Return the checksum that a frame carries, unverified.

    Example:
        >>> header = Header(kind=FrameKind.MODEL, values="float32", size=0, nnz=0)
        >>> frame_checksum(encode_frame(header, b"")) == zlib.crc32(encode_frame(header, b"")[:92])
        True
    """
    return int(_CHECKSUM.unpack_from(data, _FIELDS.size)[0])


def restamp(data: Buffer, incarnation: int) -> bytes:
    """Return the same frame, cursor included, under another incarnation, with a new checksum.

    Raises:
        MalformedError: `data` is not a frame.
        ChecksumError: `data` was damaged.

    Example:
        >>> frame = encode_frame(Header(kind=FrameKind.MODEL, values="float32", size=0, nnz=0), b"")
        >>> peek_header(restamp(frame, 7)).incarnation
        7
    """
    frame = decode_frame(data)
    rest = memoryview(data).cast("B")[HEADER_BYTES:]
    start = _pack(replace(frame.header, incarnation=incarnation))
    return b"".join((start, _CHECKSUM.pack(zlib.crc32(rest, zlib.crc32(start))), rest))


def _to_view(payload: Payload) -> memoryview:
    if isinstance(payload, np.ndarray):
        return np.ascontiguousarray(payload, "<f4").data
    return memoryview(payload)


class _Raw(NamedTuple):
    """The header as it travels, in order."""

    magic: bytes
    wire_version: int
    kind: int
    values: int
    flags: int
    worker_id: int
    member: int
    shard: int
    run: int
    incarnation: int
    seq: int
    version: int
    size: int
    nnz: int
    tail: int
    staleness: int
    body_bytes: int
    hash: int
    cursor_bytes: int

    @property
    def frame_bytes(self) -> int:
        """Return the length that the whole frame claims to have."""
        return HEADER_BYTES + self.body_bytes + 4 * self.tail + self.cursor_bytes


def _pack(header: Header) -> bytes:
    raw = _Raw(
        magic=MAGIC,
        wire_version=WIRE_VERSION,
        kind=header.kind,
        values=VALUE_KINDS.index(header.values),
        flags=_SET * header.replaces | _HASH * (header.hash is not None),
        worker_id=header.worker_id,
        member=header.member,
        shard=header.shard,
        run=header.run,
        incarnation=header.incarnation,
        seq=header.seq,
        version=header.version,
        size=header.size,
        nnz=header.nnz,
        tail=header.tail,
        staleness=header.staleness,
        body_bytes=header.body_bytes,
        hash=header.hash or 0,
        cursor_bytes=header.cursor_bytes,
    )
    try:
        return _FIELDS.pack(*raw)
    except struct.error as e:
        raise MalformedError(f"a field of the header does not fit: {header}") from e


def _check_limit(length: int, max_size: int | None) -> None:
    if max_size is not None and length > max_size:
        raise TooLargeError(f"a frame of {length} bytes exceeds the limit of {max_size}")


def _unpack(view: memoryview) -> _Raw:
    """Read the fields, and refuse what is not a frame of this version."""
    if view.nbytes < HEADER_BYTES:
        raise MalformedError(f"{view.nbytes} bytes are less than a frame's header ({HEADER_BYTES})")
    raw = _Raw._make(_FIELDS.unpack_from(view))
    if raw.magic != MAGIC:
        raise MalformedError(f"a frame begins with {MAGIC!r}, not with {raw.magic!r}")
    if raw.wire_version != WIRE_VERSION:
        raise MalformedError(
            f"the frame has wire version {raw.wire_version}, this side speaks {WIRE_VERSION}; "
            "run the same release on both sides"
        )
    return raw


def _to_header(raw: _Raw) -> Header:
    if raw.kind not in FrameKind.__members__.values():
        raise MalformedError(f"frame kind {raw.kind} is unknown")
    if raw.values >= len(VALUE_KINDS):
        raise MalformedError(f"value kind {raw.values} is unknown")
    if raw.flags & ~(_SET | _HASH):
        raise MalformedError("reserved bits of the header are not zero")
    if raw.hash and not raw.flags & _HASH:
        raise MalformedError("the header has a hash, but not the flag that says so")
    return Header(
        kind=FrameKind(raw.kind),
        values=VALUE_KINDS[raw.values],
        worker_id=raw.worker_id,
        member=raw.member,
        shard=raw.shard,
        run=raw.run,
        incarnation=raw.incarnation,
        seq=raw.seq,
        version=raw.version,
        size=raw.size,
        nnz=raw.nnz,
        staleness=raw.staleness,
        replaces=bool(raw.flags & _SET),
        hash=raw.hash if raw.flags & _HASH else None,
        tail=raw.tail,
        body_bytes=raw.body_bytes,
        cursor_bytes=raw.cursor_bytes,
    )


def _check(header: Header) -> None:
    """Refuse a header whose fields contradict each other."""
    if header.replaces and header.kind is not FrameKind.DIFFERENCE:
        raise MalformedError(f"the SET flag is for DIFFERENCE, not for {header.kind.name}")
    if header.cursor_bytes and header.kind is not FrameKind.UPDATE:
        raise MalformedError(f"a cursor is for UPDATE, not for {header.kind.name}")
    if header.cursor_bytes > MAX_CURSOR_BYTES:
        raise MalformedError(
            f"a cursor of {header.cursor_bytes} bytes exceeds the limit of {MAX_CURSOR_BYTES}"
        )
    if header.nnz > header.size:
        raise MalformedError(f"{header.nnz} entries do not fit {header.size} coordinates")
    if header.kind is FrameKind.MODEL:
        right = header.values == "float32" and header.nnz == header.size
        if not right or header.body_bytes != 4 * header.size:
            raise MalformedError("a MODEL frame holds every coordinate as float32, nothing else")
    elif payload_bytes(header.nnz, header.values) > header.body_bytes:
        raise MalformedError(
            f"{header.nnz} entries of kind {header.values} do not fit a body of "
            f"{header.body_bytes} bytes"
        )
