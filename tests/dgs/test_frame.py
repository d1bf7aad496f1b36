"""Frames: what is written is read, golden files keep the format, damaged frames are refused."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dgs.frame
from dgs.bits import GAP_BITS
from dgs.codec import decode_body, encode_body
from dgs.config import Values
from dgs.errors import ChecksumError, DgsError, MalformedError, TooLargeError
from dgs.frame import (
    HEADER_BYTES,
    MAX_CURSOR_BYTES,
    Frame,
    FrameKind,
    Header,
    decode_frame,
    encode_frame,
    max_frame_bytes,
    peek_header,
    restamp,
)
from dgs.quantize import VALUE_KINDS
from dgs.space import SEGMENT_LIMIT

GOLDEN = Path(__file__).parents[1] / "golden" / "frames"
U16, U32, U64 = (st.integers(0, 2**bits - 1) for bits in (16, 32, 64))


@st.composite
def headers(draw: st.DrawFn) -> Header:
    """Draw a header with room for its entries; `encode_frame` sets its lengths."""
    kind = draw(st.sampled_from([FrameKind.UPDATE, FrameKind.DIFFERENCE]))
    nnz = draw(st.integers(0, 8))
    return Header(
        kind=kind,
        values=draw(st.sampled_from(VALUE_KINDS)),
        worker_id=draw(U32),
        member=draw(U16),
        shard=draw(U16),
        run=draw(U64),
        incarnation=draw(U64),
        seq=draw(U64),
        version=draw(U64),
        size=draw(st.integers(nnz, 2**64 - 1)),
        nnz=nnz,
        staleness=draw(U32),
        replaces=kind is FrameKind.DIFFERENCE and draw(st.booleans()),
        hash=draw(st.none() | U64),
    )


def small_frame() -> bytes:
    body = encode_body([0, 2, 5], [1.0, -1.0, 0.5], [4, 0, 2], "int8").body
    header = Header(
        kind=FrameKind.DIFFERENCE, values="int8", size=6, nnz=3, seq=1, version=2, hash=3
    )
    return encode_frame(header, body, np.array([0.5, 0.25], np.float32))


def with_checksum(data: bytes | bytearray) -> bytes:
    """Make a changed frame's checksum right again, so that what lies behind it is tested."""
    checksum = zlib.crc32(data[96:], zlib.crc32(data[:92]))
    return bytes(data[:92]) + checksum.to_bytes(4, "little") + bytes(data[96:])


@given(headers(), st.binary(min_size=32, max_size=60), st.integers(0, 3), st.binary(max_size=40))
def test_every_frame_comes_back(header: Header, body: bytes, tail: int, cursor: bytes) -> None:
    values = np.arange(tail, dtype=np.float32)
    cursor = cursor if header.kind is FrameKind.UPDATE else b""
    data = encode_frame(header, body, values, cursor)
    frame = decode_frame(data)
    lengths = {"body_bytes": len(body), "tail": tail, "cursor_bytes": len(cursor)}
    assert frame.header == dataclasses.replace(header, **lengths)
    assert bytes(frame.body) == body
    assert bytes(frame.cursor) == cursor
    assert np.array_equal(frame.tail, values)
    assert frame.header.frame_bytes == len(data)
    assert peek_header(data[:HEADER_BYTES]) == frame.header


@given(
    st.lists(st.integers(0, 70), max_size=9),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.sampled_from(VALUE_KINDS),
    st.integers(0, 9),
)
def test_no_frame_is_longer_than_the_bound(
    sizes: list[int], density: float, values: Values, tail: int
) -> None:
    size = sum(sizes)
    indices = np.flatnonzero(np.random.default_rng(size).random(size) < density)
    body = encode_body(indices, np.ones(indices.size), sizes, values).body
    header = Header(kind=FrameKind.UPDATE, values=values, size=size, nnz=indices.size)
    update = encode_frame(header, body, np.zeros(tail, np.float32), bytes(MAX_CURSOR_BYTES))
    bound = max_frame_bytes(size, len(sizes), tail)
    assert len(update) <= bound
    header = Header(kind=FrameKind.MODEL, values="float32", size=size + tail, nnz=size + tail)
    model = encode_frame(header, np.zeros(size + tail, np.float32))
    assert len(model) <= bound


@pytest.mark.parametrize("make", [bytes, bytearray, memoryview])
def test_any_buffer_is_read_and_given_back_as_views(make: type) -> None:
    frame = decode_frame(make(small_frame()))
    assert isinstance(frame.body, memoryview)
    assert frame.tail.tolist() == [0.5, 0.25]
    assert not frame.tail.flags.owndata


def test_body_and_tail_may_be_arrays_of_any_layout() -> None:
    header = Header(kind=FrameKind.MODEL, values="float32", size=3, nnz=3)
    strided = np.arange(6, dtype=np.float32)[::2]
    frame = decode_frame(encode_frame(header, strided, strided[:0]))
    assert np.frombuffer(frame.body, "<f4").tolist() == [0.0, 2.0, 4.0]
    assert frame.tail.size == 0


def test_header_lies_where_the_format_says() -> None:
    header = Header(
        kind=FrameKind.DIFFERENCE, values="int2", worker_id=1, member=2, shard=3, run=4,
        incarnation=5, seq=6, version=7, size=8, nnz=1, staleness=9, replaces=True, hash=10,
    )  # fmt: skip
    data = encode_frame(header, b"body", b"tail")
    fields = struct.unpack("<4s4BI2H6Q2I2Q2I", data[:96])
    assert fields[:-1] == (b"DGSF", 1, 2, 4, 3, 1, 2, 3, 4, 5, 6, 7, 8, 1, 1, 9, 4, 10, 0)
    assert fields[-1] == zlib.crc32(data[:92] + data[96:])


@given(headers(), U64)
def test_restamped_frame_differs_in_the_incarnation_only(header: Header, incarnation: int) -> None:
    cursor = b"epoch 3" if header.kind is FrameKind.UPDATE else b""
    before = encode_frame(header, bytes(32), bytes(8), cursor)
    after = decode_frame(restamp(before, incarnation))
    expected = decode_frame(before)
    header = dataclasses.replace(expected.header, incarnation=incarnation)
    assert (after.header, bytes(after.body)) == (header, bytes(expected.body))
    assert bytes(after.cursor) == bytes(expected.cursor) == cursor
    assert restamp(restamp(before, incarnation), expected.header.incarnation) == before


def test_damaged_frame_is_not_restamped() -> None:
    data = bytearray(small_frame())
    data[-1] ^= 1
    with pytest.raises(ChecksumError):
        restamp(data, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nnz": 7}, "7 entries do not fit 6 coordinates"),
        ({"nnz": 6, "values": "float32"}, "do not fit a body"),
        ({"replaces": True, "kind": FrameKind.UPDATE}, "SET flag"),
        ({"kind": FrameKind.MODEL}, "MODEL frame"),
        ({"kind": FrameKind.MODEL, "values": "float32", "nnz": 6}, "MODEL frame"),
        ({"run": 2**64}, "does not fit"),
        ({"worker_id": -1}, "does not fit"),
        ({"member": 2**16}, "does not fit"),
    ],
)
def test_headers_that_cannot_be_are_not_written(changes: dict[str, Any], message: str) -> None:
    header = Header(kind=FrameKind.DIFFERENCE, values="int8", size=6, nnz=3)
    with pytest.raises(MalformedError, match=message):
        encode_frame(dataclasses.replace(header, **changes), bytes(20))


def test_tail_of_broken_values_is_not_written() -> None:
    with pytest.raises(MalformedError, match="tail of 5 bytes"):
        encode_frame(Header(kind=FrameKind.UPDATE, values="int8", size=0, nnz=0), b"", bytes(5))


@pytest.mark.parametrize(
    ("at", "byte", "message"),
    [
        (0, 0, "begins with"),
        (4, 2, "wire version 2"),
        (5, 0, "frame kind 0"),
        (5, 4, "frame kind 4"),
        (6, 6, "value kind 6"),
        (7, 6, "reserved bits"),
        (7, 0, "a hash, but not the flag"),
        (88, 1, "bytes received of a frame"),
        (56, 7, "7 entries do not fit 6"),
        (64, 3, "bytes received of a frame"),
        (72, 0, "bytes received of a frame"),
        (79, 0x10, "bytes received of a frame"),
    ],
)
def test_headers_that_break_a_rule_are_refused_by_name(at: int, byte: int, message: str) -> None:
    data = bytearray(small_frame())
    data[at] = byte
    with pytest.raises(MalformedError, match=message):
        decode_frame(with_checksum(data))


def update_with_cursor(cursor: bytes) -> bytes:
    header = Header(kind=FrameKind.UPDATE, values="int8", size=0, nnz=0)
    return encode_frame(header, b"", np.zeros(1, np.float32), cursor)


@pytest.mark.parametrize("kind", [FrameKind.DIFFERENCE, FrameKind.MODEL])
def test_only_updates_have_a_cursor(kind: FrameKind) -> None:
    header = Header(kind=kind, values="float32", size=0, nnz=0)
    with pytest.raises(MalformedError, match=f"a cursor is for UPDATE, not for {kind.name}"):
        encode_frame(header, b"", b"", b"x")
    data = bytearray(encode_frame(header, b"") + b"x")
    data[88] = 1
    for read in (lambda: decode_frame(with_checksum(data)), lambda: peek_header(data)):
        with pytest.raises(MalformedError, match=f"a cursor is for UPDATE, not for {kind.name}"):
            read()


def test_a_cursor_has_at_most_4096_bytes() -> None:
    longest = bytes(range(256)) * 16
    assert bytes(decode_frame(update_with_cursor(longest)).cursor) == longest
    with pytest.raises(MalformedError, match="a cursor of 4097 bytes exceeds the limit of 4096"):
        update_with_cursor(bytes(4097))
    data = bytearray(update_with_cursor(longest) + b"x")
    data[88] += 1
    with pytest.raises(MalformedError, match="a cursor of 4097 bytes exceeds the limit of 4096"):
        decode_frame(with_checksum(data))


def test_a_cursor_of_another_length_than_announced_is_refused() -> None:
    data = update_with_cursor(b"abcd")
    for changed, length in ((data[:-1], 103), (data + b"e", 105)):
        with pytest.raises(MalformedError, match=f"{length} bytes received of a frame of 104"):
            decode_frame(with_checksum(changed))
        with pytest.raises(ChecksumError):
            decode_frame(changed)


def test_every_changed_byte_of_a_cursor_is_noticed() -> None:
    data = update_with_cursor(b"abcd")
    for at in range(len(data) - 4, len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 1
        with pytest.raises(ChecksumError):
            decode_frame(damaged)


def test_cut_and_lengthened_frames_are_refused() -> None:
    data = small_frame()
    for n in range(len(data)):
        error = MalformedError if n < 96 else ChecksumError
        with pytest.raises(error, match="bytes"):
            decode_frame(data[:n])
        if n >= 96:
            with pytest.raises(MalformedError, match="bytes received"):
                decode_frame(with_checksum(data[:n]))
    with pytest.raises(ChecksumError):
        decode_frame(data + b"\0")
    with pytest.raises(MalformedError, match="bytes received"):
        decode_frame(with_checksum(data + b"\0"))


def test_frames_over_a_limit_are_refused_before_they_are_read() -> None:
    data = small_frame()
    assert decode_frame(data, max_size=len(data)).header.nnz == 3
    for read in (decode_frame, peek_header):
        with pytest.raises(TooLargeError, match="exceeds the limit"):
            read(data, max_size=len(data) - 1)
    announced = bytearray(data[:96])
    announced[72:80] = (2**60).to_bytes(8, "little")
    with pytest.raises(TooLargeError):
        peek_header(announced, max_size=2**30)


def test_every_changed_byte_is_refused() -> None:
    data = small_frame()
    for at in range(len(data)):
        for flip in (0x01, 0x08, 0x80, 0xFF):
            damaged = bytearray(data)
            damaged[at] ^= flip
            # damage can be mended by sending again, unless it makes a frame of something else
            error = MalformedError if at < 5 else ChecksumError
            with pytest.raises(error):
                decode_frame(damaged)


def read_any(data: bytes) -> None:
    """Read bytes of any origin, down to the entries."""
    try:
        frame = decode_frame(data)
        h = frame.header
        if h.kind is not FrameKind.MODEL:
            indices, _ = decode_body(frame.body, [4, 0, 2], h.values, h.nnz)
            assert (np.diff(indices) > 0).all()
            assert h.nnz == 0 or (indices[0] >= 0 and indices[-1] < 6)
    except DgsError:
        pass


def test_every_changed_byte_with_a_right_checksum_is_read_or_refused() -> None:
    data = small_frame()
    for at in [*range(92), *range(96, len(data))]:
        for flip in (0x01, 0x02, 0x08, 0x40, 0x80, 0xFF):
            damaged = bytearray(data)
            damaged[at] ^= flip
            read_any(with_checksum(damaged))


@settings(max_examples=200)
@given(st.data())
def test_random_damage_with_a_right_checksum_is_read_or_refused(data: st.DataObject) -> None:
    frame = bytearray(data.draw(st.sampled_from([small_frame(), update_with_cursor(b"abcd")])))
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, len(frame)))
        frame[at : at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    read_any(with_checksum(frame))


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(MalformedError):
        decode_frame(data)
    with pytest.raises(DgsError):
        decode_frame(b"DGSF\x01" + data)


def test_longest_segment_is_the_one_of_the_index_space() -> None:
    assert 1 << GAP_BITS == SEGMENT_LIMIT


# --- golden frames ---------------------------------------------------------------------------


def _entries(count: int, step: int) -> dict[str, Any]:
    """Give every step-th coordinate a value that no kind codes exactly."""
    values = [float(np.float32((-1) ** i * (0.3 + 0.1 * (i % 11)))) for i in range(count)]
    return {"indices": [i * step for i in range(count)], "values": values}


def _contents() -> dict[str, dict[str, Any]]:
    """Describe the golden frames; the files hold the same and what decoding gives."""
    worker = {"worker_id": 7, "member": 1, "shard": 2, "run": 123456789012}
    session = {**worker, "incarnation": 1700000000, "seq": 42, "version": 1000}
    some = {"indices": [3, 70, 71, 131], "values": [1.0, -2.0, 0.25, 0.3330000042915344]}
    forms = [*range(0, 40, 3), *range(60, 65), *range(65, 65 + 400, 97)]
    return {
        "empty-update": {"kind": 1, "code": "float32", "sizes": [], "fields": {}},
        "update-float32": {
            "kind": 1, "code": "float32", "sizes": [100, 0, 1000], "fields": session, **some,
        },
        "difference-set-hash-tail": {
            "kind": 2, "code": "float32", "sizes": [8], "tail": [0.5, -1.5],
            "fields": {**session, "staleness": 3, "replaces": True, "hash": 1234567890123456},
            "indices": [0, 1, 4, 6], "values": [1.5, -0.0, 1e-40, 3.0],
        },
        "update-bfloat16-dense": {
            "kind": 1, "code": "bfloat16", "sizes": [2, 3], "fields": session,
            "indices": [0, 1, 2, 3, 4],
            "values": [1.0, 1.00390625, -3.1415927410125732, 3.4028234663852886e38, 0.0],
        },
        "update-int8-forms": {
            "kind": 1, "code": "int8", "sizes": [40, 20, 5, 400, 9], "fields": session,
            "indices": forms, "values": _entries(len(forms), 1)["values"],
        },
        "update-int4-escape": {
            "kind": 1, "code": "int4", "sizes": [4194304], "fields": session,
            "indices": [5, 9, 14, 22, 23, 31, 4000000, 4000002, 4000009],
            "values": _entries(9, 1)["values"],
        },
        "difference-int2-blocks": {
            "kind": 2, "code": "int2", "sizes": [4200], "fields": session, **_entries(1049, 4),
        },
        "difference-sign-tail": {
            "kind": 2, "code": "sign", "sizes": [50, 50], "fields": session, "tail": [1.0],
            "indices": [2, 3, 4, 60, 99], "values": [1.0, -1.0, 0.5, 1e-44, -1e-44],
        },
        "update-cursor": {
            "kind": 1, "code": "float32", "sizes": [8], "tail": [0.5], "fields": session,
            "indices": [2, 5], "values": [1.0, -2.0], "cursor": "epoch 3, batch 141",
        },
        "model": {
            "kind": 3, "code": "float32", "sizes": [2, 1], "fields": worker, "tail": [9.0],
            "indices": [0, 1, 2], "values": [0.1, -0.2, 0.30000001192092896],
        },
    }  # fmt: skip


NAMES = tuple(_contents())


def _encode(content: dict[str, Any]) -> tuple[bytes, np.ndarray]:
    values = np.array(content.get("values", []), np.float32)
    indices = np.array(content.get("indices", []), np.int64)
    header = Header(
        kind=FrameKind(content["kind"]),
        values=content["code"],
        size=sum(content["sizes"]),
        nnz=indices.size,
        **content["fields"],
    )
    tail = np.array(content.get("tail", []), np.float32)
    if header.kind is FrameKind.MODEL:
        return encode_frame(header, values, tail), values
    body, decoded = encode_body(indices, values, content["sizes"], content["code"])
    return encode_frame(header, body, tail, content.get("cursor", "").encode()), decoded


def _read(frame: Frame, sizes: list[int]) -> tuple[list[int], np.ndarray]:
    h = frame.header
    if h.kind is FrameKind.MODEL:
        return list(range(h.nnz)), np.frombuffer(frame.body, "<f4")
    indices, values = decode_body(frame.body, sizes, h.values, h.nnz)
    return indices.tolist(), values


@pytest.fixture(scope="module")
def golden() -> dict[str, dict[str, Any]]:
    """Read the descriptions of the golden frames; with WRITE_GOLDEN=1 write all files first."""
    if os.environ.get("WRITE_GOLDEN") == "1":
        GOLDEN.mkdir(parents=True, exist_ok=True)
        contents = _contents()
        for name, content in contents.items():
            data, decoded = _encode(content)
            (GOLDEN / f"{name}.bin").write_bytes(data)
            content["decoded"] = decoded.tolist()
        lines = [f'"{name}": {json.dumps(c)}' for name, c in contents.items()]
        (GOLDEN / "frames.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    found: dict[str, dict[str, Any]] = json.loads((GOLDEN / "frames.json").read_text())
    return found


def test_golden_files_are_the_ones_described(golden: dict[str, dict[str, Any]]) -> None:
    assert tuple(golden) == NAMES
    assert {path.stem for path in GOLDEN.glob("*.bin")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_golden_frame_is_written_byte_for_byte(name: str, golden: dict[str, Any]) -> None:
    assert _encode(golden[name])[0] == (GOLDEN / f"{name}.bin").read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_golden_frame_reads_as_described(name: str, golden: dict[str, Any]) -> None:
    content = golden[name]
    frame = decode_frame((GOLDEN / f"{name}.bin").read_bytes())
    indices, values = _read(frame, content["sizes"])
    assert indices == content.get("indices", [])
    assert values.tobytes() == np.array(content["decoded"], np.float32).tobytes()
    assert frame.tail.tolist() == content.get("tail", [])
    assert bytes(frame.cursor).decode() == content.get("cursor", "")
    fields = {k: getattr(frame.header, k) for k in content["fields"]}
    assert (frame.header.kind, frame.header.values) == (content["kind"], content["code"])
    assert fields == content["fields"]


def test_document_shows_the_golden_frames_it_names(golden: dict[str, Any]) -> None:
    text = (Path(dgs.frame.__file__).parent / "WIRE.md").read_text()
    shown = re.findall(r"`([\w-]+)\.bin`[^`]*```text\n(.*?)```", text, re.DOTALL)
    assert len(shown) >= 3
    for name, dump in shown:
        assert name in golden
        digits = "".join(line.split("|")[0] for line in dump.splitlines())
        assert bytes.fromhex(digits) == (GOLDEN / f"{name}.bin").read_bytes(), name
