"""Damage to the log: found and told, or no more than a torn write could have taken."""

from __future__ import annotations

import struct
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgs.errors import StateError
from dgs.storage.log import Log
from dgs.storage.records import (
    HEADER_BYTES,
    RECORD_BYTES,
    encode_record,
    encode_segment_header,
    header_checksum,
    segment_name,
)
from dgs.storage.wal import Record, list_segments, read_log
from tests.dgs.storage.logs import RUN, fill, raw, record
from tests.helpers.disks import ForgetfulDisk


def built() -> tuple[ForgetfulDisk, list[int]]:
    """Return two segments with two batches each, and what each record calls durable."""
    disk = ForgetfulDisk()
    log = Log.create(disk, RUN, 0)
    declared = []
    for count in (2, 3, 0, 2, 1):
        if count == 0:
            log.rotate()
        declared += [log.durable] * count
        fill(log, count)
        log.commit()
    return disk, declared


def spoil(name: str, offset: int, value: int) -> ForgetfulDisk:
    disk, _ = built()
    disk.damage(name, lambda data: data.__setitem__(offset, data[offset] ^ value))
    return disk


def check_damage(disk: ForgetfulDisk, declared: list[int]) -> str:
    """Recover: an error, or the loss of a tail that no record left calls durable."""
    contents = read_log(disk, RUN, 0)
    try:
        records = list(contents)
    except StateError:
        return "refused"
    assert records == [record(n) for n in range(len(records))]
    # records 0-4 were rotated away, 5-6 are called durable by 7: only 7 is for a torn write to take
    assert len(records) >= declared[-1]
    if len(records) == len(declared):
        return "whole"
    assert contents.torn
    log = Log.open(disk, RUN, contents.end)
    fill(log, 1)
    log.commit()
    assert len(list(read_log(disk, RUN, 0))) == len(records) + 1
    return "torn"


def test_every_damaged_bit_is_found_or_in_the_last_batch() -> None:
    disk, declared = built()
    assert declared == [0, 0, 2, 2, 2, 5, 5, 7]
    last = HEADER_BYTES + 2 * RECORD_BYTES + sum(len(record(n).payload) for n in (5, 6))
    for first in list_segments(disk):
        for offset in range(len(raw(disk, first))):
            for value in (1, 0x80, 0xFF):
                verdict = check_damage(spoil(segment_name(first), offset, value), declared)
                expected = "torn" if first == 5 and offset >= last else "refused"
                assert verdict == expected, (first, offset, value)


def test_log_cut_short_anywhere_is_refused_or_looks_like_a_torn_write() -> None:
    for first in (0, 5):
        for size in range(len(raw(built()[0], first))):
            disk, _ = built()
            disk.damage(segment_name(first), partial(_shorten, size=size))
            contents = read_log(disk, RUN, 0)
            if first == 0:
                with pytest.raises(StateError, match=r"the log goes on in another|go on with rec"):
                    list(contents)
                continue
            records = list(contents)
            assert records == [record(n) for n in range(len(records))]
            assert len(records) >= 5
            assert Log.open(disk, RUN, contents.end).position == len(records)


def _shorten(data: bytearray, size: int) -> None:
    del data[size:]


@given(noise=st.binary(max_size=300), first=st.sampled_from([0, 5]))
def test_any_bytes_in_place_of_a_segment_are_refused_or_torn(noise: bytes, first: int) -> None:
    disk, _ = built()
    disk.damage(segment_name(first), lambda data: data.__setitem__(slice(None), noise))
    contents = read_log(disk, RUN, 0)
    try:
        records = list(contents)
    except StateError:
        return
    assert first == 5
    assert len(records) == 5
    assert contents.torn


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**32, 2**31])
def test_absurd_length_is_not_believed(length: int) -> None:
    disk, declared = built()
    place = slice(HEADER_BYTES + 8, HEADER_BYTES + 16)
    disk.damage(segment_name(5), lambda data: data.__setitem__(place, length.to_bytes(8, "little")))
    assert check_damage(disk, declared) == "refused"


def test_damage_is_told_with_file_place_finding_expectation_and_remedy() -> None:
    with pytest.raises(StateError) as caught:
        list(read_log(spoil(segment_name(5), HEADER_BYTES + RECORD_BYTES, 1), RUN, 0))
    assert str(caught.value) == (
        "disk/log-00000000000000000005.wal, byte 28: a record that does not match its checksum in "
        "place of record 5; at byte 219 there is a later record that calls this one durable, so it "
        "is damaged: run 'dgs snapshot repair --state-dir disk' to go on with what is sound, or "
        "'dgs snapshot export --state-dir disk --out FILE' to save the model"
    )


def test_no_end_of_an_earlier_segment_passes_for_a_torn_write() -> None:
    disk, _ = built()
    disk.damage(segment_name(0), partial(_extend, more=b"DGSR"))
    with pytest.raises(StateError, match=r"4 bytes of a record's first .* in another file, begun"):
        list(read_log(disk, RUN, 0))


def test_missing_segment_is_missed() -> None:
    disk = ForgetfulDisk()
    log = Log.create(disk, RUN, 0)
    for _ in range(3):
        fill(log, 2)
        log.rotate()
    disk.remove(segment_name(2))
    with pytest.raises(StateError, match=r"begins with record 4, expected .* record 2"):
        list(read_log(disk, RUN, 1))
    assert list(read_log(disk, RUN, 4)) == [record(4), record(5)]


def test_another_runs_log_is_refused() -> None:
    disk, _ = built()
    with pytest.raises(StateError, match=r"is of run 77 .* expected run 78 .* were mixed"):
        list(read_log(disk, RUN + 1, 0))


def test_newer_format_is_refused_by_its_number() -> None:
    disk, _ = built()
    disk.damage(segment_name(5), lambda data: struct.pack_into("<I", data, 4, 9))
    with pytest.raises(StateError, match="written by a newer release: it has format 9, this one"):
        list(read_log(disk, RUN, 0))
    with pytest.raises(StateError, match="newer release"):
        Log.open(disk, RUN, 8)


def test_record_of_another_segment_does_not_pass_for_one_of_this() -> None:
    # the disk may put blocks of a removed file at the end of a new one
    disk = ForgetfulDisk()
    Log.create(disk, RUN, 5)
    for run, first in ((RUN + 1, 5), (RUN, 4)):
        seed = header_checksum(encode_segment_header(run, first))
        stale = b"".join(encode_record(record(5), 5, 5, seed))
        disk.damage(segment_name(5), partial(_extend, more=stale))
        contents = read_log(disk, RUN, 5)
        assert list(contents) == []
        assert "checksum" in contents.torn
        Log.open(disk, RUN, 5)
        assert len(raw(disk, 5)) == HEADER_BYTES


def _extend(data: bytearray, more: bytes) -> None:
    data += more


def test_payload_that_looks_like_many_records_costs_no_time_and_proves_nothing() -> None:
    disk = ForgetfulDisk()
    log = Log.create(disk, RUN, 0)
    fake = b"DGSR" + bytes(4) + (10**6).to_bytes(8, "little") + bytes(RECORD_BYTES - 16)
    log.append(Record("Exchange", 0, 0, 0, 0, fake * 50_000))
    log.commit()
    disk.damage(segment_name(0), lambda data: data.__setitem__(HEADER_BYTES + 4, data[32] ^ 1))
    contents = read_log(disk, RUN, 0)
    assert list(contents) == []
    assert contents.torn
