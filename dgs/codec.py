"""Bodies of sparse frames: which coordinates, and what they hold; specified in `WIRE.md`.

A body is a stream of indices followed by a stream of values. Per segment the indices take the
smallest of three forms: nothing (the segment is empty or complete), a bitmap, or Rice-coded gaps
(`dgs.bits`) with a parameter per block. At random supports the latter comes within 1 % of the
entropy; clustered supports, as models have them, cost less.

Whoever decodes has never seen the bytes before: each length is checked against the bytes that are
there before anything is allocated for it, and a body either decodes to a valid message or is
refused whole.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from dgs.bits import (
    ESCAPE,
    GAP_BITS,
    pack_positions,
    pack_unary,
    pack_widths,
    rice_parameters,
    unpack_bits,
    unpack_unary,
    unpack_widths,
)
from dgs.config import Values
from dgs.errors import ConfigError, MalformedError, TooLargeError
from dgs.quantize import (
    BLOCK_ENTRIES,
    SCALED_KINDS,
    VALUE_KINDS,
    block_lengths,
    blocks_per_segment,
    dequantize,
    num_blocks,
    payload_bytes,
    quantize,
)

__all__ = ["Encoded", "decode_body", "encode_body", "max_body_bytes"]

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]
ByteArray = npt.NDArray[np.uint8]
Selector = slice | npt.NDArray[np.bool_]

_FORM_SHIFT: Final = 30
_COUNT_MASK: Final = (1 << _FORM_SHIFT) - 1
_WHOLE: Final = 0  # no entry, or all of them
_BITMAP: Final = 1
_RICE: Final = 2
_LONGEST_SEGMENT: Final = 1 << GAP_BITS
_LARGEST_PLANE_BYTES: Final = (1 << 32) - 1


class Encoded(NamedTuple):
    """A body, and the values that decoding it will give.

    Attributes:
        body: the bytes.
        decoded: one value per entry; differs from what was given by the rounding of the kind.
    """

    body: bytes
    decoded: Float32Array


class _Segments(NamedTuple):
    """The segment table: size, entries and form of each segment."""

    sizes: Int64Array
    counts: Int64Array
    forms: Int64Array

    def of(self, form: int) -> _Segments:
        """Keep the segments of one form that have entries."""
        keep = (self.forms == form) & (self.counts > 0)
        return _Segments(self.sizes[keep], self.counts[keep], self.forms[keep])

    def entries(self, form: int) -> Selector:
        """Select the entries of the segments of one form."""
        keep = (self.forms == form)[self.counts > 0]
        if not keep.any():
            return slice(0, 0)
        return slice(None) if keep.all() else np.repeat(keep, self.counts[self.counts > 0])

    def pack(self) -> bytes:
        """Return the table as it travels."""
        return (self.counts | (self.forms << _FORM_SHIFT)).astype("<u4").tobytes()


def encode_body(
    indices: npt.ArrayLike, values: npt.ArrayLike, segment_sizes: npt.ArrayLike, kind: Values
) -> Encoded:
    """Code a sparse message.

    Args:
        indices: strictly increasing, in [0, sum of the segment sizes).
        values: one finite value per index.
        segment_sizes: coordinates per segment, each at most 2**22; zero is allowed.
        kind: how values are coded.

    Raises:
        ConfigError: the indices, or the segment sizes, are not as described.
        NonFiniteError: a value is NaN or infinite.
        TooLargeError: the indices take 4 GiB or more.

    Example:
        >>> message = encode_body([0, 2], [1.0, -1.0], [4, 0, 2], "float32")
        >>> message.body.hex(" ", -4)
        '02000040 00000000 00000000 00000000 05000080 3f000080 bf'
    """
    indices = np.ascontiguousarray(indices, np.int64)
    sizes = _checked_sizes(segment_sizes)
    cuts = _checked_cuts(indices, sizes)
    counts = np.diff(cuts)
    quantized = quantize(values, counts, kind)
    gaps = _gaps(indices, cuts, sizes)
    segments, parameters = _choose_forms(gaps, sizes, counts)
    bitmap = segments.entries(_BITMAP)
    offsets = indices[bitmap] - np.repeat(np.cumsum(sizes) - sizes, counts)[bitmap]
    parts = [
        segments.pack(),
        *_pack_rice(gaps[segments.entries(_RICE)], segments.of(_RICE), parameters),
        _pack_bitmaps(offsets, segments.of(_BITMAP)).data,
        quantized.scales.astype("<f4", copy=False).data,
        quantized.codes.data,
    ]
    return Encoded(b"".join(parts), quantized.decoded)


def decode_body(
    body: bytes | bytearray | memoryview, segment_sizes: npt.ArrayLike, kind: Values, nnz: int
) -> tuple[Int64Array, Float32Array]:
    """Decode a sparse message, or refuse it whole.

    Values of the kinds `float32` and `bfloat16` may still be NaN or infinite. The caller asks
    `dgs.quantize.first_non_finite` and raises the `NonFiniteError`, because only the caller can
    name the tensor; the other kinds cannot hold such a value.

    Args:
        body: the bytes between a frame's header and its tail.
        segment_sizes: coordinates per segment, as the encoder had them.
        kind: how values are coded, from the frame's header.
        nnz: number of entries, from the frame's header.

    Returns:
        Indices, strictly increasing, and their values.

    Raises:
        MalformedError: the body is not what `WIRE.md` prescribes.

    Example:
        >>> message = encode_body([0, 2, 5], [1.0, -1.0, 0.5], [4, 0, 2], "sign")
        >>> indices, values = decode_body(message.body, [4, 0, 2], "sign", 3)
        >>> indices.tolist(), values.tolist()
        ([0, 2, 5], [1.0, -1.0, 0.5])
    """
    sizes = np.asarray(segment_sizes, np.int64)
    reader = _Reader(body)
    segments = _read_table(reader, sizes, nnz)
    reader.require(payload_bytes(nnz, kind), "value payload")
    counts = segments.counts
    offsets = np.empty(nnz, np.int64)
    offsets[segments.entries(_WHOLE)] = _runs(segments.of(_WHOLE).counts)
    offsets[segments.entries(_RICE)] = _read_rice(reader, segments.of(_RICE))
    offsets[segments.entries(_BITMAP)] = _read_bitmaps(reader, segments.of(_BITMAP))
    scale_bytes = 4 * num_blocks(counts) if kind in SCALED_KINDS else 0
    scales = reader.take(scale_bytes, "scales").view("<f4").astype(np.float32)
    payload = reader.take(payload_bytes(nnz, kind), "value payload")
    reader.end()
    offsets += np.repeat(np.cumsum(sizes) - sizes, counts)
    return offsets, dequantize(payload, scales, counts, kind)


def max_body_bytes(size: int, num_segments: int) -> int:
    """Return the most bytes that a body can have, whoever wrote it, of any kind of values.

    An entry takes most index bits where its gap is 0 and the Rice parameter the largest: 1 + 22 for
    the one coordinate that it uses up; a longer gap takes at most 39 bits for at least two.

    Args:
        size: coordinates, the sum of the segment sizes.
        num_segments: segments, empty ones included.

    Example:
        >>> max_body_bytes(1, 1), max_body_bytes(10**6, 4)
        (19, 6876002)
    """
    table, unary_length = 4 * num_segments, 4
    blocks = min(size, num_segments + size // BLOCK_ENTRIES)
    index_bits = (1 + GAP_BITS) * size + 3 * 7  # three streams, each padded to a whole byte
    values = max(
        payload_bytes(size, kind) + (4 * blocks if kind in SCALED_KINDS else 0)
        for kind in VALUE_KINDS
    )
    return table + blocks + unary_length + index_bits // 8 + values


class _Reader:
    """A position in a body that was received."""

    def __init__(self, body: bytes | bytearray | memoryview) -> None:
        self._data = np.frombuffer(body, np.uint8)
        self._at = 0

    def require(self, size: int, name: str) -> None:
        left = self._data.size - self._at
        if size > left:
            raise MalformedError(f"the {name} takes {size} bytes, but the body has {left} left")

    def take(self, size: int, name: str) -> ByteArray:
        self.require(size, name)
        self._at += size
        return self._data[self._at - size : self._at]

    def end(self) -> None:
        left = self._data.size - self._at
        if left:
            raise MalformedError(f"{left} bytes follow the end of the body")


def _checked_sizes(segment_sizes: npt.ArrayLike) -> Int64Array:
    sizes = np.asarray(segment_sizes, np.int64)
    if sizes.size and (sizes.min() < 0 or sizes.max() > _LONGEST_SEGMENT):
        raise ConfigError(f"segment sizes must be in [0, {_LONGEST_SEGMENT}]; split longer tensors")
    return sizes


def _checked_cuts(indices: Int64Array, sizes: Int64Array) -> Int64Array:
    """Return where each segment's entries begin, and the number of entries."""
    bounds = np.concatenate(([0], np.cumsum(sizes)))
    if indices.size and (indices[0] < 0 or indices[-1] >= bounds[-1]):
        raise ConfigError(
            f"indices run from {indices[0]} to {indices[-1]}; they must be in [0, {bounds[-1]})"
        )
    if (indices[1:] <= indices[:-1]).any():
        raise ConfigError("indices must be strictly increasing; sort them and merge equal ones")
    return np.searchsorted(indices, bounds).astype(np.int64)


def _gaps(indices: Int64Array, cuts: Int64Array, sizes: Int64Array) -> Int64Array:
    """Return the coordinates passed over before each entry, since the one before in its segment."""
    gaps = np.empty_like(indices)
    np.subtract(indices[1:], indices[:-1], out=gaps[1:])
    gaps -= 1
    used = cuts[1:] > cuts[:-1]
    first = cuts[:-1][used]
    gaps[first] = indices[first] - (np.cumsum(sizes) - sizes)[used]
    return gaps


def _choose_forms(
    gaps: Int64Array, sizes: Int64Array, counts: Int64Array
) -> tuple[_Segments, ByteArray]:
    """Choose the smallest form of each segment, and the parameters of those that are Rice-coded."""
    forms = np.where((counts > 0) & (counts < sizes), _RICE, _WHOLE)
    segments = _Segments(sizes, counts, forms)
    partial = segments.of(_RICE)
    if not partial.counts.size:
        return segments, np.empty(0, np.uint8)
    lengths = block_lengths(partial.counts)
    parameters, bits = rice_parameters(gaps[segments.entries(_RICE)], lengths)
    blocks = blocks_per_segment(partial.counts)
    rice_bits = np.add.reduceat(bits + 8, np.cumsum(blocks) - blocks)
    smaller = rice_bits < partial.sizes
    forms[forms == _RICE] = np.where(smaller, _RICE, _BITMAP)
    return segments, parameters[np.repeat(smaller, blocks)].astype(np.uint8)


def _pack_rice(
    gaps: Int64Array, segments: _Segments, parameters: ByteArray
) -> tuple[bytes | memoryview, ...]:
    """Return parameters, length of the unary plane, unary plane and remainder plane."""
    widths = np.repeat(parameters, block_lengths(segments.counts))
    quotients = gaps >> widths
    np.minimum(quotients, ESCAPE, out=quotients)
    widths[quotients == ESCAPE] = GAP_BITS
    unary = pack_unary(quotients)
    if unary.size > _LARGEST_PLANE_BYTES:
        raise TooLargeError(f"a message of {gaps.size} entries is too large; use more shards")
    remainders = pack_widths(gaps, widths)
    return parameters.data, unary.size.to_bytes(4, "little"), unary.data, remainders.data


def _pack_bitmaps(offsets: Int64Array, segments: _Segments) -> ByteArray:
    """Pack one bit per coordinate, given the entries' offsets in their segments."""
    starts = np.cumsum(segments.sizes) - segments.sizes
    return pack_positions(offsets + np.repeat(starts, segments.counts), int(segments.sizes.sum()))


def _read_table(reader: _Reader, sizes: Int64Array, nnz: int) -> _Segments:
    table = reader.take(4 * sizes.size, "segment table").view("<u4").astype(np.int64)
    segments = _Segments(sizes, table & _COUNT_MASK, table >> _FORM_SHIFT)
    whole = (segments.counts == 0) | (segments.counts == sizes)
    good = np.where(whole, segments.forms == _WHOLE, segments.counts < sizes)
    good &= whole | (segments.forms == _BITMAP) | (segments.forms == _RICE)
    if not good.all():
        s = int(np.argmin(good))
        raise MalformedError(
            f"segment {s} of {sizes[s]} coordinates cannot have {segments.counts[s]} entries "
            f"in form {segments.forms[s]}"
        )
    total = int(segments.counts.sum())
    if total != nnz:
        raise MalformedError(f"the segment table counts {total} entries, the header {nnz}")
    return segments


def _runs(counts: Int64Array) -> Int64Array:
    """Return 0, 1, ... counts[0] - 1, 0, 1, ... counts[1] - 1, and so on."""
    total = int(counts.sum())
    return np.arange(total, dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)


def _read_rice(reader: _Reader, segments: _Segments) -> Int64Array:
    """Return the offsets in their segments of the Rice-coded entries."""
    lengths = block_lengths(segments.counts)
    parameters = reader.take(lengths.size, "Rice parameters")
    if parameters.size and parameters.max() > GAP_BITS:
        raise MalformedError(f"a Rice parameter is {parameters.max()}; the largest is {GAP_BITS}")
    unary_bytes = int.from_bytes(reader.take(4, "length of the unary plane").tobytes(), "little")
    quotients = unpack_unary(reader.take(unary_bytes, "unary plane"), int(lengths.sum()))
    if quotients.size and quotients.max() > ESCAPE:
        raise MalformedError(f"a quotient is {quotients.max()}; the largest is {ESCAPE}")
    widths = np.repeat(parameters, lengths)
    escaped = quotients == ESCAPE
    quotients[escaped] = 0
    gaps = np.left_shift(quotients, widths, out=quotients)
    widths[escaped] = GAP_BITS
    remainder_bits = int(widths.sum(dtype=np.int64))
    gaps += unpack_widths(reader.take((remainder_bits + 7) // 8, "remainder plane"), widths)
    gaps += 1
    ends = np.cumsum(gaps)
    last = np.cumsum(segments.counts) - 1
    before = np.concatenate(([0], ends[last[:-1]])) if last.size else last
    overrun = ends[last] - before > segments.sizes
    if overrun.any():
        raise MalformedError(f"Rice-coded gaps leave {int(overrun.sum())} of their segments")
    ends -= np.repeat(before + 1, segments.counts)
    return ends


def _read_bitmaps(reader: _Reader, segments: _Segments) -> Int64Array:
    """Return the offsets in their segments of the entries given by bitmaps."""
    total = int(segments.sizes.sum())
    bits = unpack_bits(reader.take((total + 7) // 8, "bitmaps"), total, "bitmaps")
    starts = np.cumsum(segments.sizes) - segments.sizes
    ones = np.add.reduceat(bits, starts, dtype=np.int64) if starts.size else starts
    if (ones != segments.counts).any():
        raise MalformedError("a bitmap does not have as many ones as its segment has entries")
    return np.flatnonzero(bits.view(np.bool_)) - np.repeat(starts, segments.counts)
