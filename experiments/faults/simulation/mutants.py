"""Servers with one mistake each: a harness that does not catch all of them proves nothing.

Every mutant is a small patch of the real classes, in force inside a context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace
from typing import Any, Final
from unittest.mock import patch

import dgs.durable
from dgs.durable import Durable
from dgs.errors import UnknownWorkerError
from dgs.frame import decode_frame
from dgs.registry import Registry
from dgs.server import ParameterServer
from dgs.session import Session
from dgs.storage import records
from dgs.storage.disk import Disk, DiskFile
from dgs.storage.log import Log
from dgs.storage.snapshot import Snapshot
from dgs.storage.wal import LogContents, list_segments
from experiments.faults.simulation.disk import SimDisk, SimFile

__all__ = ["MUTANTS"]

Mutant = Callable[[], AbstractContextManager[Any]]


def _no_dedup() -> AbstractContextManager[Any]:
    """A repeated update is applied again."""
    real = ParameterServer._exchange

    def exchange(self: ParameterServer, request: bytes) -> bytes:
        h = decode_frame(request).header
        session = self._session(h.run, h.worker_id, h.member, h.incarnation)
        if h.seq == session.seq:
            session.seq -= 1
        return real(self, request)

    return patch.object(ParameterServer, "_exchange", exchange)


def _no_cached_reply() -> AbstractContextManager[Any]:
    """A repeated update is answered with what differs by now."""
    real = ParameterServer._exchange

    def exchange(self: ParameterServer, request: bytes) -> bytes:
        h = decode_frame(request).header
        session = self._session(h.run, h.worker_id, h.member, h.incarnation)
        if h.seq == session.seq and session.reply:
            return self._answer(session, h, 0)
        return real(self, request)

    return patch.object(ParameterServer, "_exchange", exchange)


@contextmanager
def _no_fencing() -> Iterator[None]:
    """Earlier incarnations pass for the newest."""

    def session(self: Registry, number: int, member: int, incarnation: int) -> Session:
        found = self.worker_numbered(number).live.get(member)
        if found is None:
            raise UnknownWorkerError("no such session; join again")
        return found

    with (
        patch.object(Registry, "session", session),
        patch.object(Registry, "check_incarnation", lambda self, joining: None),
    ):
        yield


def _acknowledges_before_sync() -> AbstractContextManager[Any]:
    """What was written counts as durable."""
    real = Log._put

    def put(self: Log, file: DiskFile, data: bytes) -> None:
        with patch.object(SimFile, "sync", lambda file: None):
            real(self, file, data)

    return patch.object(Log, "_put", put)


def _no_checksum() -> AbstractContextManager[Any]:
    """Records of the log are believed as they are read."""
    return patch.object(records, "zlib", SimpleNamespace(crc32=lambda data, seed=0: 0))


def _snapshot_without_numbers() -> AbstractContextManager[Any]:
    """Snapshots forget which update of a session was the last."""
    real = Session.facts
    return patch.object(Session, "facts", lambda self: {**real(self), "seq": 0})


def _cuts_before_rename() -> AbstractContextManager[Any]:
    """The log is cut before the snapshot that covers it is there."""
    real = Durable.finish_snapshot

    def finish(self: Durable, snapshot: Snapshot) -> int:
        self._log.cut(snapshot.position)
        return real(self, snapshot)

    return patch.object(Durable, "finish_snapshot", finish)


@contextmanager
def _replays_blindly() -> Iterator[None]:
    """All of the log is carried out again, also what the snapshot covers."""
    last: list[LogContents] = []
    real = Log.open

    def read(disk: Disk, run: int, start: int) -> LogContents:
        contents = LogContents(disk, run, min([start, *list_segments(disk)]))
        last[:] = [contents]
        return contents

    def opened(disk: Disk, run: int, position: int) -> Log:
        return real(disk, run, last[0].end if last and position else position)

    with patch.object(dgs.durable, "read_log", read), patch.object(Log, "open", opened):
        yield


def _never_syncs_names() -> AbstractContextManager[Any]:
    """The folder is never synced."""
    return patch.object(SimDisk, "sync", lambda self: None)


def _trusts_what_it_reads() -> AbstractContextManager[Any]:
    """What recovery has read counts as durable, though maybe nobody has synced it."""
    real = Log._go_on

    def go_on(self: Log) -> bool:
        with patch.object(SimFile, "sync", lambda file: None):
            return real(self)

    return patch.object(Log, "_go_on", go_on)


def _keeps_torn_tails() -> AbstractContextManager[Any]:
    """New records are written behind what a torn write left."""
    real = Log._take

    def take(self: Log, name: str, header: bytes, size: int) -> None:
        real(self, name, header, size)
        file: Any = self._file
        file.truncate = lambda size: None

    return patch.object(Log, "_take", take)


def _goes_on_after_failed_write() -> AbstractContextManager[Any]:
    """What a full disk took of a write stays in the log."""

    def cut_back(self: Log, file: DiskFile) -> bool:
        return True

    return patch.object(Log, "_cut_back", cut_back)


def _goes_on_half_done() -> AbstractContextManager[Any]:
    """A server goes on after a request that broke off in the middle of changing its state."""
    real = Durable.handle

    def handle(self: Durable, method: str, request: bytes) -> bytes:
        try:
            return real(self, method, request)
        finally:
            self._defect = ""

    return patch.object(Durable, "handle", handle)


MUTANTS: Final[dict[str, Mutant]] = {
    "no-dedup": _no_dedup,
    "ack-before-fsync": _acknowledges_before_sync,
    "no-cached-reply": _no_cached_reply,
    "no-fencing": _no_fencing,
    "no-crc": _no_checksum,
    "snapshot-without-seq": _snapshot_without_numbers,
    "cut-before-rename": _cuts_before_rename,
    "blind-replay": _replays_blindly,
    "names-not-synced": _never_syncs_names,
    "recovered-not-synced": _trusts_what_it_reads,
    "torn-tail-kept": _keeps_torn_tails,
    "failed-write-kept": _goes_on_after_failed_write,
    "half-done-kept": _goes_on_half_done,
}
"""Patches by name."""
