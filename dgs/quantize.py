"""Values on the wire: six codes, each with a decoding that is exact and defined by `WIRE.md`.

The values of a message are grouped into *blocks*: runs of up to 1024 consecutive entries that
restart at each segment. The kinds `int8`, `int4`, `int2` and `sign` have one float32 scale per
block, and an entry decodes to

    decoded = float32(level) * scale           one IEEE multiplication, rounded to nearest even

so every implementation rebuilds the same bits. Scales are normal numbers or zero, hence no decoder
meets a subnormal product, which some processors flush. Codes are packed over the whole message:
a block needs no padding. What an encoder rounds away is its caller's to keep: `Quantized.decoded`
is what the other side will see.
"""

from __future__ import annotations

from typing import Final, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from dgs.config import Values
from dgs.errors import ConfigError, MalformedError, NonFiniteError

__all__ = [
    "BLOCK_ENTRIES",
    "SCALED_KINDS",
    "VALUE_KINDS",
    "Quantized",
    "block_lengths",
    "blocks_per_segment",
    "dequantize",
    "first_non_finite",
    "num_blocks",
    "payload_bytes",
    "quantize",
]

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]
ByteArray = npt.NDArray[np.uint8]
Buffer = bytes | bytearray | memoryview | ByteArray

VALUE_KINDS: Final[tuple[Values, ...]] = get_args(Values)
"""Kinds of values; a kind's position is its number in frames."""

SCALED_KINDS: Final[frozenset[Values]] = frozenset({"int8", "int4", "int2", "sign"})
"""Kinds whose blocks carry a scale."""

BLOCK_ENTRIES: Final = 1024
"""Longest block, in entries."""

_BITS: Final[dict[Values, int]] = {
    "float32": 32,
    "bfloat16": 16,
    "int8": 8,
    "int4": 4,
    "int2": 2,
    "sign": 1,
}
_LARGEST_LEVEL: Final[dict[Values, int]] = {"int8": 127, "int4": 7, "int2": 3, "sign": 1}
_SMALLEST_SCALE: Final = np.finfo(np.float32).smallest_normal
_INT2_ROUNDS: Final = 2  # from the mean, two come within 1 % of the best scale on top-k data


class Quantized(NamedTuple):
    """Values as they travel, and as the other side will read them.

    Attributes:
        codes: the value payload, `payload_bytes` long.
        scales: one per block for the kinds in `SCALED_KINDS`, otherwise empty.
        decoded: what `dequantize` gives, bit for bit; may share memory with the input.
    """

    codes: ByteArray
    scales: Float32Array
    decoded: Float32Array


def first_non_finite(values: Float32Array) -> int | None:
    """Return the position of the first NaN or infinity, or None.

    Example:
        >>> first_non_finite(np.array([1.0, np.inf, np.nan], np.float32))
        1
    """
    finite = np.isfinite(values)
    return None if finite.all() else int(np.argmin(finite))


def payload_bytes(total: int, kind: Values) -> int:
    """Return the bytes that `total` entries of a kind take, without scales.

    Example:
        >>> payload_bytes(9, "sign")
        2
    """
    return (total * _BITS[kind] + 7) // 8


def blocks_per_segment(counts: npt.ArrayLike) -> Int64Array:
    """Return the number of blocks of each segment.

    Example:
        >>> blocks_per_segment([3, 0, 1025]).tolist()
        [1, 0, 2]
    """
    return -(-np.asarray(counts, np.int64) // BLOCK_ENTRIES)


def num_blocks(counts: npt.ArrayLike) -> int:
    """Return the number of blocks of a message, given its entries per segment.

    Example:
        >>> num_blocks([3, 0, 1025])
        3
    """
    return int(blocks_per_segment(counts).sum())


def block_lengths(counts: npt.ArrayLike) -> Int64Array:
    """Return the entries of each block of a message, in order.

    Example:
        >>> block_lengths([3, 0, 1025]).tolist()
        [3, 1024, 1]
    """
    counts = np.asarray(counts, np.int64)
    used = counts[counts > 0]
    blocks = blocks_per_segment(used)
    ends = np.cumsum(blocks)
    lengths = np.full(int(blocks.sum()), BLOCK_ENTRIES, np.int64)
    lengths[ends - 1] = used - BLOCK_ENTRIES * (blocks - 1)
    return lengths


def quantize(values: npt.ArrayLike, counts: npt.ArrayLike, kind: Values) -> Quantized:
    """Code values as one kind.

    Per entry, |decoded - v| is 0 for `float32`; at most 2**-8 |v| for `bfloat16` (above the largest
    bfloat16, that one); scale/2 for `int8` and `int4`, with scale = max |v| / 127 and / 7. `int2`
    and `sign` never increase the squared norm of a block: |decoded - v|^2 <= |v|^2, summed over it.
    A scale below 2**-126 becomes zero, and the block with it. (Up to float32 rounding.)

    Args:
        values: finite, in the order of the message.
        counts: entries per segment, whose sum is the number of values.
        kind: one of `VALUE_KINDS`.

    Raises:
        NonFiniteError: a value is NaN or infinite.
        ConfigError: the counts do not sum to the number of values.

    Example:
        >>> quantize([1.0, -0.5, 0.1], [3], "int4").decoded.tolist()
        [1.0, -0.4285714626312256, 0.1428571492433548]
    """
    values = np.ascontiguousarray(values, np.float32)
    lengths = block_lengths(counts)
    if int(lengths.sum()) != values.size:
        raise ConfigError(f"counts sum to {int(lengths.sum())}, but there are {values.size} values")
    bad = first_non_finite(values)
    if bad is not None:
        raise NonFiniteError(f"entry {bad} of the message is {values[bad]}, not a finite number")
    no_scales = np.empty(0, np.float32)
    if kind == "float32":
        return Quantized(values.astype("<f4", copy=False).view(np.uint8), no_scales, values)
    if kind == "bfloat16":
        upper = _to_bfloat16(values)
        return Quantized(upper.astype("<u2").view(np.uint8), no_scales, _from_bfloat16(upper))
    scales = _scales(values, lengths, kind)
    per_entry = np.repeat(scales, lengths)
    levels = _levels(values, per_entry, kind)
    return Quantized(_pack(levels, kind), scales, levels.astype(np.float32) * per_entry)


def dequantize(
    payload: Buffer, scales: npt.ArrayLike, counts: npt.ArrayLike, kind: Values
) -> Float32Array:
    r"""Decode a value payload; the result is a new array.

    `float32` and `bfloat16` may hold NaN or infinity: the caller asks `first_non_finite`, because
    only the caller can name the tensor.

    Args:
        payload: exactly `payload_bytes` long.
        scales: one per block for the kinds in `SCALED_KINDS`, otherwise empty.
        counts: entries per segment.
        kind: one of `VALUE_KINDS`.

    Raises:
        MalformedError: a length, a scale, a code or a padding bit is not what `WIRE.md` allows.

    Example:
        >>> dequantize(b"\x06", [0.5], [3], "sign").tolist()
        [0.5, -0.5, -0.5]
    """
    raw = np.frombuffer(payload, np.uint8)
    scales = np.asarray(scales, np.float32)
    lengths = block_lengths(counts)
    total = int(lengths.sum())
    if raw.size != payload_bytes(total, kind):
        raise MalformedError(
            f"the value payload has {raw.size} bytes; {total} entries of kind {kind} take "
            f"{payload_bytes(total, kind)}"
        )
    wanted = lengths.size if kind in SCALED_KINDS else 0
    if scales.size != wanted:
        raise MalformedError(f"{scales.size} scales given; {wanted} wanted for kind {kind}")
    if kind == "float32":
        return raw.view("<f4").astype(np.float32)
    if kind == "bfloat16":
        return _from_bfloat16(raw.view("<u2"))
    _check_scales(scales, kind)
    return _unpack(raw, total, kind) * np.repeat(scales, lengths)


def _to_bfloat16(values: Float32Array) -> npt.NDArray[np.uint16]:
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    overflow = (rounded & np.uint32(0x7F80)) == 0x7F80
    return (rounded - overflow).astype(np.uint16)  # one below infinity is the largest finite


def _from_bfloat16(upper: npt.NDArray[np.uint16]) -> Float32Array:
    return (upper.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _largest_scale(kind: Values) -> np.float32:
    """Return the largest scale whose largest level is still finite after rounding."""
    exact = float(np.finfo(np.float32).max) / _LARGEST_LEVEL[kind]
    rounded = np.float32(exact)
    return rounded if float(rounded) <= exact else np.nextafter(rounded, np.float32(0))


def _scales(values: Float32Array, lengths: Int64Array, kind: Values) -> Float32Array:
    if not lengths.size:
        return np.empty(0, np.float32)
    magnitudes = np.abs(values)
    if kind in ("int8", "int4"):
        starts = np.cumsum(lengths) - lengths
        scales = np.maximum.reduceat(magnitudes, starts) / np.float32(_LARGEST_LEVEL[kind])
    else:
        # bincount adds in order, in float64: the same bits on every machine, unlike np.sum
        block = np.repeat(np.arange(lengths.size), lengths)
        mean = np.bincount(block, magnitudes) / lengths
        scales = (mean if kind == "sign" else _fit_int2(magnitudes, mean, block)).astype(np.float32)
    scales = np.minimum(scales, _largest_scale(kind))
    return np.where(scales < _SMALLEST_SCALE, np.float32(0), scales)


def _fit_int2(
    magnitudes: Float32Array, mean: npt.NDArray[np.float64], block: Int64Array
) -> npt.NDArray[np.float64]:
    """Fit s to min sum (|v| - l s)^2, l in {1, 3}, by turns: l given s, then s given l."""
    s = mean
    for _ in range(_INT2_ROUNDS):
        l = np.where(magnitudes > 2.0 * s[block], 3.0, 1.0)  # noqa: E741
        s = np.bincount(block, l * magnitudes) / np.bincount(block, l * l)
    return s


def _levels(values: Float32Array, scales: Float32Array, kind: Values) -> npt.NDArray[np.int8]:
    """Return the level of each entry, given the scale of each entry."""
    if kind in ("int8", "int4"):
        limit = _LARGEST_LEVEL[kind]
        ratio = values / np.where(scales > 0, scales, np.float32(1))  # |v| is tiny where scale is 0
        return np.clip(np.rint(ratio), -limit, limit).astype(np.int8)
    sign = np.where(values < 0, np.int8(-1), np.int8(1))
    if kind == "sign":
        return sign
    return np.where(np.abs(values) > np.float64(2) * scales, np.int8(3), np.int8(1)) * sign


def _pack(levels: npt.NDArray[np.int8], kind: Values) -> ByteArray:
    """Pack levels, the first entry in the low bits of the first byte."""
    if kind == "int8":
        return levels.view(np.uint8)
    if kind == "sign":
        return np.packbits(levels < 0, bitorder="little")
    per_byte = 8 // _BITS[kind]
    codes = levels & 15 if kind == "int4" else (levels + 3) >> 1
    padded = np.zeros((-(-levels.size // per_byte), per_byte), np.uint8)
    padded.reshape(-1)[: levels.size] = codes
    shifts = np.arange(per_byte, dtype=np.uint8) * _BITS[kind]
    return np.bitwise_or.reduce(padded << shifts, axis=1)


def _unpack(raw: ByteArray, total: int, kind: Values) -> Float32Array:
    """Return the level of each entry, refusing codes that no level has."""
    bits = _BITS[kind]
    used_bits = total * bits % 8
    if used_bits and raw[-1] >> used_bits:
        raise MalformedError("the value payload ends in padding bits that are not zero")
    if kind == "sign":
        negative = np.unpackbits(raw, count=total, bitorder="little")
        return np.float32(1) - np.float32(2) * negative
    if kind == "int8":
        codes = raw
        levels = raw.view(np.int8).astype(np.float32)
    else:
        shifts = np.arange(8 // bits, dtype=np.uint8) * bits
        codes = ((raw[:, None] >> shifts) & np.uint8((1 << bits) - 1)).reshape(-1)[:total]
        table = [2 * c - 3 for c in range(4)] if kind == "int2" else [*range(8), *range(-8, 0)]
        levels = np.array(table, np.float32)[codes]
    if kind != "int2" and (codes == 1 << (bits - 1)).any():
        raise MalformedError(f"a code stands for {-(1 << (bits - 1))}, which {kind} leaves out")
    return levels


def _check_scales(scales: Float32Array, kind: Values) -> None:
    largest = _largest_scale(kind)
    good = (scales == 0) | ((scales >= _SMALLEST_SCALE) & (scales <= largest))
    good &= ~np.signbit(scales)
    if not good.all():
        block = int(np.argmin(good))
        raise MalformedError(
            f"the scale of block {block} is {scales[block]}: not 0 and not in "
            f"[{_SMALLEST_SCALE}, {largest}]"
        )
