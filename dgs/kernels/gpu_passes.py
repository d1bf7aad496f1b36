"""The passes of `dgs.kernels.gpu` over GPU memory, in Triton.

A model is cut into *blocks* that restart at every tensor. In the first pass one program takes one
block: it computes the candidates, and leaves a bit per entry, set where the candidate is at or
above the threshold, and their count. Prefix sums over the counts tell where in the output a block
goes, and the second pass, over the bits, writes indices and values there. So the order is that of
memory whatever order programs run in, no program waits for another, and however many entries are
chosen, they are found.

The first pass reads and writes what it cannot do without, and 1/32 more; between its loads and its
stores are no more instructions than memory leaves time for, which a prefix sum over all entries
would be. Every function here runs as it stands, on the CPU, where ``TRITON_INTERPRET=1`` is in the
environment when this module is imported.
"""

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl
from triton.runtime import JITFunction

__all__ = [
    "ACCUMULATE",
    "ADD",
    "INTERPRETED",
    "KEPT",
    "SUBTRACT",
    "WORD",
    "gather_words",
    "place_units",
    "select_blocks",
]

ACCUMULATE: Final = tl.constexpr(0)
"""The candidates are ``held + (left - right)``, and stay in `held`."""

ADD: Final = tl.constexpr(1)
"""The candidates are ``held + left``, and stay in `held`."""

SUBTRACT: Final = tl.constexpr(2)
"""The candidates are ``left - right``."""

KEPT: Final = tl.constexpr(3)
"""The candidates are in `held`, where an earlier pass has left them."""

WORD: Final = tl.constexpr(32)
"""Entries whose bits share a word."""


@triton.jit
def _select(
    held: tl.tensor,
    left: tl.tensor,
    right: tl.tensor,
    bound: tl.tensor,
    lane: tl.tensor,
    inside: tl.tensor,
    MODE: tl.constexpr,
) -> tl.tensor:
    """Compute the candidates of a block and return 1 where they are chosen; no mask: all inside."""
    value = tl.load(left + lane, mask=inside)
    if MODE != ADD:
        value -= tl.load(right + lane, mask=inside)
    if MODE != SUBTRACT:
        value = tl.load(held + lane, mask=inside) + value
        tl.store(held + lane, value, mask=inside)
    # by bits: subnormal numbers count, NaN is larger than infinity
    chosen = (value.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >= bound
    if inside is not None:
        chosen = chosen & inside
    return chosen.to(tl.int32)


@triton.jit
def select_blocks(
    held: tl.tensor,
    begins: tl.tensor,
    unit_of: tl.tensor,
    stops: tl.tensor,
    step: tl.tensor,
    words: tl.tensor,
    counts: tl.tensor,
    units: int,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Compute the candidates of one block and find those at or above its unit's bound.

    Args:
        held: flat float32; with `SUBTRACT`, anything.
        begins: int64, flat index of each block's first entry.
        unit_of: int32, the unit of each block.
        stops: int64, flat index where each unit ends.
        step: int64, three rows: where each unit's left and right operand would start if it held
            all units, as addresses; and the bits that a magnitude must reach, at least 1.
        words: int32, written: a bit per entry, ``BLOCK / WORD`` words a block.
        counts: int32, written: chosen entries of each block.
        units: number of units.
        MODE: what the candidates are.
        BLOCK: entries of a block, a power of two.
    """
    block = tl.program_id(0).to(tl.int64)
    begin = tl.load(begins + block)
    unit = tl.load(unit_of + block)
    left = tl.load(step + unit) + 4 * begin
    right = tl.load(step + units + unit) + 4 * begin
    bound = tl.load(step + 2 * units + unit).to(tl.int32)
    entries = tl.load(stops + unit) - begin

    ROWS: tl.constexpr = BLOCK // WORD
    floats: tl.constexpr = tl.pointer_type(tl.float32)
    row, column = tl.arange(0, ROWS), tl.arange(0, WORD)
    lane = row[:, None] * WORD + column[None, :]
    if (entries >= BLOCK) & (((4 * begin) | left | right) % 16 == 0):
        # as almost always: 16 bytes at a time
        mine = held + tl.multiple_of(begin, 4)
        from_left = tl.multiple_of(left.to(floats), 16)
        from_right = tl.multiple_of(right.to(floats), 16)
        chosen = _select(mine, from_left, from_right, bound, lane, None, MODE)
    else:
        inside = lane < entries
        chosen = _select(held + begin, left.to(floats), right.to(floats), bound, lane, inside, MODE)
    tl.store(words + block * ROWS + row, tl.sum(chosen << column[None, :], 1))
    tl.store(counts + block, tl.sum(chosen))


@triton.jit
def place_units(
    before: tl.tensor,
    first_blocks: tl.tensor,
    room: tl.tensor,
    counts: tl.tensor,
    places: tl.tensor,
    units: int,
    CHUNK: tl.constexpr,
) -> None:
    """Find each unit's count, and where in the output it goes; run by a single program.

    Args:
        before: int64, one more than blocks: entries chosen before each block, then all.
        first_blocks: int64, one more than units: the first block of each, then all blocks.
        room: int64, the most entries of each unit that are written.
        counts: int64, written: chosen entries of each unit.
        places: int64, two rows, written: what to add to `before` for a place in the output, and
            the place where the unit ends.
        units: number of units.
        CHUNK: units that are looked at together, a power of two.
    """
    written = tl.zeros([], tl.int64)
    unit = tl.arange(0, CHUNK).to(tl.int64)
    while tl.min(unit, 0) < units:
        there = unit < units
        begin = tl.load(before + tl.load(first_blocks + unit, mask=there, other=0))
        end = tl.load(before + tl.load(first_blocks + unit + 1, mask=there, other=0))
        kept = tl.minimum(end - begin, tl.load(room + unit, mask=there, other=0))
        stop = written + tl.cumsum(kept, 0)
        tl.store(counts + unit, end - begin, mask=there)
        tl.store(places + unit, stop - kept - begin, mask=there)
        tl.store(places + units + unit, stop, mask=there)
        written += tl.sum(kept, 0)
        unit += CHUNK


@triton.jit
def _ones(word: tl.tensor) -> tl.tensor:
    """Return how many bits are set."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    return (((word + (word >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24


@triton.jit
def gather_words(
    held: tl.tensor,
    begins: tl.tensor,
    unit_of: tl.tensor,
    step: tl.tensor,
    words: tl.tensor,
    before: tl.tensor,
    places: tl.tensor,
    indices: tl.tensor,
    values: tl.tensor,
    units: int,
    blocks: int,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Write what was chosen in a few blocks to where it belongs.

    Args:
        held: as `select_blocks` has left it.
        begins: as for `select_blocks`.
        unit_of: as for `select_blocks`.
        step: as for `select_blocks`.
        words: as `select_blocks` has written them.
        before: as for `place_units`.
        places: as `place_units` has written them.
        indices: written: flat indices of the chosen entries, ascending.
        values: float32, written: the candidates there.
        units: number of units.
        blocks: number of blocks.
        MODE: `KEPT` or `SUBTRACT`.
        BLOCK: entries of a block.
        TILE: words that a program looks at together: a power of two, those of a block or more.
    """
    ROWS: tl.constexpr = BLOCK // WORD
    floats: tl.constexpr = tl.pointer_type(tl.float32)
    first = tl.program_id(0).to(tl.int64) * (TILE // ROWS)
    number = tl.arange(0, TILE)
    block = first + number // ROWS
    there = block < blocks
    word = tl.load(words + first * ROWS + number, mask=there, other=0)
    ones = _ones(word)
    unit = tl.load(unit_of + block, mask=there, other=0)
    index = tl.load(begins + block, mask=there, other=0) + (number % ROWS) * WORD
    to = tl.load(before + first) + tl.cumsum(ones, 0) - ones + tl.load(places + unit)
    stop = tl.load(places + units + unit)
    if MODE == SUBTRACT:
        left = tl.load(step + unit)
        right = tl.load(step + units + unit)
    while tl.max(ones, 0) > 0:
        # the exponent of a power of two is the number of its bit; the sign is that of bit 31
        lowest = (word & -word).to(tl.float32).to(tl.int32, bitcast=True)
        at = index + (((lowest >> 23) & 255) - 127)
        inside = (ones > 0) & (to < stop)
        if MODE == KEPT:
            value = tl.load(held + at, mask=inside)
        else:
            value = tl.load((left + 4 * at).to(floats), mask=inside)
            value -= tl.load((right + 4 * at).to(floats), mask=inside)
        tl.store(indices + to, at.to(indices.dtype.element_ty), mask=inside)
        tl.store(values + to, value, mask=inside)
        word = word & (word - 1)
        ones -= 1
        to += 1


INTERPRETED: Final = not isinstance(select_blocks, JITFunction)
"""Whether the passes run on the CPU, by Triton's interpreter, instead of on a GPU."""
