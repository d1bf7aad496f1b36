"""Bodies: every message comes back, costs what it should, and damaged ones are refused."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgs.codec import decode_body, encode_body, max_body_bytes
from dgs.config import Values
from dgs.errors import ConfigError, DgsError, MalformedError, NonFiniteError
from dgs.quantize import SCALED_KINDS, VALUE_KINDS, num_blocks, payload_bytes, quantize
from dgs.space import SEGMENT_LIMIT

kinds = pytest.mark.parametrize("kind", VALUE_KINDS)
WHOLE, BITMAP, RICE = range(3)


def draw_support(rng: np.random.Generator, size: int, style: str) -> np.ndarray:
    """Draw the entries of one segment: none, all, one, random, clustered or at the ends."""
    if size == 0 or style == "none":
        return np.empty(0, np.int64)
    if style == "all":
        return np.arange(size)
    if style == "one":
        return rng.integers(0, size, 1)
    if style == "half":
        return np.flatnonzero(rng.random(size) < 0.5)
    if style == "sparse":
        return np.flatnonzero(rng.random(size) < 0.02)
    if style == "ends":
        return np.unique([0, size - 1])
    start = int(rng.integers(0, size))  # "cluster"
    return np.arange(start, min(size, start + size // 10 + 1))


STYLES = ("none", "all", "one", "half", "sparse", "ends", "cluster")
SEGMENTS = st.lists(
    st.tuples(st.sampled_from([0, 1, 2, 31, 64, 1000, 5003]), st.sampled_from(STYLES)), max_size=6
)


def draw_message(segments: list[tuple[int, str]], seed: int) -> tuple[np.ndarray, ...]:
    """Return indices, values and segment sizes."""
    rng = np.random.default_rng(seed)
    sizes = np.array([size for size, _ in segments], np.int64)
    starts = np.cumsum(sizes) - sizes
    parts = [s + draw_support(rng, *seg) for s, seg in zip(starts, segments, strict=True)]
    indices = np.concatenate([np.empty(0, np.int64), *parts])
    values = (rng.standard_t(2, indices.size) * 10.0 ** rng.integers(-40, 30)).astype(np.float32)
    return indices, values, sizes


def table(body: bytes, segments: int) -> list[tuple[int, int]]:
    """Read (entries, form) of each segment."""
    words = np.frombuffer(body[: 4 * segments], "<u4").tolist()
    return [(w & (2**30 - 1), w >> 30) for w in words]


def index_bits(body: bytes, nnz: int, kind: Values, counts: np.ndarray) -> int:
    scales = 4 * num_blocks(counts) if kind in SCALED_KINDS else 0
    return 8 * (len(body) - scales - payload_bytes(nnz, kind))


@kinds
@settings(max_examples=40)
@given(segments=SEGMENTS, seed=st.integers(0, 2**32))
def test_every_message_comes_back(kind: Values, segments: list[tuple[int, str]], seed: int) -> None:
    indices, values, sizes = draw_message(segments, seed)
    encoded = encode_body(indices, values, sizes, kind)
    got_indices, got_values = decode_body(encoded.body, sizes, kind, len(indices))
    assert got_indices.dtype == np.int64
    assert np.array_equal(got_indices, indices)
    assert got_values.tobytes() == encoded.decoded.tobytes()
    counts = np.histogram(indices, np.concatenate(([0], np.cumsum(sizes))))[0]
    if len(sizes) and sizes.all():
        assert encoded.decoded.tobytes() == quantize(values, counts, kind).decoded.tobytes()


@pytest.mark.parametrize("make", [bytes, bytearray, memoryview])
def test_any_buffer_can_be_decoded(make: type) -> None:
    body = encode_body([1, 5], [1.0, 2.0], [9], "float32").body
    assert decode_body(make(body), [9], "float32", 2)[1].tolist() == [1.0, 2.0]


@pytest.mark.parametrize(("density", "most_bits"), [(0.01, 8.16), (0.001, 11.52)])
def test_random_supports_cost_little_more_than_their_entropy(
    density: float, most_bits: float
) -> None:
    rng = np.random.default_rng(1)
    sizes = np.full(8, SEGMENT_LIMIT if density < 0.01 else SEGMENT_LIMIT // 8)
    total = int(sizes.sum())
    indices = np.unique(rng.integers(0, total, int(total * density * 1.0005)))
    assert indices.size / total == pytest.approx(density, rel=0.01)
    values = np.ones(indices.size, np.float32)
    body = encode_body(indices, values, sizes, "sign").body
    counts = np.histogram(indices, np.concatenate(([0], np.cumsum(sizes))))[0]
    assert index_bits(body, indices.size, "sign", counts) / indices.size <= most_bits


def test_clustered_supports_cost_less_than_random_ones() -> None:
    size, rng = 2**20, np.random.default_rng(2)
    rows = np.sort(rng.choice(1024, 64, replace=False))
    inside = np.sort(rng.choice(64 * 1024, size // 100, replace=False))
    indices = rows[inside // 1024] * 1024 + inside % 1024
    body = encode_body(indices, np.ones(indices.size), [size], "sign").body
    assert index_bits(body, indices.size, "sign", np.array([indices.size])) / indices.size < 5.0


def rice_cost(gaps: np.ndarray, r: int) -> int:
    """Count the bits of a block, gap by gap."""
    return sum((g >> r) + 1 + r if g >> r < 16 else 17 + 22 for g in gaps.tolist())


@pytest.mark.parametrize("seed", range(6))
def test_form_and_parameters_are_the_cheapest_of_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = 60_000
    gaps = np.floor(rng.exponential([0.6, 3, 40, 0.01, 700, 9][seed], 2500)).astype(np.int64)
    gaps[rng.random(gaps.size) < 0.002] += 4000
    indices = np.cumsum(gaps + 1) - 1
    indices = indices[indices < size]
    gaps = gaps[: indices.size]
    blocks = [gaps[a : a + 1024] for a in range(0, gaps.size, 1024)]
    cheapest = [min(rice_cost(b, r) for r in range(23)) for b in blocks]
    rice_bits = sum(cheapest) + 8 * len(blocks)
    body = encode_body(indices, np.ones(indices.size), [size], "float32").body
    [(count, form)] = table(body, 1)
    assert (count, form) == (indices.size, RICE if rice_bits < size else BITMAP)
    spent = index_bits(body, indices.size, "float32", np.array([count])) - 64  # table and length
    assert min(rice_bits, size) <= spent <= min(rice_bits, size) + 14  # two paddings


def test_each_support_takes_the_form_made_for_it() -> None:
    segments = [(1000, "none"), (1000, "all"), (1000, "half"), (1000, "sparse"), (0, "none")]
    indices, values, sizes = draw_message(segments, 3)
    forms = [form for _, form in table(encode_body(indices, values, sizes, "int8").body, 5)]
    assert forms == [WHOLE, WHOLE, BITMAP, RICE, WHOLE]


def test_complete_message_has_no_indices() -> None:
    body = encode_body(np.arange(5000), np.ones(5000), [2000, 3000], "float32").body
    assert len(body) == 2 * 4 + 4 + 5000 * 4


def test_entries_at_both_ends_of_the_longest_segment_come_back() -> None:
    indices = [0, SEGMENT_LIMIT - 1, SEGMENT_LIMIT, 2 * SEGMENT_LIMIT - 1]
    sizes = [SEGMENT_LIMIT, SEGMENT_LIMIT]
    body = encode_body(indices, np.ones(4), sizes, "float32").body
    assert len(body) < 60
    assert decode_body(body, sizes, "float32", 4)[0].tolist() == indices


@pytest.mark.parametrize(
    ("indices", "sizes", "message"),
    [
        ([0, 0], [4], "strictly increasing"),
        ([2, 1], [4], "strictly increasing"),
        ([-1, 1], [4], "must be in"),
        ([1, 4], [4], "must be in"),
        ([0, 1], [SEGMENT_LIMIT + 1], "segment sizes"),
        ([0, 1], [-1, 4], "segment sizes"),
        ([0, 1, 2], [4], "counts sum"),
    ],
)
def test_messages_that_cannot_be_are_not_encoded(
    indices: list[int], sizes: list[int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        encode_body(indices, [1.0, 2.0], sizes, "float32")


def test_values_that_are_not_finite_are_not_encoded() -> None:
    with pytest.raises(NonFiniteError, match="entry 1 "):
        encode_body([0, 1], [1.0, np.nan], [4], "int4")


def rice_body(parameter: int, unary: bytes, remainders: bytes, count: int) -> bytes:
    """Write a body of one Rice-coded segment with float32 zeros."""
    word = (count | RICE << 30).to_bytes(4, "little")
    length = len(unary).to_bytes(4, "little")
    return word + bytes([parameter]) + length + unary + remainders + bytes(4 * count)


def test_rice_body_written_by_hand_is_read() -> None:
    body = rice_body(2, b"\x05", b"\x0b", 2)  # quotients 0, 1; remainders 3, 2
    assert decode_body(body, [100], "float32", 2)[0].tolist() == [3, 10]


def test_escaped_gap_written_by_hand_is_read() -> None:
    # quotients 16 (the whole gap, 1000, follows) and 0 (its low two bits, 3, follow)
    remainders = (1000 | 3 << 22).to_bytes(3, "little")
    body = rice_body(2, b"\0\0\x03", remainders, 2)
    assert decode_body(body, [5000], "float32", 2)[0].tolist() == [1000, 1004]


@pytest.mark.parametrize(
    ("body", "size", "message"),
    [
        (rice_body(23, b"\x05", bytes(6), 2), 100, "Rice parameter is 23"),
        (rice_body(2, b"\x07", b"\x0b", 2), 100, "holds 3 numbers"),
        (rice_body(2, b"\x05\x00", b"\x0b", 2), 100, "2 bytes where 1"),
        (rice_body(2, b"\x05", b"\x1b", 2), 100, "padding"),
        (rice_body(2, b"\x05", b"\x0b", 2), 10, "leave 1 of their segments"),
        (rice_body(2, bytes(2) + b"\x03", b"\xff" * 3, 2), 2**22, "leave 1 of their"),
        (rice_body(2, bytes(2) + b"\x06", bytes(3), 2), 100, "quotient is 17"),
        (rice_body(2, b"\x05", b"\x0b", 2) + b"\0", 100, "1 bytes follow"),
        (rice_body(2, b"\x05", b"\x0b", 2)[:-1], 100, "value payload takes 8 bytes"),
        (rice_body(2, b"\x05", b"\x0b", 2), 2, "cannot have 2 entries in form 2"),
        (rice_body(2, b"\x05", b"\x0b", 2), 1, "cannot have 2 entries in form 2"),
        (b"\x02\0\0\xc0" + bytes(20), 100, "cannot have 2 entries in form 3"),
        (b"\x02\0\0\x00" + bytes(20), 100, "cannot have 2 entries in form 0"),
        (b"\x00\0\0\x40" + bytes(20), 100, "cannot have 0 entries in form 1"),
        (b"\x01\0\0\x40" + bytes(20), 100, "counts 1 entries, the header 2"),
        (b"\x02\0\0\x40" + bytes(4) + b"\x07" + bytes(8), 3, "cannot have|as many ones"),
        (b"\x02\0\0\x40" + bytes(4) + b"\x07" + bytes(8), 4, "as many ones"),
        (b"\x02\0\0\x40" + bytes(4) + b"\x13" + bytes(8), 4, "padding"),
        (b"\x02\0\0", 4, "segment table takes 4 bytes"),
    ],
)
def test_bodies_that_break_a_rule_are_refused_by_name(body: bytes, size: int, message: str) -> None:
    with pytest.raises(MalformedError, match=message):
        decode_body(body, [size], "float32", 2)


@kinds
@settings(max_examples=40)
@given(segments=SEGMENTS, seed=st.integers(0, 2**32))
def test_no_message_is_longer_than_the_bound(
    kind: Values, segments: list[tuple[int, str]], seed: int
) -> None:
    indices, values, sizes = draw_message(segments, seed)
    body = encode_body(indices, values, sizes, kind).body
    assert len(body) <= max_body_bytes(int(sizes.sum()), len(sizes))


@kinds
@pytest.mark.parametrize("size", [1, 2, 1025])
def test_many_small_segments_stay_below_the_bound_that_counts_them(kind: Values, size: int) -> None:
    sizes = np.full(2000, size)
    for every in (1, 2):
        indices = np.arange(0, sizes.sum(), every)
        body = encode_body(indices, np.ones(indices.size), sizes, kind).body
        assert len(body) <= max_body_bytes(int(sizes.sum()), len(sizes))
    assert max_body_bytes(600_000, 600_000) > 6 * 600_000 + (1 << 20)  # tables are what counts


def test_the_bound_holds_for_other_writers_and_is_hardly_higher_than_what_they_can_reach() -> None:
    size, count = 100_001, 100_000  # all but the last entry, each with the largest parameter
    blocks = -(-count // 1024)
    unary, remainders = b"\xff" * (count // 8), bytes(count * 22 // 8)
    word = (count | RICE << 30).to_bytes(4, "little")
    length = len(unary).to_bytes(4, "little")
    body = word + b"\x16" * blocks + length + unary + remainders + bytes(4 * count)
    assert decode_body(body, [size], "float32", count)[0].tolist() == list(range(count))
    assert 0.999 * max_body_bytes(size, 1) < len(body) <= max_body_bytes(size, 1)


def check_any(body: bytes, sizes: np.ndarray, kind: Values, nnz: int) -> bool:
    """Decode bytes of any origin; whatever is accepted must be a valid message."""
    try:
        indices, values = decode_body(body, sizes, kind, nnz)
    except DgsError:
        return False
    assert indices.size == values.size == nnz
    assert (np.diff(indices) > 0).all()
    assert nnz == 0 or (indices[0] >= 0 and indices[-1] < sizes.sum())
    if kind in SCALED_KINDS:
        assert np.isfinite(values).all()
    return True


SMALL = [(40, "half"), (9, "all"), (300, "sparse"), (0, "none"), (64, "half"), (5, "none")]


@kinds
def test_every_changed_byte_gives_a_valid_message_or_none(kind: Values) -> None:
    indices, values, sizes = draw_message(SMALL, 4)
    values = np.clip(values, -1, 1)
    body = encode_body(indices, values, sizes, kind).body
    assert {form for _, form in table(body, len(sizes))} == {WHOLE, BITMAP, RICE}
    accepted = 0
    for at in range(len(body)):
        for flip in (0x01, 0x10, 0x80, 0xFF):
            damaged = bytearray(body)
            damaged[at] ^= flip
            accepted += check_any(bytes(damaged), sizes, kind, len(indices))
    assert accepted < 4 * len(body)


@kinds
def test_every_cut_or_lengthened_body_is_refused(kind: Values) -> None:
    indices, values, sizes = draw_message(SMALL, 5)
    body = encode_body(indices, values, sizes, kind).body
    assert not any(check_any(body[:n], sizes, kind, len(indices)) for n in range(len(body)))
    assert not check_any(body + b"\0", sizes, kind, len(indices))


@kinds
@settings(max_examples=40)
@given(data=st.data())
def test_random_damage_gives_a_valid_message_or_none(kind: Values, data: st.DataObject) -> None:
    segments = data.draw(SEGMENTS)
    indices, values, sizes = draw_message(segments, data.draw(st.integers(0, 99)))
    body = bytearray(encode_body(indices, values, sizes, kind).body)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(body)))
        cut = data.draw(st.integers(0, 3))
        body[at : at + cut] = data.draw(st.binary(max_size=4))
    nnz = len(indices) + data.draw(st.sampled_from([0, 0, 0, -1, 1, 2**60]))
    check_any(bytes(body), sizes, kind, max(nnz, 0))


@kinds
@settings(max_examples=40)
@given(body=st.binary(max_size=200), nnz=st.integers(0, 300))
def test_random_bytes_give_a_valid_message_or_none(kind: Values, body: bytes, nnz: int) -> None:
    check_any(body, np.array([3, 0, 300], np.int64), kind, nnz)


def lies() -> list[tuple[bytes, int]]:
    """Return short bodies, with their number of entries, that announce much more than they hold."""
    full, most = SEGMENT_LIMIT.to_bytes(4, "little"), SEGMENT_LIMIT - 1
    rice, bitmap = ((most | form << 30).to_bytes(4, "little") for form in (RICE, BITMAP))
    return [
        (full * 64 + bytes(100), 64 * SEGMENT_LIMIT),
        (rice * 64 + bytes(100), 64 * most),
        (bitmap * 64 + bytes(100), 64 * most),
        ((1 | RICE << 30).to_bytes(4, "little") + bytes(253) + b"\xff" * 100, 1),
        ((1 | BITMAP << 30).to_bytes(4, "little") + bytes(253) + b"\xff" * 100, 1),
        (bytes(256), 2**60),
    ]


@kinds
@pytest.mark.parametrize("lie", range(6))
def test_refusing_a_body_costs_no_more_than_its_bytes(kind: Values, lie: int) -> None:
    body, nnz = lies()[lie]
    sizes = np.full(64, SEGMENT_LIMIT)
    tracemalloc.start()
    try:
        with pytest.raises(MalformedError):
            decode_body(body, sizes, kind, nnz)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100_000


def test_no_body_costs_more_than_a_stated_multiple_of_its_bytes() -> None:
    sizes = np.array([200_000, 200_000])
    for indices in (np.arange(400_000), np.arange(0, 400_000, 3)):
        body = encode_body(indices, np.ones(indices.size), sizes, "sign").body
        tracemalloc.start()
        try:
            decode_body(body, sizes, "sign", indices.size)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak <= 512 * len(body)
