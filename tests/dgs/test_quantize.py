"""Values: decoding is exact and defined, rounding is bounded, bad payloads are refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgs.config import Values
from dgs.errors import ConfigError, MalformedError, NonFiniteError
from dgs.quantize import (
    SCALED_KINDS,
    VALUE_KINDS,
    block_lengths,
    dequantize,
    first_non_finite,
    num_blocks,
    payload_bytes,
    quantize,
)

LARGEST = float(np.finfo(np.float32).max)
NORMAL = float(np.finfo(np.float32).smallest_normal)

ANY_FLOAT = st.floats(width=32, allow_nan=False, allow_infinity=False)
PLAIN_FLOAT = st.floats(-10, 10, width=32)
TINY_FLOAT = st.floats(-(2.0**-120), 2.0**-120, width=32)
HUGE_FLOAT = st.sampled_from([LARGEST, -LARGEST, LARGEST / 2, float(np.float32(3e38))])
VALUES = st.one_of(
    [st.lists(f, max_size=60) for f in (ANY_FLOAT, PLAIN_FLOAT, TINY_FLOAT, HUGE_FLOAT)]
)
kinds = pytest.mark.parametrize("kind", VALUE_KINDS)
scaled_kinds = pytest.mark.parametrize("kind", sorted(SCALED_KINDS))


def split(values: list[float], seed: int) -> tuple[np.ndarray, list[int]]:
    """Cut values into a few segments, some of them empty."""
    cuts = sorted(np.random.default_rng(seed).integers(0, len(values) + 1, 3).tolist())
    return np.array(values, np.float32), np.diff([0, *cuts, len(values)]).tolist()


def mixed(count: int, seed: int = 0) -> np.ndarray:
    """Draw heavy-tailed values with ties and zeros."""
    rng = np.random.default_rng(seed)
    values = rng.standard_t(2, count).astype(np.float32)
    values[rng.random(count) < 0.1] = 0.5
    values[rng.random(count) < 0.05] = 0.0
    return values


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


def test_kinds_keep_their_numbers() -> None:
    assert VALUE_KINDS == ("float32", "bfloat16", "int8", "int4", "int2", "sign")


@kinds
@given(values=VALUES, seed=st.integers(0, 99))
def test_decoded_is_what_the_other_side_reads(kind: Values, values: list[float], seed: int) -> None:
    array, counts = split(values, seed)
    q = quantize(array, counts, kind)
    assert q.codes.size == payload_bytes(len(values), kind)
    assert q.scales.size == (num_blocks(counts) if kind in SCALED_KINDS else 0)
    assert same_bits(dequantize(q.codes.tobytes(), q.scales, counts, kind), q.decoded)
    assert first_non_finite(q.decoded) is None


@kinds
@pytest.mark.parametrize("count", [1, 2, 3, 7, 1023, 1024, 1025, 4099])
def test_every_length_comes_back(kind: Values, count: int) -> None:
    values, counts = mixed(count), [0, count // 2, 0, count - count // 2]
    q = quantize(values, counts, kind)
    assert same_bits(dequantize(memoryview(q.codes.tobytes()), q.scales, counts, kind), q.decoded)


@given(values=VALUES)
def test_float32_is_exact(values: list[float]) -> None:
    array = np.array(values, np.float32)
    assert same_bits(quantize(array, [len(values)], "float32").decoded, array)


@given(value=ANY_FLOAT)
def test_bfloat16_is_the_nearest_with_ties_to_even(value: float) -> None:
    decoded = float(quantize([value], [1], "bfloat16").decoded[0])
    bits = int(np.float32(abs(value)).view(np.uint32))
    below, above = (
        float(np.uint32(b & 0xFFFFFFFF).view(np.float32))
        for b in (bits & 0xFFFF0000, (bits & 0xFFFF0000) + 0x10000)
    )
    to_below, to_above = abs(value) - below, above - abs(value)
    if to_below != to_above:
        nearest = below if to_below < to_above else above
    else:
        nearest = above if bits & 0x10000 else below
    if math.isinf(above):
        nearest = below
    assert decoded == math.copysign(nearest, value)


@pytest.mark.parametrize(("kind", "limit"), [("int8", 127), ("int4", 7)])
@given(values=VALUES)
def test_integers_are_within_half_a_step(kind: Values, limit: int, values: list[float]) -> None:
    array = np.array(values, np.float32)
    q = quantize(array, [len(values)], kind)
    if not values:
        return
    scale, largest = float(q.scales[0]), float(np.abs(array).max())
    assert scale == pytest.approx(largest / limit, rel=1e-6) or (
        scale == 0 and largest / limit < NORMAL
    )
    errors = np.abs(q.decoded.astype(np.float64) - array)
    bound = scale * (0.5 + 2.0**-16) if scale else limit * NORMAL
    assert errors.max() <= bound


@pytest.mark.parametrize("kind", ["int2", "sign"])
@given(values=VALUES, seed=st.integers(0, 99))
def test_coarse_kinds_never_increase_the_norm_of_a_block(
    kind: Values, values: list[float], seed: int
) -> None:
    array, counts = split(values, seed)
    decoded = quantize(array, counts, kind).decoded.astype(np.float64)
    ends = np.cumsum(block_lengths(counts))
    for start, stop in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=False):
        before = array[start:stop].astype(np.float64)
        error = np.square(decoded[start:stop] - before).sum()
        assert error <= np.square(before).sum() * (1 + 1e-6)


@pytest.mark.parametrize(
    ("kind", "bound"),
    [("bfloat16", 4e-6), ("int8", 4e-4), ("int4", 5e-2), ("int2", 5e-2), ("sign", 0.25)],
)
def test_relative_error_of_top_entries_is_small(kind: Values, bound: float) -> None:
    drawn = np.random.default_rng(5).laplace(size=100_000).astype(np.float32)
    values = drawn[np.argsort(np.abs(drawn))[-1000:]]
    errors = quantize(values, [1000], kind).decoded - values
    assert np.square(errors).sum() <= bound * np.square(values).sum()


@kinds
def test_blocks_restart_at_each_segment(kind: Values) -> None:
    values, counts = mixed(3000), [1, 0, 1500, 1499]
    whole = quantize(values, counts, kind).decoded
    parts = [
        quantize(values[a:b], [b - a], kind).decoded
        for a, b in [(0, 1), (1, 1025), (1025, 1501), (1501, 2525), (2525, 3000)]
    ]
    assert block_lengths(counts).tolist() == [1, 1024, 476, 1024, 475]
    assert same_bits(whole, np.concatenate(parts))


@scaled_kinds
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, -1e-40, NORMAL, -LARGEST, LARGEST])
def test_extreme_blocks_decode_to_finite_values(kind: Values, value: float) -> None:
    q = quantize(np.full(5, value, np.float32), [5], kind)
    assert np.isfinite(q.decoded).all()
    assert ((q.scales == 0) | (q.scales >= NORMAL)).all()
    assert float(np.abs(q.decoded[0])) == pytest.approx(abs(value), rel=1e-6, abs=127 * NORMAL)


@kinds
def test_no_values_take_no_bytes(kind: Values) -> None:
    q = quantize([], [0, 0], kind)
    assert (q.codes.size, q.scales.size, q.decoded.size) == (0, 0, 0)
    assert dequantize(b"", [], [0, 0], kind).size == 0


@kinds
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(kind: Values, bad: float) -> None:
    with pytest.raises(NonFiniteError, match="entry 1 "):
        quantize([1.0, bad, 2.0], [3], kind)


def test_counts_that_do_not_match_are_refused() -> None:
    with pytest.raises(ConfigError, match="counts sum to 3"):
        quantize([1.0], [3], "int8")


@scaled_kinds
@pytest.mark.parametrize(
    "scale", [np.nan, np.inf, -1.0, -0.0, 1e-40, float(np.nextafter(np.float32(NORMAL), 0))]
)
def test_scales_out_of_range_are_refused(kind: Values, scale: float) -> None:
    with pytest.raises(MalformedError, match="scale of block 1"):
        dequantize(bytes(payload_bytes(2, kind)), [1.0, scale], [1, 1], kind)


@pytest.mark.parametrize(("kind", "limit"), [("int8", 127), ("int4", 7), ("int2", 3)])
def test_largest_scale_is_the_last_without_overflow(kind: Values, limit: int) -> None:
    largest = np.float32(LARGEST / limit)
    if float(largest) * limit > LARGEST:
        largest = np.nextafter(largest, np.float32(0))
    payload = quantize([1.0], [1], kind).codes
    assert np.isfinite(dequantize(payload, [largest], [1], kind)).all()
    with pytest.raises(MalformedError, match="scale"):
        dequantize(payload, [np.nextafter(largest, np.float32(np.inf))], [1], kind)


@pytest.mark.parametrize(("kind", "payload"), [("int8", b"\x80"), ("int4", b"\x08")])
def test_codes_without_a_level_are_refused(kind: Values, payload: bytes) -> None:
    with pytest.raises(MalformedError, match="leaves out"):
        dequantize(payload, [1.0], [1], kind)


@pytest.mark.parametrize(("kind", "payload"), [("int4", 0x11), ("int2", 0x40), ("sign", 0x08)])
def test_padding_that_is_not_zero_is_refused(kind: Values, payload: int) -> None:
    entries = {"int4": 1, "int2": 3, "sign": 3}[kind]
    with pytest.raises(MalformedError, match="padding"):
        dequantize(bytes([payload]), [1.0], [entries], kind)


@kinds
def test_lengths_that_do_not_match_are_refused(kind: Values) -> None:
    q = quantize(mixed(9), [9], kind)
    for payload in (q.codes.tobytes() + b"\0", q.codes.tobytes()[:-1]):
        with pytest.raises(MalformedError, match="payload has"):
            dequantize(payload, q.scales, [9], kind)
    with pytest.raises(MalformedError, match="scales given"):
        dequantize(q.codes, [*q.scales, 1.0], [9], kind)


@settings(max_examples=60)
@given(st.lists(st.sampled_from([1.0, np.nan, np.inf, -np.inf, 0.0]), max_size=6))
def test_first_non_finite_is_the_first(values: list[float]) -> None:
    expected = next((i for i, v in enumerate(values) if not math.isfinite(v)), None)
    assert first_non_finite(np.array(values, np.float32)) == expected
