"""Bodies of sparse frames, coded and decoded entry by entry; the same bytes as `dgs.codec`.

One pass plans (gaps, forms, Rice parameters), one writes, one reads. Whatever is not well-formed
is handed to `dgs.codec` as it came, which refuses it: errors are the same because they are its.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from dgs import codec
from dgs.bits import ESCAPE, GAP_BITS
from dgs.codec import Encoded
from dgs.config import Values
from dgs.kernels.cpu_lanes import bits_of, jit, trailing_zeros, word_at
from dgs.quantize import (
    BLOCK_ENTRIES,
    SCALED_KINDS,
    dequantize,
    num_blocks,
    payload_bytes,
    quantize,
)

__all__ = ["decode_body", "encode_body"]

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]

_FORM_SHIFT: Final = 30
_WHOLE: Final = 0
_BITMAP: Final = 1
_RICE: Final = 2
_LONGEST_SEGMENT: Final = 1 << GAP_BITS
_LARGEST_PLANE_BYTES: Final = (1 << 32) - 1
_BUCKETS: Final = 8 * GAP_BITS + 1
_PARAMETERS: Final = GAP_BITS + 1
_NONE: Final = np.uint64(0)
_ONE: Final = np.uint64(1)


def _costs() -> npt.NDArray[np.int32]:
    """Return the bits that a gap takes, by its leading four bits and by the parameter."""
    bucket = np.arange(_BUCKETS - 1)
    smallest = np.ldexp(1 + bucket % 8 / 8, bucket // 8).astype(np.int64)
    r = np.arange(_PARAMETERS)
    quotients = np.minimum(np.concatenate(([0], smallest))[:, None] >> r, ESCAPE)
    return (quotients + 1 + np.where(quotients == ESCAPE, GAP_BITS, r)).astype(np.int32)


_COSTS: Final = _costs()


def encode_body(
    indices: npt.ArrayLike, values: npt.ArrayLike, segment_sizes: npt.ArrayLike, kind: Values
) -> Encoded:
    """Code a sparse message; see `dgs.codec.encode_body`."""
    where = np.ascontiguousarray(indices, np.int64)
    sizes = np.ascontiguousarray(segment_sizes, np.int64)
    counts, forms = np.zeros(sizes.size, np.int64), np.zeros(sizes.size, np.int64)
    gaps = np.empty(where.size, np.uint32)
    parameters = np.empty(where.size // BLOCK_ENTRIES + sizes.size, np.uint8)
    blocks, rice_bits, bitmap_bits = _plan(
        _read_only(where), _read_only(sizes), counts, forms, gaps, parameters
    )
    if blocks < 0 or rice_bits >= 8 * _LARGEST_PLANE_BYTES:
        return codec.encode_body(indices, values, segment_sizes, kind)
    quantized = quantize(values, counts, kind)
    unary = np.zeros(rice_bits // 64 + 2, np.uint64)
    remainders = np.zeros(rice_bits // 64 + 2, np.uint64)
    bitmaps = np.zeros((bitmap_bits + 7) // 8, np.uint8)
    unary_bits, remainder_bits = _write(
        sizes, counts, forms, gaps, parameters, unary, remainders, bitmaps
    )
    unary_bytes = (unary_bits + 7) // 8
    parts = (
        (counts | (forms << _FORM_SHIFT)).astype("<u4").data,
        parameters[:blocks].data,
        unary_bytes.to_bytes(4, "little"),
        unary.view(np.uint8)[:unary_bytes].data,
        remainders.view(np.uint8)[: (remainder_bits + 7) // 8].data,
        bitmaps.data,
        quantized.scales.astype("<f4", copy=False).data,
        quantized.codes.data,
    )
    return Encoded(b"".join(parts), quantized.decoded)


def decode_body(
    body: bytes | bytearray | memoryview, segment_sizes: npt.ArrayLike, kind: Values, nnz: int
) -> tuple[Int64Array, Float32Array]:
    """Decode a sparse message, or refuse it whole; see `dgs.codec.decode_body`."""
    sizes = np.ascontiguousarray(segment_sizes, np.int64)
    data = _read_only(np.frombuffer(body, np.uint8))
    value_bytes = payload_bytes(nnz, kind)
    if data.size < 4 * sizes.size + 4 + value_bytes:
        return codec.decode_body(body, segment_sizes, kind, nnz)
    table = data[: 4 * sizes.size].view("<u4").astype(np.int64)
    counts, forms = table & ((1 << _FORM_SHIFT) - 1), table >> _FORM_SHIFT
    if not _table_is_good(_read_only(sizes), counts, forms, nnz):
        return codec.decode_body(body, segment_sizes, kind, nnz)
    indices = np.empty(nnz, np.int64)
    end = _read(data, 4 * sizes.size, _read_only(sizes), counts, forms, indices)
    scale_bytes = 4 * num_blocks(counts) if kind in SCALED_KINDS else 0
    if end < 0 or data.size != end + scale_bytes + value_bytes:
        return codec.decode_body(body, segment_sizes, kind, nnz)
    scales = data[end : end + scale_bytes].view("<f4").astype(np.float32)
    return indices, dequantize(data[end + scale_bytes :], scales, counts, kind)


def _read_only(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    view = array.view()
    view.flags.writeable = False
    return view


@jit
def _best_parameter(gaps: Any, first: int, last: int, histogram: Any, bits: Any) -> Any:
    """Return the parameter that takes the fewest bits for some gaps, and these bits."""
    histogram[:] = 0
    bits[:] = 0
    for i in range(first, last):
        code = np.int64(bits_of(np.float32(gaps[i])) >> np.uint32(20)) - ((127 << 3) - 1)
        histogram[max(code, 0)] += 1
    for bucket in range(_BUCKETS):
        times = histogram[bucket]
        if times:
            for r in range(_PARAMETERS):
                bits[r] += times * _COSTS[bucket, r]
    best = 0
    for r in range(1, _PARAMETERS):
        if bits[r] < bits[best]:
            best = r
    return best, np.int64(bits[best])


@jit
def _plan(indices: Any, sizes: Any, counts: Any, forms: Any, gaps: Any, parameters: Any) -> Any:
    """Fill in everything about the segments; return blocks (-1: refuse), Rice and bitmap bits."""
    histogram, bits = np.empty(_BUCKETS, np.int32), np.empty(_PARAMETERS, np.int32)
    blocks, at, start, total_bits, bitmap_bits = 0, 0, 0, 0, 0
    for s in range(sizes.size):
        size = sizes[s]
        if size < 0 or size > _LONGEST_SEGMENT:
            return -1, 0, 0
        first, end, before = at, start + size, start - 1
        while at < indices.size and indices[at] < end:
            gap = indices[at] - before - 1
            if gap < 0:
                return -1, 0, 0
            gaps[at] = gap
            before = indices[at]
            at += 1
        start, counts[s] = end, at - first
        if counts[s] == 0 or counts[s] == size:
            continue
        spent, mine = 0, blocks
        for block in range(first, at, BLOCK_ENTRIES):
            last = min(block + BLOCK_ENTRIES, at)
            best, cost = _best_parameter(gaps, block, last, histogram, bits)
            parameters[mine] = best
            mine += 1
            spent += cost
        if spent + 8 * (mine - blocks) < size:
            forms[s], blocks, total_bits = _RICE, mine, total_bits + spent
        else:
            forms[s], bitmap_bits = _BITMAP, bitmap_bits + size
    if at < indices.size:
        return -1, 0, 0
    return blocks, total_bits, bitmap_bits


@jit
def _write(
    sizes: Any,
    counts: Any,
    forms: Any,
    gaps: Any,
    parameters: Any,
    unary: Any,
    remainders: Any,
    bitmaps: Any,
) -> Any:
    """Write the three planes, which hold zeros; return the bits of the first two."""
    at, block, bitmap_start = 0, 0, 0
    unary_at, remainder_at = 0, 0
    for s in range(sizes.size):
        last = at + counts[s]
        if forms[s] == _RICE:
            for begin in range(at, last, BLOCK_ENTRIES):
                parameter = np.uint64(parameters[block])
                block += 1
                for i in range(begin, min(begin + BLOCK_ENTRIES, last)):
                    gap = np.uint64(gaps[i])
                    width, quotient = parameter, gap >> parameter
                    if quotient >= np.uint64(ESCAPE):
                        width, quotient = np.uint64(GAP_BITS), np.uint64(ESCAPE)
                    unary_at += int(quotient)
                    unary[unary_at >> 6] |= _ONE << np.uint64(unary_at & 63)
                    unary_at += 1
                    low = gap & ((_ONE << width) - _ONE)
                    shift = np.uint64(remainder_at & 63)
                    remainders[remainder_at >> 6] |= low << shift
                    if shift + width > np.uint64(64):
                        remainders[(remainder_at >> 6) + 1] |= low >> (np.uint64(64) - shift)
                    remainder_at += int(width)
        elif forms[s] == _BITMAP:
            position = bitmap_start - 1
            for i in range(at, last):
                position += int(gaps[i]) + 1
                bitmaps[position >> 3] |= np.uint8(1 << (position & 7))
            bitmap_start += sizes[s]
        at = last
    return unary_at, remainder_at


@jit
def _table_is_good(sizes: Any, counts: Any, forms: Any, nnz: int) -> bool:
    total = 0
    for s in range(sizes.size):
        total += counts[s]
        if counts[s] == 0 or counts[s] == sizes[s]:
            if forms[s] != _WHOLE:
                return False
        elif counts[s] > sizes[s] or (forms[s] != _RICE and forms[s] != _BITMAP):
            return False
    return total == nnz


@jit
def _load(data: Any, at: int, end: int) -> Any:
    """Return the word at a byte, with zeros for what lies at or behind the end."""
    if at + 8 <= end:
        return word_at(data, at)
    word = _NONE
    for i in range(at, end):
        word |= np.uint64(data[i]) << np.uint64(8 * (i - at))
    return word


@jit
def _read(data: Any, start: int, sizes: Any, counts: Any, forms: Any, indices: Any) -> int:
    """Write the indices that the planes from `start` on give; return their end, -1 to refuse."""
    blocks, entries = 0, 0
    for s in range(sizes.size):
        if forms[s] == _RICE:
            blocks += (counts[s] + BLOCK_ENTRIES - 1) // BLOCK_ENTRIES
            entries += counts[s]
    if start + blocks + 4 > data.size:
        return -1
    for i in range(start, start + blocks):
        if data[i] > GAP_BITS:
            return -1
    unary = start + blocks + 4
    remainders = unary + np.int64(_load(data, unary - 4, unary))
    if remainders > data.size:
        return -1
    end = _read_rice(data, start, unary, remainders, sizes, counts, forms, indices)
    if end < 0:
        return -1
    return _read_bitmaps(data, end, sizes, counts, forms, indices)


@jit
def _read_rice(
    data: Any,
    block: int,
    unary: int,
    remainders: int,
    sizes: Any,
    counts: Any,
    forms: Any,
    indices: Any,
) -> int:
    """Write the indices of whole and of Rice-coded segments; return the end of the planes."""
    room = 8 * (data.size - remainders)
    word, word_start, past, used = _load(data, unary, remainders), unary, 0, 0
    at, first = 0, 0
    for s in range(sizes.size):
        position = first - 1
        last = at + counts[s]
        if forms[s] == _WHOLE:
            for i in range(at, last):
                position += 1
                indices[i] = position
        elif forms[s] == _RICE:
            for begin in range(at, last, BLOCK_ENTRIES):
                parameter = int(data[block])
                block += 1
                for i in range(begin, min(begin + BLOCK_ENTRIES, last)):
                    while word == _NONE:
                        word_start += 8
                        if word_start >= remainders:
                            return -1
                        word = _load(data, word_start, remainders)
                    one = 8 * (word_start - unary) + int(trailing_zeros(word))
                    word &= word - _ONE
                    quotient, past = one - past, one + 1
                    width = parameter
                    if quotient >= ESCAPE:
                        if quotient > ESCAPE:
                            return -1
                        width, quotient = GAP_BITS, 0
                    if used + width > room:
                        return -1
                    window = _load(data, remainders + (used >> 3), data.size)
                    window >>= np.uint64(used & 7)
                    low = int(window & ((_ONE << np.uint64(width)) - _ONE))
                    position += (quotient << parameter) + low + 1
                    used += width
                    indices[i] = position
            if position - first >= sizes[s]:
                return -1
        first += sizes[s]
        at = last
    whole = remainders - unary == (past + 7) >> 3
    if not whole or word != _NONE:
        return -1
    if used & 7 and data[remainders + (used >> 3)] >> (used & 7):
        return -1
    return remainders + ((used + 7) >> 3)


@jit
def _read_bitmaps(data: Any, start: int, sizes: Any, counts: Any, forms: Any, indices: Any) -> int:
    """Write the indices of segments given by bitmaps; return the end of the bitmaps."""
    total = 0
    for s in range(sizes.size):
        if forms[s] == _BITMAP:
            total += sizes[s]
    end = start + ((total + 7) >> 3)
    if end > data.size or (total & 7 and data[end - 1] >> (total & 7)):
        return -1
    at, first, bit = 0, 0, 0
    for s in range(sizes.size):
        if forms[s] == _BITMAP:
            last = at + counts[s]
            found = at
            position = bit
            while position < bit + sizes[s]:
                word = _load(data, start + (position >> 3), end) >> np.uint64(position & 7)
                wide = min(56, bit + sizes[s] - position)
                word &= (_ONE << np.uint64(wide)) - _ONE
                while word != _NONE:
                    if found == last:
                        return -1
                    indices[found] = first + position - bit + np.int64(trailing_zeros(word))
                    word &= word - _ONE
                    found += 1
                position += wide
            if found != last:
                return -1
            bit += sizes[s]
        first += sizes[s]
        at += counts[s]
    return end
