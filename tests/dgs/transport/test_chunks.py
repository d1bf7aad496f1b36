from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgs._proto.parameter_server_pb2 import Chunk
from dgs.errors import MalformedError, TooLargeError
from dgs.transport.chunks import CHUNK_BYTES, assemble, split, unwrap, wrap
from tests.helpers.echo import pattern

BAD_CHUNKS = {
    "another field": b"\x12\x01a",
    "another wire type": b"\x08\x01",
    "length missing": b"\x0a",
    "length unfinished": b"\x0a\x80",
    "length too long": b"\x0a\x81\x80\x80\x80\x80\x00",
    "data missing": b"\x0a\x05abc",
    "data left over": b"\x0a\x01ab",
    "two fields": b"\x0a\x01a\x0a\x01b",
    "an unknown field behind": b"\x0a\x01a\x10\x01",
    "more than a chunk may hold": wrap(bytes(CHUNK_BYTES + 1)),
}


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16383, 16384, CHUNK_BYTES])
def test_a_chunk_is_what_protobuf_writes_and_reads(size: int) -> None:
    data = pattern(size)
    assert wrap(data) == Chunk(data=data).SerializeToString()
    assert bytes(unwrap(Chunk(data=data).SerializeToString())) == data


@pytest.mark.parametrize("bad", BAD_CHUNKS.values(), ids=BAD_CHUNKS.keys())
def test_anything_but_one_data_field_is_refused(bad: bytes) -> None:
    with pytest.raises(MalformedError):
        unwrap(bad)


@given(st.binary(max_size=40))
def test_any_bytes_are_a_chunk_or_malformed(message: bytes) -> None:
    try:
        data = unwrap(message)
    except MalformedError:
        return
    assert Chunk.FromString(message).data == data


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES + 5])
def test_a_split_message_is_assembled_again_and_no_chunk_is_too_large(size: int) -> None:
    message = pattern(size)
    chunks = list(split(message))
    assert all(len(unwrap(chunk)) <= CHUNK_BYTES for chunk in chunks)
    assert assemble(chunks, size, "it") == message


@given(st.lists(st.sampled_from([1, 3, 4095, 4096, 9000]), min_size=1, max_size=12))
def test_pieces_of_any_size_are_assembled_in_order(sizes: list[int]) -> None:
    message = pattern(sum(sizes))
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    pieces = [message[a : a + n] for a, n in zip(starts, sizes, strict=True)]
    assert assemble(map(wrap, pieces), len(message), "it") == message


def test_assembly_stops_at_the_first_chunk_beyond_the_limit() -> None:
    taken = 0

    def endless() -> Iterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield wrap(bytes(1000))

    with pytest.raises(TooLargeError, match="the upload exceeds the limit of 2500 bytes"):
        assemble(endless(), 2500, "the upload")
    assert taken == 3


@pytest.mark.parametrize("chunks", [[], [b"", b""], [b"", wrap(b"a")], [wrap(b"a"), b""]])
def test_no_chunk_and_an_empty_chunk_among_several_are_malformed(chunks: list[bytes]) -> None:
    with pytest.raises(MalformedError):
        assemble(chunks, 100, "it")
