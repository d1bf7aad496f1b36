"""Sessions end by lease, snapshots come in time, and Status tells of both."""

from __future__ import annotations

import logging
import random
import threading

import pytest

from dgs.client import server_status
from dgs.config import ServerConfig, StorageConfig
from dgs.durable import Durable
from dgs.errors import ServerUnavailableError
from dgs.housekeeping import Housekeeper, LeaseChore, Reporting, SnapshotChore, TroubleChore
from dgs.server import ParameterServer
from dgs.state import fingerprint
from dgs.storage.commit import GroupCommit
from dgs.storage.records import Record
from dgs.transport.guard import GuardedHandler
from dgs.transport.local import LocalTransport
from tests.helpers.disks import ForgetfulDisk
from tests.helpers.requests import answer, record
from tests.helpers.training import Batches, make_model, train_step, wrap

LEASE_S = 60.0
CONFIG = ServerConfig(lease_s=LEASE_S, hash_interval=1)


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Leased:
    """A server with leases, and workers that train on it."""

    def __init__(self, core: ParameterServer) -> None:
        self.clock = Clock()
        self.guard = GuardedHandler(core)
        self.chore = LeaseChore(self.guard, core, self.clock)
        self.core = core

    def worker(self, name: str) -> tuple[object, ...]:
        model = make_model()
        return model, wrap(model, self.guard, worker=name), Batches()  # type: ignore[arg-type]

    def pass_time(self, seconds: float) -> None:
        self.clock.now_s += seconds
        self.chore.do()

    @property
    def names(self) -> list[str]:
        return [s.worker for s in self.core.state.registry.sessions()]


@pytest.fixture
def leased() -> Leased:
    return Leased(ParameterServer(CONFIG))


def test_a_silent_session_ends_when_its_lease_has_run_out_and_others_stay(leased: Leased) -> None:
    silent, busy = leased.worker("silent"), leased.worker("busy")
    leased.pass_time(0)
    for _ in range(3):
        train_step(*busy)  # type: ignore[arg-type]
        leased.pass_time(LEASE_S / 3)
    assert leased.names == ["busy"]
    silent[1].close()  # type: ignore[attr-defined]
    busy[1].close()  # type: ignore[attr-defined]


def test_an_evicted_worker_that_lives_joins_again_and_loses_no_velocity(
    leased: Leased, caplog: pytest.LogCaptureFixture
) -> None:
    model, opt, batches = leased.worker("slow")
    train_step(model, opt, batches)  # type: ignore[arg-type]
    leased.pass_time(0)
    leased.pass_time(LEASE_S)
    assert leased.names == []
    with caplog.at_level(logging.ERROR):
        train_step(model, opt, batches)  # type: ignore[arg-type]
        train_step(model, opt, batches)  # type: ignore[arg-type]
    assert leased.names == ["slow"]
    assert opt.stats.rejoins == 1  # type: ignore[attr-defined]
    opt.close()  # type: ignore[attr-defined]


def test_without_a_lease_nothing_ends() -> None:
    leased = Leased(ParameterServer(ServerConfig(lease_s=0)))
    worker = leased.worker("a")
    leased.pass_time(0)
    leased.pass_time(1e8)
    assert leased.names == ["a"]
    worker[1].close()  # type: ignore[attr-defined]


def test_sessions_kept_for_resuming_end_by_lease_too(leased: Leased) -> None:
    for one in record(run=leased.core.state.run):
        answer(leased.core, one)
    registry = leased.core.state.registry
    leased.pass_time(0)
    leased.pass_time(LEASE_S)
    assert list(registry.all_sessions()) == []
    assert list(registry.places()) == []


class Kept:
    """A server with a disk, and the chores that keep it."""

    def __init__(self, storage: StorageConfig) -> None:
        self.disk, self.clock = ForgetfulDisk(), Clock()
        self.durable = Durable.open(self.disk, ServerConfig(hash_interval=4), run=9)
        self.guard = GuardedHandler(self.durable, GroupCommit(self.durable))
        self.snapshots = SnapshotChore(self.guard, self.durable, storage, self.clock)


def test_a_snapshot_is_made_when_its_time_has_come_and_something_has_changed() -> None:
    kept = Kept(StorageConfig(snapshot_interval_s=100.0))
    kept.clock.now_s += 100.0
    kept.snapshots.do()
    assert kept.durable.snapshot_position == 0  # nothing has
    for one in record(rounds=5):
        answer(kept.guard, one)
    kept.clock.now_s += 10.0
    kept.snapshots.do()
    assert kept.durable.snapshot_position == kept.durable.position > 0


def test_a_long_log_makes_a_snapshot_early() -> None:
    kept = Kept(StorageConfig(snapshot_interval_s=1e6, snapshot_log_bytes=1 << 20))
    said = record(rounds=5)
    for one in said:
        answer(kept.guard, one)
    kept.snapshots.do()
    assert kept.durable.snapshot_position == 0
    frame = next(one for one in said if one.method == "Exchange")
    while kept.durable.log_bytes < 1 << 20:
        kept.durable._log.append(_like(frame.request, kept.durable))
    kept.snapshots.do()
    assert kept.durable.snapshot_position == kept.durable.position


def test_many_requests_make_a_snapshot_early() -> None:
    kept = Kept(StorageConfig(snapshot_interval_s=1e6, snapshot_log_records=20))
    for one in record():
        answer(kept.guard, one)
        kept.clock.now_s += 10.0
        kept.snapshots.do()
        assert kept.durable.position - kept.durable.snapshot_position < 20


def _like(request: bytes, durable: Durable) -> Record:
    return Record("Exchange", 0, 1, durable.position, 0, request * 100)


def test_a_snapshot_that_fails_is_told_of_and_tried_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    kept = Kept(StorageConfig(snapshot_interval_s=100.0))
    for one in record(rounds=5):
        answer(kept.guard, one)
    kept.clock.now_s += 100.0

    def full(number: int, kind: str) -> None:
        if "snapshot" in kind:
            raise OSError(28, "No space left on device")

    kept.disk.trouble = full
    kept.snapshots.do()
    assert "no snapshot was made, the log goes on" in caplog.text
    assert kept.durable.trouble == ""
    kept.disk.trouble = lambda number, kind: None
    kept.snapshots.do()
    assert kept.durable.snapshot_position == 0  # not at once
    kept.clock.now_s += 10.0
    kept.snapshots.do()
    assert kept.durable.snapshot_position == kept.durable.position
    again = Durable.open(kept.disk.after_power_loss(random.Random(0)))
    assert fingerprint(again.core.state) == fingerprint(kept.durable.core.state)


def test_status_tells_limits_and_storage() -> None:
    kept = Kept(StorageConfig())
    leases = LeaseChore(kept.guard, kept.durable.core, kept.clock)
    reporting = Reporting(kept.durable, [leases.report, kept.snapshots.report])
    for one in record(rounds=5):
        answer(kept.guard, one)
    kept.clock.now_s += 7.0
    status = server_status(LocalTransport(reporting), timeout_s=1.0)
    assert status.limits.max_workers == 1024
    assert status.limits.lease_s == 3600.0
    assert status.limits.record_bytes > 0
    assert status.limits.reply_bytes > 0
    assert status.storage.position == status.storage.durable == kept.durable.position
    assert status.storage.log_bytes == kept.durable.log_bytes
    assert status.storage.snapshot_age_s == 7.0
    assert status.storage.trouble == ""


def test_trouble_is_told_once_and_by_status_as_well() -> None:
    kept = Kept(StorageConfig())
    told: list[str] = []
    chore = TroubleChore(kept.durable, told.append)
    chore.do()
    assert told == []

    def broken(number: int, kind: str) -> None:
        if kind.startswith("sync"):
            raise OSError(5, "Input/output error")

    kept.disk.trouble = broken
    with pytest.raises(ServerUnavailableError, match="cannot keep what it is sent"):
        kept.guard.handle("Join", record(rounds=1)[0].request)
    chore.do()
    chore.do()
    assert len(told) == 1
    reporting = Reporting(kept.durable, [kept.snapshots.report])
    assert server_status(LocalTransport(reporting), timeout_s=1.0).storage.trouble == told[0]


def test_the_housekeeper_does_all_chores_again_and_again_even_if_one_breaks(
    caplog: pytest.LogCaptureFixture,
) -> None:
    done = threading.Event()

    class Broken:
        def do(self) -> None:
            raise ZeroDivisionError

        def report(self, status: object) -> None:
            raise NotImplementedError

    class Counting:
        count = 0

        def do(self) -> None:
            self.count += 1
            if self.count == 3:
                done.set()

        def report(self, status: object) -> None:
            raise NotImplementedError

    keeper = Housekeeper([Broken(), Counting()], 0.001)
    assert done.wait(30)
    keeper.close()
    assert "housekeeping failed" in caplog.text
