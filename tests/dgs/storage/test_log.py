"""The log: what was acknowledged survives anything, what was not is at most lost from the end."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgs.errors import StateError
from dgs.storage.disk import FolderDisk
from dgs.storage.log import Log
from dgs.storage.records import (
    HEADER_BYTES,
    METHODS,
    RECORD_BYTES,
    encode_segment_header,
    segment_name,
)
from dgs.storage.wal import Record, list_segments, read_log
from tests.dgs.storage.logs import RUN, fill, raw, record, reopen
from tests.helpers.disks import ForgetfulDisk, PowerLossError

U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
RECORDS = st.builds(Record, st.sampled_from(METHODS), U32, U64, U64, U32, st.binary(max_size=200))
SEEDS = range(40)
STEPS_OF_ROTATE = ("create", "truncate", "write", "sync log", "rename", "sync names")


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
            with suppress(PowerLossError, StateError):
                log = Log.create(disk, RUN, 0)
                work(disk, log)
            if log is not None:
                durable, position = log.durable, log.position
            start = 0 if durable < 10 else 6  # nothing after the cut asks for what was cut
            found = disk.after_power_loss(rng) if seed % 4 else disk.after_kill()
            again = check_recovery(found, durable, position, start)
            # and recovering is itself interrupted, after more was written
            second, durable = _go_on_and_lose_power(found, again, rng)
            check_recovery(second, durable, again + 5, start)


def _go_on_and_lose_power(
    found: ForgetfulDisk, position: int, rng: random.Random
) -> tuple[ForgetfulDisk, int]:
    found = found.after_kill()
    found.fail_at(found.operations + rng.randrange(8))
    durable = position
    with suppress(PowerLossError, StateError):
        log = Log.open(found, RUN, position)
        fill(log, 5)
        durable = log.commit()
    return found.after_power_loss(rng), durable


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
