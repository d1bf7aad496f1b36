"""Whoever waits for the log returns when it is durable, and few syncs serve many."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from dgs.errors import StateError
from dgs.storage.commit import GroupCommit

PATIENCE_S = 30.0


class GatedLog:
    """A log whose commits wait until the test lets them go."""

    def __init__(self) -> None:
        self.position = 0
        self.durable = 0
        self.commits = 0
        self.failure = ""
        self.began = threading.Semaphore(0)
        self.gate = threading.Semaphore(0)

    def commit(self) -> int:
        taken = self.position
        self.commits += 1
        self.began.release()
        assert self.gate.acquire(timeout=PATIENCE_S)
        if self.failure:
            raise StateError(self.failure)
        self.durable = taken
        return taken


def test_what_is_durable_waits_for_nothing() -> None:
    log = GatedLog()
    GroupCommit(log).wait(0)
    assert log.commits == 0


def test_all_who_come_during_one_sync_share_the_next() -> None:
    log = GatedLog()
    group = GroupCommit(log)
    with ThreadPoolExecutor(9) as pool:
        log.position = 1
        first = pool.submit(group.wait, 1)
        assert log.began.acquire(timeout=PATIENCE_S)
        log.position = 9
        rest = [pool.submit(group.wait, i) for i in range(2, 10)]
        log.gate.release(2)
        for future in (first, *rest):
            future.result(timeout=PATIENCE_S)
    assert (log.commits, log.durable) == (2, 9)


def test_nobody_is_told_that_a_failed_commit_succeeded() -> None:
    log = GatedLog()
    group = GroupCommit(log)
    log.position, log.failure = 4, "full"
    log.gate.release(4)
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(group.wait, i) for i in range(1, 5)]
        for future in futures:
            with pytest.raises(StateError, match="full"):
                future.result(timeout=PATIENCE_S)
    assert log.durable == 0


def test_after_a_failure_the_next_commit_serves_all() -> None:
    log = GatedLog()
    group = GroupCommit(log)
    log.position, log.failure = 1, "full"
    log.gate.release(2)
    with pytest.raises(StateError):
        group.wait(1)
    log.failure = ""
    group.wait(1)
    assert log.durable == 1
