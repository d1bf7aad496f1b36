"""The message `Chunk` of the service, written and read by hand.

A request or reply of a streamed method travels as `Chunk { bytes data = 1; }` messages. On the
wire each is the byte 0x0A, the length as a varint, and the data; no data is an empty message. Doing
it by hand saves the copies that a protobuf library makes of every `bytes` field (a factor of five
at 16 MiB), and any generated client still understands it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from dgs.errors import MalformedError, TooLargeError

__all__ = ["CHUNK_BYTES", "assemble", "split", "unwrap", "wrap"]

CHUNK_BYTES = 1 << 20
"""Most bytes of data that one chunk may carry."""

_TAG = 0x0A
_LONGEST_VARINT = 5
_SMALL_BYTES = 4096


def wrap(data: bytes | memoryview) -> bytes:
    r"""Encode one chunk.

    Example:
        >>> wrap(b"abc")
        b'\n\x03abc'
    """
    rest = len(data)
    if rest == 0:
        return b""
    header = bytearray((_TAG,))
    while rest > 0x7F:
        header.append(rest & 0x7F | 0x80)
        rest >>= 7
    header.append(rest)
    return b"".join((header, data))


def unwrap(message: bytes) -> memoryview:
    r"""Return the data of one chunk, without copying it.

    Raises:
        MalformedError: the message is anything but exactly one field 1 of at most `CHUNK_BYTES`.

    Example:
        >>> bytes(unwrap(b"\n\x03abc"))
        b'abc'
    """
    view = memoryview(message)
    if not message:
        return view
    if message[0] != _TAG:
        raise MalformedError(f"a chunk starts with the byte {message[0]:#04x} instead of 0x0a")
    length = 0
    for position in range(1, 1 + _LONGEST_VARINT):
        if position >= len(message):
            raise MalformedError("a chunk ends inside its length")
        byte = message[position]
        length |= (byte & 0x7F) << (7 * (position - 1))
        if byte < 0x80:
            break
    else:
        raise MalformedError("the length of a chunk has more than 5 bytes")
    data = view[position + 1 :]
    if len(data) != length:
        raise MalformedError(f"a chunk announces {length} bytes of data and holds {len(data)}")
    if length > CHUNK_BYTES:
        raise MalformedError(f"a chunk holds {length} bytes; at most {CHUNK_BYTES} are allowed")
    return data


def split(message: bytes) -> Iterator[bytes]:
    """Cut a message into encoded chunks; an empty message is one empty chunk.

    Example:
        >>> [len(chunk) for chunk in split(bytes(CHUNK_BYTES + 1))]
        [1048580, 3]
    """
    view = memoryview(message)
    for start in range(0, max(1, len(view)), CHUNK_BYTES):
        yield wrap(view[start : start + CHUNK_BYTES])


def assemble(chunks: Iterable[bytes], limit_bytes: int, what: str) -> bytes:
    """Put a message together from encoded chunks; never hold more than the limit.

    Args:
        chunks: encoded chunks, in order, to the end of the stream.
        limit_bytes: most bytes of data in all.
        what: names the message in errors, such as ``the request of Exchange``.

    Raises:
        MalformedError: there is no chunk, one is malformed, or one of several is empty.
        TooLargeError: the data exceed the limit; what was received so far is dropped.
    """
    pieces: list[memoryview | bytes] = []
    small = bytearray()
    total = 0
    count = 0
    for chunk in chunks:
        data = unwrap(chunk)
        count += 1
        # An endless stream of empty chunks would never meet the limit.
        if count > 1 and (total == 0 or not data):
            raise MalformedError(f"{what} has an empty chunk among several")
        total += len(data)
        if total > limit_bytes:
            raise TooLargeError(f"{what} exceeds the limit of {limit_bytes} bytes")
        # A piece of its own costs about 200 bytes, which a few bytes of data are not worth.
        if len(data) < _SMALL_BYTES:
            small += data
            continue
        if small:
            pieces.append(bytes(small))
            small.clear()
        pieces.append(data)
    if not count:
        raise MalformedError(f"{what} has no chunk; an empty message is one empty chunk")
    pieces.append(bytes(small))
    return b"".join(pieces)
