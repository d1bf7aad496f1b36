"""Bit streams against a reading of them one bit at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgs.bits import (
    pack_positions,
    pack_unary,
    pack_widths,
    unpack_bits,
    unpack_unary,
    unpack_widths,
)
from dgs.errors import MalformedError

NUMBERS = st.lists(st.tuples(st.integers(0, 2**22 - 1), st.integers(0, 22)), max_size=80)


def as_text(data: np.ndarray) -> str:
    """Spell the bits of a stream in their order."""
    return "".join(f"{byte:08b}"[::-1] for byte in data.tolist())


def padded(text: str) -> str:
    return text + "0" * (-len(text) % 8)


@given(st.lists(st.integers(0, 70), max_size=80))
def test_unary_plane_is_zeros_and_a_one_per_number(numbers: list[int]) -> None:
    plane = pack_unary(np.array(numbers, np.int64))
    assert as_text(plane) == padded("".join("0" * n + "1" for n in numbers))
    assert unpack_unary(plane, len(numbers)).tolist() == numbers


@given(NUMBERS)
def test_remainder_plane_is_the_low_bits_of_each_number(pairs: list[tuple[int, int]]) -> None:
    numbers = np.array([n for n, _ in pairs], np.int64)
    widths = np.array([w for _, w in pairs], np.uint8)
    plane = pack_widths(numbers, widths)
    low = [n % 2**w for n, w in pairs]
    text = "".join(f"{n:0{w}b}"[::-1] if w else "" for n, (_, w) in zip(low, pairs, strict=True))
    assert as_text(plane) == padded(text)
    assert unpack_widths(plane, widths).tolist() == low


@pytest.mark.parametrize("count", [2**14 - 1, 2**14, 2**14 + 1, 40_000])
def test_streams_longer_than_one_chunk_come_back(count: int) -> None:
    rng = np.random.default_rng(count)
    widths = rng.integers(0, 33, count, np.uint8)
    numbers = rng.integers(0, 2**32, count) & ((1 << widths.astype(np.int64)) - 1)
    assert np.array_equal(unpack_widths(pack_widths(numbers, widths), widths), numbers)


@given(st.lists(st.booleans(), max_size=80))
def test_bitmap_comes_back(bits: list[bool]) -> None:
    plane = pack_positions(np.flatnonzero(bits).astype(np.int64), len(bits))
    assert as_text(plane) == padded("".join("01"[b] for b in bits))
    assert unpack_bits(plane, len(bits), "bitmap").astype(bool).tolist() == bits


@settings(max_examples=50)
@given(st.binary(max_size=20), st.integers(0, 200))
def test_unary_plane_of_another_count_is_refused(data: bytes, count: int) -> None:
    ones = sum(byte.bit_count() for byte in data)
    plane = np.frombuffer(data, np.uint8)
    if count == ones and (not data or data[-1]):
        assert unpack_unary(plane, count).size == count
    else:
        with pytest.raises(MalformedError, match="unary plane"):
            unpack_unary(plane, count)


def test_padding_that_is_not_zero_is_refused() -> None:
    plane = np.array([0xFF], np.uint8)
    with pytest.raises(MalformedError, match="padding"):
        unpack_bits(plane, 7, "bitmap")
    with pytest.raises(MalformedError, match="padding"):
        unpack_widths(plane, np.array([3, 4], np.uint8))
