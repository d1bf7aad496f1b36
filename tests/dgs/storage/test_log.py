"""The log: what was acknowledged survives anything, what was not is at most lost from the end."""

from __future__ import annotations

import errno
import os
import random
import struct
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgs.errors import StateError
from dgs.storage.disk import Disk, FolderDisk
from dgs.storage.log import Log
from dgs.storage.records import (
    HEADER_BYTES,
    METHODS,
    RECORD_BYTES,
    encode_record,
    encode_segment_header,
    header_checksum,
    segment_name,
)
from dgs.storage.wal import Record, list_segments, read_log
from tests.helpers.disks import ForgetfulDisk, PowerLossError

RUN = 77
U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
RECORDS = st.builds(Record, st.sampled_from(METHODS), U32, U64, U64, U32, st.binary(max_size=200))
SEEDS = range(40)
STEPS_OF_ROTATE = ("create", "truncate", "write", "sync log", "rename", "sync names")


def record(number: int) -> Record:
    """Return a record that is like no other; its payload has a length of its own."""
    payload = random.Random(number).randbytes(number * 7 % 50)
    return Record(METHODS[number % 4], number, number + 1, number + 2, number + 3, payload)


def fill(log: Log, count: int) -> None:
    for _ in range(count):
        log.append(record(log.position))


def reopen(disk: Disk, start: int = 0) -> tuple[Log, list[Record], str]:
    """Recover, as a server does after it was started again."""
    contents = read_log(disk, RUN, start)
    records = list(contents)
    return Log.open(disk, RUN, contents.end), records, contents.torn


def raw(disk: Disk, first: int = 0) -> bytes:
    return disk.open(segment_name(first)).read()


def no_space() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def io_error() -> OSError:
    return OSError(errno.EIO, os.strerror(errno.EIO))


@given(batches=st.lists(st.lists(RECORDS, max_size=4), max_size=4), start=st.integers(0, 12))
def test_what_is_committed_is_read_from_any_position(
    batches: list[list[Record]], start: int
) -> None:
    disk = ForgetfulDisk()
    log = Log.create(disk, RUN, 0)
    for number, batch in enumerate(batches):
        for item in batch:
            log.append(item)
        assert log.commit() == log.position == log.durable
        if number % 2:
            log.rotate()
    expected = [item for batch in batches for item in batch]
    start = min(start, len(expected))
    contents = read_log(disk, RUN, start)
    assert list(contents) == expected[start:]
    assert (contents.end, contents.torn) == (len(expected), "")
    assert list(contents) == expected[start:], "a second time"


def test_log_may_begin_at_any_position_and_reading_before_it_says_what_is_missing() -> None:
    disk = ForgetfulDisk()
    log = Log.create(disk, RUN, 40)
    fill(log, 2)
    assert log.commit() == 42
    assert list(read_log(disk, RUN, 40)) == [record(40), record(41)]
    with pytest.raises(StateError, match=r"begins with record 40, expected .* record 39"):
        list(read_log(disk, RUN, 39))


def test_log_that_is_gone_is_missed_unless_nothing_can_have_been_in_it() -> None:
    assert list(read_log(ForgetfulDisk(), RUN, 0)) == []
    with pytest.raises(StateError, match="there is no log"):
        list(read_log(ForgetfulDisk(), RUN, 1))


def test_a_second_log_is_not_begun_over_the_first() -> None:
    disk = ForgetfulDisk()
    Log.create(disk, RUN, 0)
    with pytest.raises(StateError, match="holds a log already"):
        Log.create(disk, RUN, 0)


def test_many_records_cost_one_write_and_one_sync() -> None:
    disk = ForgetfulDisk()
    log = Log.create(disk, RUN, 0)
    before = disk.operations
    fill(log, 100)
    assert disk.operations == before
    log.commit()
    assert disk.log[before:] == [f"write {segment_name(0)}", f"sync {segment_name(0)}"]
    log.commit()
    assert disk.operations == before + 2


def test_size_is_that_of_the_last_segment_and_counts_what_is_pending() -> None:
    disk = ForgetfulDisk()
    log = Log.create(disk, RUN, 0)
    fill(log, 5)
    pending = log.size_bytes
    log.commit()
    assert log.size_bytes == pending == len(raw(disk))
    log.rotate()
    assert log.size_bytes == HEADER_BYTES
    assert reopen(disk)[0].size_bytes == HEADER_BYTES


def test_cut_removes_what_ends_in_time_and_never_the_last_segment() -> None:
    disk = ForgetfulDisk()
    log = Log.create(disk, RUN, 0)
    for _ in range(3):
        fill(log, 2)
        log.rotate()
    log.rotate()
    assert list_segments(disk) == [0, 2, 4, 6]
    log.cut(3)
    assert list_segments(disk) == [2, 4, 6]
    log.cut(4)
    assert list_segments(disk) == [4, 6]
    log.cut(100)
    assert list_segments(disk) == [6]
    fill(log, 1)
    log.commit()
    assert list(read_log(disk, RUN, 6)) == [record(6)]


@pytest.mark.parametrize(
    "wrong",
    [
        Record("Status", 0, 0, 0, 0, b""),
        Record("Join", 2**32, 0, 0, 0, b""),
        Record("Join", 0, -1, 0, 0, b""),
        Record("Join", 0, 0, 2**64, 0, b""),
    ],
)
def test_record_that_does_not_fit_is_refused_before_it_is_pending(wrong: Record) -> None:
    log = Log.create(ForgetfulDisk(), RUN, 0)
    with pytest.raises(ValueError, match=r"not for the log|does not fit"):
        log.append(wrong)
    assert log.position == 0


def test_others_may_append_while_one_commits() -> None:
    disk = ForgetfulDisk()
    log = Log.create(disk, RUN, 0)
    entered, leave = threading.Event(), threading.Event()

    def trouble(number: int, kind: str) -> None:
        if kind.startswith("sync log"):
            entered.set()
            assert leave.wait(10)

    disk.trouble = trouble
    fill(log, 1)
    committer = threading.Thread(target=log.commit)
    committer.start()
    assert entered.wait(10)
    fill(log, 2)
    assert (log.position, log.durable) == (3, 0)
    leave.set()
    committer.join(10)
    assert (log.position, log.durable) == (3, 1)
    assert log.commit() == 3
    assert list(read_log(disk, RUN, 0)) == [record(n) for n in range(3)]


# --- a disk that fails


@pytest.mark.parametrize("error", [no_space, io_error])
def test_failed_write_is_taken_back_and_tried_again(error: Callable[[], OSError]) -> None:
    for seed in SEEDS:
        disk = ForgetfulDisk(random.Random(seed))
        log = Log.create(disk, RUN, 0)
        fill(log, 2)
        log.commit()
        size = len(raw(disk))
        fill(log, 3)
        for _ in range(2):
            disk.fail_at(disk.operations, error)
            with pytest.raises(StateError, match=error().strerror):
                log.commit()
            assert (log.durable, log.position, log.failed) == (2, 5, "")
            assert len(raw(disk)) == size
        fill(log, 1)
        assert log.commit() == 6
        assert list(read_log(disk, RUN, 0)) == [record(n) for n in range(6)]


def test_write_that_cannot_be_taken_back_is_the_last_one() -> None:
    disk = ForgetfulDisk()
    log = Log.create(disk, RUN, 0)
    fill(log, 3)

    def trouble(number: int, kind: str) -> None:
        if kind.startswith(("write", "truncate")):
            raise no_space()

    disk.trouble = trouble
    with pytest.raises(StateError, match="No space left"):
        log.commit()
    disk.trouble = lambda number, kind: None
    assert "restart the server" in log.failed
    with pytest.raises(StateError, match="No space left"):
        log.commit()
    again, records, _ = reopen(disk.after_kill())
    assert records == [record(n) for n in range(len(records))]
    assert again.commit() == len(records)


def test_failed_sync_is_never_trusted_again() -> None:
    disk = ForgetfulDisk()
    log = Log.create(disk, RUN, 0)
    fill(log, 3)
    disk.fail_at(disk.operations + 1, io_error)
    for _ in range(3):
        with pytest.raises(StateError, match=r"cannot sync .*restart the server"):
            log.commit()
        assert log.durable == 0
    with pytest.raises(StateError, match="cannot sync"):
        log.rotate()
    assert list_segments(disk) == [0]


def test_interrupted_commit_is_not_written_twice() -> None:
    for step in range(2):
        disk = ForgetfulDisk()
        log = Log.create(disk, RUN, 0)
        fill(log, 3)
        disk.fail_at(disk.operations + step, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            log.commit()
        with pytest.raises(StateError, match="interrupted"):
            log.commit()
        assert reopen(disk.after_kill())[1] in [[record(n) for n in range(k)] for k in range(4)]


def test_rotate_that_fails_early_changes_nothing_and_late_is_the_end() -> None:
    for step, kind in enumerate(STEPS_OF_ROTATE):
        disk = ForgetfulDisk()
        log = Log.create(disk, RUN, 0)
        fill(log, 2)
        log.commit()
        before = disk.operations
        disk.fail_at(before + step, no_space)
        with pytest.raises(StateError, match="No space left"):
            log.rotate()
        assert disk.log[before + step].startswith(kind)
        assert bool(log.failed) == (kind in ("rename", "sync names"))
        disk.trouble = lambda number, kind: None
        if not log.failed:
            fill(log, 1)
            assert log.commit() == 3
        log, records, torn = reopen(disk)
        assert records == [record(n) for n in range(log.position)]
        assert (log.position, torn) == (2 if log.position == 2 else 3, "")


def test_disk_that_fails_is_explained_when_reading() -> None:
    class Unreadable(ForgetfulDisk):
        def names(self) -> list[str]:
            raise io_error()

    with pytest.raises(StateError, match="Input/output error"):
        list(read_log(Unreadable(), RUN, 0))
    with pytest.raises(StateError, match="Input/output error"):
        Log.open(Unreadable(), RUN, 0)


# --- power losses


def work(disk: ForgetfulDisk, log: Log) -> None:
    """Do everything a log can, in batches of several sizes."""
    for turn in range(4):
        fill(log, turn + 1)
        log.commit()
        fill(log, 2)
        log.rotate()
        if turn == 2:
            log.cut(3)
    fill(log, 3)
    log.commit()
    fill(log, 1)


def check_recovery(found: ForgetfulDisk, durable: int, position: int, start: int) -> int:
    """Recover, and check that what was durable is there and what was not appended is not."""
    log, records, _ = reopen(found, start)
    assert records == [record(n) for n in range(start, start + len(records))]
    assert durable <= log.position <= position
    assert log.durable == log.position
    return log.position


def test_power_loss_at_every_operation_loses_nothing_durable() -> None:
    total = ForgetfulDisk()
    work(total, Log.create(total, RUN, 0))
    assert total.operations > 40
    for number in range(total.operations + 1):
        for seed in SEEDS:
            rng = random.Random(f"{number} {seed}")
            disk = ForgetfulDisk(rng)
            disk.fail_at(number)
            durable, position, start, log = 0, 0, 0, None
            try:
                log = Log.create(disk, RUN, 0)
                work(disk, log)
            except (PowerLossError, StateError):
                pass
            if log is not None:
                durable, position = log.durable, log.position
            start = 0 if durable < 10 else 6  # nothing after the cut asks for what was cut
            found = disk.after_power_loss(rng) if seed % 4 else disk.after_kill()
            again = check_recovery(found, durable, position, start)
            # and recovering is itself interrupted, after more was written
            second = _go_on_and_lose_power(found, again, start, rng)
            check_recovery(second, again, again + 5, start)


def _go_on_and_lose_power(
    found: ForgetfulDisk, position: int, start: int, rng: random.Random
) -> ForgetfulDisk:
    found = found.after_kill()
    found.fail_at(found.operations + rng.randrange(6))
    try:
        log = Log.open(found, RUN, position)
        fill(log, 5)
        log.commit()
    except (PowerLossError, StateError):
        pass
    return found.after_power_loss(rng)


def test_recovered_records_are_durable_before_they_count() -> None:
    # a killed process leaves what it wrote in memory; the next one must not take that for the disk
    disk = ForgetfulDisk()
    log = Log.create(disk, RUN, 0)
    fill(log, 3)
    disk.fail_at(disk.operations + 1)
    with pytest.raises(PowerLossError):
        log.commit()
    found = disk.after_kill()
    assert reopen(found)[0].durable == 3
    for seed in SEEDS:
        assert len(list(read_log(found.after_power_loss(random.Random(seed)), RUN, 0))) == 3


def test_batch_that_was_torn_out_of_order_is_cut_off_whole_from_the_first_gap() -> None:
    disk = ForgetfulDisk()
    log = Log.create(disk, RUN, 0)
    fill(log, 8)  # one batch: none of its records calls another one durable
    log.commit()
    second = HEADER_BYTES + RECORD_BYTES + len(record(0).payload)
    disk.damage(segment_name(0), lambda data: data.__setitem__(second, 0))
    again, records, torn = reopen(disk)
    assert records == [record(0)]
    assert torn == (
        "disk/log-00000000000000000000.wal, byte 85: b'\\x00GSR', not b'DGSR', in place of record 1"
    )
    fill(again, 2)
    again.commit()
    assert list(read_log(disk, RUN, 0)) == [record(n) for n in range(3)]


@pytest.mark.parametrize("left", range(HEADER_BYTES))
def test_segment_whose_header_was_not_finished_is_begun_again(left: int) -> None:
    disk = ForgetfulDisk()
    log = Log.create(disk, RUN, 0)
    fill(log, 2)
    log.rotate()
    disk.damage(segment_name(2), lambda data: data.__delitem__(slice(left, None)))
    again, records, torn = reopen(disk)
    assert records == [record(0), record(1)]
    assert "bytes of a header" in torn
    assert raw(disk, 2) == encode_segment_header(RUN, 2)
    fill(again, 1)
    assert again.commit() == 3
    assert len(reopen(disk)[1]) == 3


def test_file_left_over_from_an_unfinished_rotation_does_no_harm() -> None:
    disk = ForgetfulDisk()
    log = Log.create(disk, RUN, 0)
    fill(log, 2)
    log.commit()
    disk.open(segment_name(2) + ".new").write(b"half a header")
    again, records, torn = reopen(disk)
    assert (len(records), torn) == (2, "")
    again.rotate()
    assert raw(disk, 2) == encode_segment_header(RUN, 2)


def test_log_that_ends_before_its_snapshot_goes_on_after_it() -> None:
    disk = ForgetfulDisk()
    log = Log.create(disk, RUN, 0)
    fill(log, 2)
    log.commit()
    again, records, _ = reopen(disk, 5)
    assert (records, again.position) == ([], 5)
    fill(again, 1)
    again.commit()
    assert list(read_log(disk, RUN, 5)) == [record(5)]
    with pytest.raises(StateError, match="expected it to go on with record 2"):
        list(read_log(disk, RUN, 0))


def test_log_is_not_written_before_it_was_read_to_its_end() -> None:
    disk = ForgetfulDisk()
    log = Log.create(disk, RUN, 0)
    fill(log, 2)
    log.commit()
    with pytest.raises(StateError, match="ends with record 2, not 1"):
        Log.open(disk, RUN, 1)


# --- damage


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


def test_real_folder_keeps_the_log_over_a_process_and_a_full_disk(tmp_path: Path) -> None:
    with FolderDisk(tmp_path) as disk:
        log = Log.create(disk, RUN, 0)
        fill(log, 5)
        log.commit()
        log.rotate()
        fill(log, 2)
        log.commit()
        log.close()
        with pytest.raises(StateError, match="is closed"):
            log.commit()
    path = tmp_path / segment_name(5)
    path.write_bytes(path.read_bytes() + b"DGSR and half a record")
    with FolderDisk(tmp_path) as disk:
        log, records, torn = reopen(disk)
        assert records == [record(n) for n in range(7)]
        assert "byte" in torn
        fill(log, 1)
        log.commit()
        log.close()
        assert len(list(read_log(disk, RUN, 0))) == 8
