"""What was durable comes back bit for bit, whatever the disk forgets."""

from __future__ import annotations

import errno
import os
import random
from unittest.mock import patch

import numpy as np
import pytest

from dgs.config import ServerConfig
from dgs.durable import Durable
from dgs.errors import StateError, TooLargeError
from dgs.server import ParameterServer
from dgs.state import fingerprint
from dgs.storage.snapshot import list_snapshots
from tests.helpers.disks import ForgetfulDisk, PowerLossError
from tests.helpers.requests import Said, answer, is_same, record

CONFIG = ServerConfig(hash_interval=4)


def begin(disk: ForgetfulDisk) -> Durable:
    return Durable.open(disk, CONFIG, run=9)


def fingerprints(said: list[Said]) -> list[str]:
    """Return the state's fingerprint at each position."""
    server = ParameterServer(CONFIG, run=9)
    result = [fingerprint(server.state)]
    for one in said:
        answer(server, one)
        if server.state.changes == len(result):
            result.append(fingerprint(server.state))
    return result


def carry_out(durable: Durable, said: list[Said], snapshot_at: int = -1) -> None:
    for turn, one in enumerate(said):
        assert is_same(answer(durable, one), one.reply)
        durable.commit()
        if turn == snapshot_at:
            durable.finish_snapshot(durable.begin_snapshot())


def test_an_empty_folder_begins_with_a_snapshot() -> None:
    disk = ForgetfulDisk()
    assert begin(disk).recovery.is_new
    disk = disk.after_power_loss(random.Random(0))
    again = Durable.open(disk)
    assert (again.recovery.is_new, again.core.state.run) == (False, 9)


@pytest.mark.parametrize("snapshot_at", [-1, 0, 20, 41])
def test_every_committed_request_is_recovered(snapshot_at: int) -> None:
    said = record()
    disk = ForgetfulDisk()
    durable = begin(disk)
    carry_out(durable, said, snapshot_at)
    disk = disk.after_power_loss(random.Random(0))
    again = Durable.open(disk, CONFIG)
    assert fingerprint(again.core.state) == fingerprint(durable.core.state)
    assert again.position == durable.position
    assert again.recovery.replayed == again.position - again.recovery.snapshot


def test_power_loss_at_any_operation_loses_nothing_that_was_committed() -> None:
    said = record(rounds=10)
    states = fingerprints(said)
    operations = _run(ForgetfulDisk(), said)[1]
    for lost in range(operations):
        disk = ForgetfulDisk(random.Random(lost))
        disk.fail_at(lost)
        durable_position, _ = _run(disk, said)
        again = Durable.open(disk.after_power_loss(random.Random(lost)), CONFIG, run=9)
        assert again.position >= durable_position, lost
        assert fingerprint(again.core.state) == states[again.position], lost


def _run(disk: ForgetfulDisk, said: list[Said]) -> tuple[int, int]:
    """Carry everything out, two snapshots included; return what was durable, and operations."""
    durable = None
    try:
        durable = begin(disk)
        for turn, one in enumerate(said):
            answer(durable, one)
            if turn % 3 == 2:
                durable.commit()
            if turn % 9 == 4:
                durable.finish_snapshot(durable.begin_snapshot())
    except PowerLossError:
        pass
    return (durable.durable if durable else 0), disk.operations


def test_what_was_handled_but_not_committed_may_be_lost_and_nothing_else() -> None:
    said = record(rounds=8)
    disk = ForgetfulDisk()
    durable = begin(disk)
    carry_out(durable, said[:5])
    committed = durable.position
    for one in said[5:]:
        answer(durable, one)
    assert durable.durable == committed < durable.position
    disk = disk.after_power_loss(random.Random(0))
    again = Durable.open(disk)
    assert again.position == committed
    for one in said[5:]:
        assert is_same(answer(again, one), one.reply)
    assert fingerprint(again.core.state) == fingerprint(durable.core.state)


def test_the_log_reaches_back_to_the_older_of_two_snapshots() -> None:
    disk = ForgetfulDisk()
    durable = begin(disk)
    said = record()
    for third in np.array_split(np.arange(len(said)), 4):
        carry_out(durable, [said[i] for i in third])
        durable.finish_snapshot(durable.begin_snapshot())
    newest, older = (entry.position for entry in list_snapshots(disk))
    assert newest == durable.position
    firsts = [int(n[4:24]) for n in disk.names() if n.startswith("log-")]
    assert firsts == [older, newest]


def test_a_full_disk_stops_acknowledging_until_there_is_room() -> None:
    said = record(rounds=6)
    disk = ForgetfulDisk()
    durable = begin(disk)
    carry_out(durable, said[:4])

    def full(number: int, kind: str) -> None:
        if kind.startswith("write"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    disk.trouble = full
    answer(durable, said[4])
    before = durable.durable
    for _ in range(2):
        with pytest.raises(StateError, match="No space left"):
            durable.commit()
    assert (durable.durable, durable.trouble) == (before, "")
    disk.trouble = lambda number, kind: None
    assert durable.commit() == durable.position > before
    disk = disk.after_power_loss(random.Random(0))
    assert Durable.open(disk).position == durable.position


def test_a_failed_sync_ends_acknowledging_for_good() -> None:
    said = record(rounds=6)
    disk = ForgetfulDisk()
    durable = begin(disk)
    carry_out(durable, said[:4])

    def broken(number: int, kind: str) -> None:
        if kind.startswith("sync"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    disk.trouble = broken
    answer(durable, said[4])
    with pytest.raises(StateError, match="Input/output error"):
        durable.commit()
    disk.trouble = lambda number, kind: None
    with pytest.raises(StateError):
        durable.commit()
    assert durable.trouble


@pytest.mark.parametrize("error", [MemoryError, TooLargeError])
def test_a_defect_in_the_middle_of_a_request_ends_acknowledging(error: type[Exception]) -> None:
    said = record(rounds=6)
    disk = ForgetfulDisk()
    durable = begin(disk)
    last = max(i for i, one in enumerate(said) if one.method == "Exchange")
    carry_out(durable, said[:last])
    with patch("dgs.tracker.Record.advance", side_effect=error), pytest.raises(error):
        durable.handle("Exchange", said[last].request)
    assert durable.trouble
    with pytest.raises(StateError, match="start the server again"):
        durable.handle("Status", b"")
    with pytest.raises(StateError):
        durable.begin_snapshot()
    again = Durable.open(disk)
    assert is_same(answer(again, said[last]), said[last].reply)


def test_a_session_whose_replies_would_be_others_ends_and_the_model_stays() -> None:
    said = record(rounds=12)
    disk = ForgetfulDisk()
    durable = begin(disk)
    carry_out(durable, said)
    model = np.array(durable.core.state.shard.model)  # type: ignore[union-attr]
    with patch("dgs.select.TrackedSelector.GAIN", 0.3):  # as if another release chose otherwise
        again = Durable.open(disk)
    assert again.recovery.dropped > 0
    assert again.core.state.shard is not None
    assert again.core.state.shard.model.tobytes() == model.tobytes()
    left = list(again.core.state.registry.sessions())
    assert len(left) < len(list(durable.core.state.registry.sessions()))
    assert Durable.open(disk).recovery.dropped == 0  # a snapshot was made of that


def test_a_request_that_is_refused_on_replay_is_no_reason_to_go_on_without_it() -> None:
    disk = ForgetfulDisk()
    durable = begin(disk)
    carry_out(durable, record(rounds=5))
    with (
        patch("dgs.joining.WIRE_VERSION", 2),
        pytest.raises(StateError, match=r"request 0 of the log \(Join\).*start the release that"),
    ):
        Durable.open(disk)


def test_other_limits_take_effect_and_are_kept() -> None:
    disk = ForgetfulDisk()
    carry_out(begin(disk), record(rounds=5))
    fewer = ServerConfig(hash_interval=1, max_workers=7)
    assert Durable.open(disk, fewer).core.state.config == fewer
    assert Durable.open(disk).core.state.config == fewer
    assert Durable.open(disk).recovery.replayed == 0


def test_another_model_than_the_one_in_the_folder_is_refused() -> None:
    disk = ForgetfulDisk()
    carry_out(begin(disk), record(rounds=5))
    with pytest.raises(StateError, match="another model than the one to start from: tensor 't0'"):
        Durable.open(disk, init={"weight": np.ones(3, np.float32)})


def test_an_initial_model_survives_until_the_first_worker_comes() -> None:
    disk = ForgetfulDisk()
    model = {"w": np.arange(3, dtype=np.float32)}
    Durable.open(disk, CONFIG, init=model)
    state = Durable.open(disk).core.state
    assert state.init is not None
    assert state.init["w"].tolist() == [0, 1, 2]


def test_a_log_without_its_snapshots_is_not_begun_anew() -> None:
    disk = ForgetfulDisk()
    carry_out(begin(disk), record(rounds=5))
    for name in disk.names():
        if name.startswith("snapshot-"):
            disk.remove(name)
    with pytest.raises(StateError, match="no snapshot that it could start from"):
        begin(disk)


def test_a_snapshot_whose_log_is_missing_is_not_gone_on_from() -> None:
    disk = ForgetfulDisk()
    durable = begin(disk)
    carry_out(durable, record(rounds=8), snapshot_at=10)
    last = [name for name in disk.names() if name.startswith("log-")][-1]
    disk.remove(last)
    with pytest.raises(StateError, match=rf"holds snapshot \d+, but not {last}"):
        Durable.open(disk)


def test_a_snapshot_of_a_release_with_other_settings_is_refused_in_plain_words() -> None:
    disk = ForgetfulDisk()
    carry_out(begin(disk), record(rounds=3))
    with (
        patch("dgs.state.ServerConfig", side_effect=TypeError("unexpected argument 'quorum'")),
        pytest.raises(StateError, match=r"does not say what this release expects.*quorum"),
    ):
        Durable.open(disk)
