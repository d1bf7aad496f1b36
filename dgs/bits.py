"""Bit streams: ones and zeros packed into bytes, the first bit in the lowest position.

Three streams make up a sparse message's indices: unary numbers, binary numbers of varying width,
and bitmaps. Every reader here takes bytes from a peer: it checks that they hold exactly what was
announced, padding bits included, and allocates in proportion to the bytes it was given.

The gaps between indices are Rice-coded with an *escape*. With a parameter r, a gap g has the
quotient min(g >> r, 16), in unary. Below 16 its low r bits follow in binary; at 16 all its 22 bits
do. Plain Rice codes pay for a long gap in unary, so that a few of them, as between the rows of a
matrix that few samples touch, spoil the parameter of a whole block.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from dgs.errors import MalformedError

__all__ = [
    "ESCAPE",
    "GAP_BITS",
    "pack_positions",
    "pack_unary",
    "pack_widths",
    "rice_parameters",
    "unpack_bits",
    "unpack_unary",
    "unpack_widths",
]

Int64Array = npt.NDArray[np.int64]
ByteArray = npt.NDArray[np.uint8]

ESCAPE: Final = 16
"""Quotient that says that the whole gap follows."""

GAP_BITS: Final = 22
"""Bits of a whole gap, and the largest Rice parameter."""

_WORD: Final = 32
_CHUNK: Final = 1 << 14  # numbers at a time: temporaries of this size stay in the cache


def pack_positions(positions: Int64Array, total: int) -> ByteArray:
    """Pack `total` bits of which those at `positions` are one.

    Example:
        >>> pack_positions(np.array([0, 9]), 10).tolist()
        [1, 2]
    """
    bits = np.zeros(total, np.uint8)
    bits[positions] = 1
    return np.packbits(bits, bitorder="little")


def unpack_bits(data: ByteArray, total: int, name: str) -> ByteArray:
    """Return the `total` bits of a stream, one per byte.

    Args:
        data: exactly as many bytes as `total` bits take.
        total: number of bits.
        name: what the stream is called in messages.

    Raises:
        MalformedError: a padding bit is not zero.

    Example:
        >>> unpack_bits(np.array([5], np.uint8), 3, "bitmap").tolist()
        [1, 0, 1]
    """
    if total % 8 and data[-1] >> (total % 8):
        raise MalformedError(f"the {name} ends in padding bits that are not zero")
    return np.unpackbits(data, count=total, bitorder="little")


def pack_unary(numbers: Int64Array) -> ByteArray:
    """Pack each number as that many zeros and a one.

    Example:
        >>> pack_unary(np.array([2, 0, 1])).tolist()
        [44]
    """
    ends = np.cumsum(numbers + 1)
    return pack_positions(ends - 1, int(ends[-1]) if ends.size else 0)


def unpack_unary(data: ByteArray, count: int) -> Int64Array:
    """Return the `count` numbers of a unary stream.

    Raises:
        MalformedError: the stream does not hold exactly `count` numbers.

    Example:
        >>> unpack_unary(np.array([44], np.uint8), 3).tolist()
        [2, 0, 1]
    """
    bits = np.unpackbits(data, bitorder="little")
    ones = int(np.count_nonzero(bits))
    if ones != count:
        raise MalformedError(f"the unary plane holds {ones} numbers, the segment table {count}")
    ends = np.flatnonzero(bits.view(np.bool_))
    needed = (int(ends[-1]) >> 3) + 1 if count else 0
    if data.size != needed:
        raise MalformedError(f"the unary plane has {data.size} bytes where {needed} are enough")
    numbers = np.empty(count, np.int64)
    numbers[:1] = ends[:1]
    np.subtract(ends[1:], ends[:-1], out=numbers[1:])
    numbers[1:] -= 1
    return numbers


def pack_widths(numbers: Int64Array, widths: ByteArray) -> ByteArray:
    """Pack the low `widths[i]` bits of each number, lowest bit first.

    Args:
        numbers: non-negative.
        widths: bits of each number, in [0, 32], as uint8.

    Example:
        >>> pack_widths(np.array([1, 5, 7]), np.array([2, 3, 4], np.uint8)).tolist()
        [245, 0]
    """
    starts, total = _starts(widths)
    words = np.zeros(total // _WORD + 2, np.uint32)
    for at in range(0, widths.size, _CHUNK):
        part = slice(at, at + _CHUNK)
        low = (numbers[part] & _masks(widths[part])).astype(np.uint64)
        word = starts[part] // _WORD
        base = int(word[0])
        low <<= (starts[part] % _WORD).astype(np.uint64)
        # the bits of different numbers never meet, so their sum is their union; below 2**53,
        # float64 adds whole numbers exactly
        word -= base
        halves = np.bincount(word, low & np.uint64(0xFFFFFFFF)).astype(np.uint32)
        words[base : base + halves.size] |= halves
        halves = np.bincount(word, low >> np.uint64(_WORD)).astype(np.uint32)
        words[base + 1 : base + 1 + halves.size] |= halves
    return words.astype("<u4", copy=False).view(np.uint8)[: (total + 7) // 8]


def unpack_widths(data: ByteArray, widths: ByteArray) -> Int64Array:
    """Return the numbers of a stream of varying widths.

    Args:
        data: exactly as many bytes as the widths sum to.
        widths: bits of each number, in [0, 32], as uint8.

    Raises:
        MalformedError: a padding bit is not zero.

    Example:
        >>> unpack_widths(np.array([245, 0], np.uint8), np.array([2, 3, 4], np.uint8)).tolist()
        [1, 5, 7]
    """
    starts, total = _starts(widths)
    if total % 8 and data[-1] >> (total % 8):
        raise MalformedError("the remainder plane ends in padding bits that are not zero")
    words = np.zeros(total // _WORD + 3, "<u4")
    words.view(np.uint8)[: data.size] = data
    windows = words[:-1].astype(np.uint64) | (words[1:].astype(np.uint64) << np.uint64(_WORD))
    numbers = np.empty(widths.size, np.int64)
    for at in range(0, widths.size, _CHUNK):
        part = slice(at, at + _CHUNK)
        shifted = windows[starts[part] // _WORD]
        shifted >>= (starts[part] % _WORD).astype(np.uint64)
        np.bitwise_and(shifted.view(np.int64), _masks(widths[part]), out=numbers[part])
    return numbers


def _starts(widths: ByteArray) -> tuple[Int64Array, int]:
    """Return the first bit of each number, and the number of bits."""
    starts = np.cumsum(widths, dtype=np.int64)
    total = int(starts[-1]) if starts.size else 0
    starts -= widths
    return starts, total


def _masks(widths: ByteArray) -> Int64Array:
    masks = np.left_shift(1, widths, dtype=np.int64)
    masks -= 1
    return masks


def rice_parameters(gaps: Int64Array, lengths: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Find the parameter of each block that takes the fewest bits, and these bits.

    No shift of a gap that is not escaped leaves more than its 4 leading bits, so a histogram over
    those (and the length of the gap) gives the cost of every parameter exactly.

    Args:
        gaps: in [0, 2**22).
        lengths: gaps of each block, at least one.

    Example:
        >>> parameters, bits = rice_parameters(np.array([5, 90, 70, 0]), np.array([2, 2]))
        >>> parameters.tolist(), bits.tolist()
        ([5, 4], [14, 14])
    """
    bucket = _buckets(gaps)
    bucket += np.repeat(np.arange(lengths.size) * _BUCKETS, lengths)
    histogram = np.bincount(bucket, minlength=lengths.size * _BUCKETS)
    # whole numbers below 2**53: float64 adds them exactly, in any order
    bits = histogram.reshape(-1, _BUCKETS).astype(np.float64) @ _costs()
    best = bits.argmin(axis=1)
    return best, np.take_along_axis(bits, best[:, None], 1)[:, 0].astype(np.int64)


_BUCKETS: Final = 8 * GAP_BITS + 1


def _buckets(gaps: Int64Array) -> Int64Array:
    """Return 0 for 0, else 1 + the exponent and 3 fraction bits of the gap as a float32."""
    bits = gaps.astype(np.float32).view(np.int32)
    bits >>= 20
    bits -= (127 << 3) - 1
    return np.maximum(bits, 0).astype(np.int64)


def _costs() -> npt.NDArray[np.float64]:
    """Return the bits that the gaps of each bucket take, by parameter."""
    bucket = np.arange(_BUCKETS - 1)
    smallest = np.ldexp(1 + bucket % 8 / 8, bucket // 8).astype(np.int64)  # of the bucket
    r = np.arange(GAP_BITS + 1)
    quotients = np.minimum(np.concatenate(([0], smallest))[:, None] >> r, ESCAPE)
    widths = np.where(quotients == ESCAPE, GAP_BITS, r)
    return (quotients + 1 + widths).astype(np.float64)
