"""Bodies coded by the compiled codec are those of `dgs.codec`, and so are its refusals."""

from __future__ import annotations

from types import ModuleType
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from dgs import codec
from dgs.config import Values
from dgs.errors import ConfigError, DgsError, MalformedError, NonFiniteError
from tests.dgs.kernels.conftest import SHAPES, make

KINDS: tuple[Values, ...] = get_args(Values)


def _message(
    sizes: list[int], density: float, number: int, clustered: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(number)
    total = sum(sizes)
    chosen = rng.random(total) < density
    if clustered:
        chosen &= np.repeat(rng.random(total // 512 + 1) < 0.05, 512)[:total]
    indices = np.flatnonzero(chosen)
    return indices, make(SHAPES[number % len(SHAPES)], indices.size, number)


def _agree(
    fast: ModuleType, sizes: list[int], indices: np.ndarray, values: np.ndarray, kind: Values
) -> bytes:
    expected = codec.encode_body(indices, values, sizes, kind)
    got = fast.encode_body(indices, values, sizes, kind)
    assert got.body == expected.body
    assert got.decoded.tobytes() == expected.decoded.tobytes()
    decoded = fast.decode_body(got.body, sizes, kind, indices.size)
    assert decoded[0].tolist() == indices.tolist()
    assert decoded[1].tobytes() == expected.decoded.tobytes()
    return got.body


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("density", [0.0, 0.001, 0.01, 0.2, 0.6, 1.0])
def test_bodies_are_those_of_the_definition(fast: ModuleType, kind: Values, density: float) -> None:
    sizes = [0, 1, 7000, 64, 0, 200_000, 33, 1]
    for number, clustered in enumerate((False, True, False)):
        _agree(fast, sizes, *_message(sizes, density, number, clustered), kind)


def test_empty_messages_are_those_of_the_definition(fast: ModuleType) -> None:
    nothing = np.zeros(0, np.int64), np.zeros(0, np.float32)
    for sizes in ([], [0], [5], [0, 1 << 22]):
        _agree(fast, sizes, *nothing, "int8")


def test_escapes_and_the_longest_gap_are_coded_alike(fast: ModuleType) -> None:
    sizes = [1 << 22, 1 << 22]
    near = np.arange(0, 4000, 2)
    indices = np.concatenate((near, [(1 << 22) - 1], near + (1 << 22), [(1 << 23) - 1]))
    _agree(fast, sizes, indices, np.ones(indices.size, np.float32), "sign")
    last = np.array([(1 << 22) - 1])
    _agree(fast, sizes, last, np.ones(1, np.float32), "float32")


@pytest.mark.parametrize(
    ("indices", "sizes", "error"),
    [
        ([3, 3], [9], ConfigError),
        ([3, 2], [9], ConfigError),
        ([-1], [9], ConfigError),
        ([9], [9], ConfigError),
        ([0], [], ConfigError),
        ([0], [(1 << 22) + 1], ConfigError),
        ([0], [-1, 5], ConfigError),
        ([0], [5], NonFiniteError),
        ([0, 1, 2], [5], ConfigError),
    ],
)
def test_what_cannot_be_coded_is_refused_in_the_same_words(
    fast: ModuleType, indices: list[int], sizes: list[int], error: type[DgsError]
) -> None:
    values = np.array([np.inf, 1.0], np.float32)[: len(indices)]
    with pytest.raises(error) as expected:
        codec.encode_body(indices, values, sizes, "float32")
    with pytest.raises(error) as got:
        fast.encode_body(indices, values, sizes, "float32")
    assert str(got.value) == str(expected.value)


def _outcome(module: ModuleType, body: bytes, sizes: list[int], kind: Values, nnz: int) -> object:
    try:
        indices, values = module.decode_body(body, sizes, kind, nnz)
    except MalformedError as error:
        return str(error)
    return indices.tobytes(), values.tobytes()


@seed(0)
@settings(max_examples=150, deadline=None)
@given(
    number=st.integers(0, 1 << 20),
    density=st.sampled_from([0.01, 0.1, 0.3, 0.9]),
    kind=st.sampled_from(KINDS),
    damage=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=3),
    cut=st.integers(-2, 9),
)
def test_damaged_bodies_meet_the_same_end(
    number: int, density: float, kind: Values, damage: list[tuple[float, int]], cut: int
) -> None:
    cpu = pytest.importorskip("dgs.kernels.cpu")
    sizes = [0, 3000, 70, 5, 900]
    indices, values = _message(sizes, density, number)
    whole = codec.encode_body(indices, values, sizes, kind).body
    body = bytearray(whole)
    for place, flips in damage:
        body[int(place * (len(body) - 1))] ^= flips
    body = body[:-cut] if cut > 0 else body + bytes(-cut)
    for given_nnz in (indices.size, indices.size + 1):
        expected = _outcome(codec, bytes(body), sizes, kind, given_nnz)
        assert _outcome(cpu, bytes(body), sizes, kind, given_nnz) == expected


def test_every_cut_of_a_body_is_refused_in_the_same_words(fast: ModuleType) -> None:
    sizes = [2000, 90, 8]
    indices, values = _message(sizes, 0.1, 3)
    body = codec.encode_body(indices, values, sizes, "int4").body
    for end in range(len(body)):
        expected = _outcome(codec, body[:end], sizes, "int4", indices.size)
        assert _outcome(fast, body[:end], sizes, "int4", indices.size) == expected
        assert isinstance(expected, str)


def test_padding_in_the_planes_is_refused_in_the_same_words(fast: ModuleType) -> None:
    sizes = [500]
    indices = np.array([3, 99, 201, 299, 404])
    body = codec.encode_body(indices, np.ones(5, np.float32), sizes, "float32").body
    table, parameters, unary = 4, 1, int.from_bytes(body[5:9], "little")
    remainders = table + parameters + 4 + unary
    used = body[table] * indices.size  # bits; no gap is escaped
    assert used % 8, "the message must leave padding in the remainder plane"
    padded = bytearray(body)
    padded[remainders + used // 8] |= 0x80
    longer = bytearray(body)
    longer[remainders:remainders] = b"\0"
    longer[5:9] = (unary + 1).to_bytes(4, "little")
    for wrong in (padded, longer):
        expected = _outcome(codec, bytes(wrong), sizes, "float32", indices.size)
        assert isinstance(expected, str)
        assert _outcome(fast, bytes(wrong), sizes, "float32", indices.size) == expected
