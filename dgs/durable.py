"""A server whose state outlives its process: every change is logged before anyone is told of it.

The server's core is a function of the requests that changed it, so the log holds these requests.
`handle` carries one out in memory and appends it; `commit` makes everything appended durable, and
only then may replies leave. Recovery takes the newest snapshot and carries out what was logged
behind it: model, replicas, versions, sequence numbers and cached replies are what they were, bit
for bit. There are no threads and no clock in here.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from dgs.config import ServerConfig
from dgs.errors import DgsError, ModelMismatchError, StateError
from dgs.frame import frame_checksum, peek_header
from dgs.server import ParameterServer
from dgs.space import FloatArray
from dgs.state import ServerState
from dgs.storage.disk import Disk, remedy
from dgs.storage.log import Log
from dgs.storage.records import Record, segment_name
from dgs.storage.snapshot import (
    Snapshot,
    clean,
    list_snapshots,
    prune,
    read_snapshot,
    write_snapshot,
)
from dgs.storage.wal import list_segments, read_log

__all__ = ["Durable", "Recovery"]

logger = logging.getLogger("dgs.server")

_DEFECT = (
    "a request broke off half done, so the state in memory is not that of the log any more; "
    "everything acknowledged is on disk: start the server again"
)

KEPT_SNAPSHOTS = 2
"""The log reaches back to the older one, so a damaged newest snapshot loses nothing."""


@dataclass(frozen=True, slots=True)
class Recovery:
    """What was found in a state directory."""

    snapshot: int
    """Position that the snapshot covers: requests that had changed the state."""
    replayed: int
    """Requests carried out again, from the log."""
    torn: str
    """What was cut off the log's end, for it had not been acknowledged; empty if nothing."""
    dropped: int
    """Sessions whose replies came out otherwise than before; their workers join again."""

    @property
    def is_new(self) -> bool:
        """Whether the directory was empty."""
        return self.snapshot < 0


class Durable:
    """Join a server's core, its log and its snapshots.

    Requests come one at a time; `commit` and `finish_snapshot` may run in other threads, each in
    one at a time.

    Args:
        disk: where the state is.
        core: the server.
        log: open behind the last record that the core has carried out.
        recovery: how core and log came about.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from dgs.storage.disk import FolderDisk
        >>> with tempfile.TemporaryDirectory() as folder, FolderDisk(Path(folder)) as disk:
        ...     durable = Durable.open(disk)
        ...     durable.position, durable.commit(), durable.recovery.is_new
        ...     durable.close()
        (0, 0, True)
    """

    def __init__(self, disk: Disk, core: ParameterServer, log: Log, recovery: Recovery) -> None:
        """Take over what `open` has put together."""
        self._disk = disk
        self.core = core
        self._log = log
        self.recovery = recovery
        self.snapshot_position = max(0, recovery.snapshot)
        """Requests that the newest snapshot covers."""
        self._defect = ""

    @classmethod
    def open(
        cls,
        disk: Disk,
        config: ServerConfig | None = None,
        *,
        init: Mapping[str, FloatArray] | None = None,
        run: int | None = None,
    ) -> Self:
        """Recover what a state directory holds, or begin in an empty one.

        Args:
            disk: the directory.
            config: limits and intervals; None for those that the state was saved with.
            init: model to start from, where the directory is empty.
            run: number of the state, where the directory is empty; random if None.

        Raises:
            StateError: the directory is damaged, or of a newer release; says what to do.
            OSError: the disk fails.
        """
        clean(disk)
        if not list_snapshots(disk):
            return cls._begin(disk, config or ServerConfig(), init=init, run=run)
        durable = cls._recover(disk)
        if init is not None:
            durable._check_same_model(init)
        if config is not None and config != durable.core.state.config:
            durable.core.state.configure(config)
            durable.finish_snapshot(durable.begin_snapshot())
        return durable

    @classmethod
    def _begin(
        cls,
        disk: Disk,
        config: ServerConfig,
        *,
        init: Mapping[str, FloatArray] | None,
        run: int | None,
    ) -> Self:
        if list_segments(disk):
            raise StateError(
                f"{disk.label} holds a log, but no snapshot that it could start from: the files "
                "snapshot-* were removed. Put them back, or name another folder with --state-dir"
            )
        core = ParameterServer(config, init=init, run=run)
        write_snapshot(disk, _snapshot_of(core, 0))
        log = Log.open(disk, core.state.run, 0)
        return cls(disk, core, log, Recovery(snapshot=-1, replayed=0, torn="", dropped=0))

    @classmethod
    def _recover(cls, disk: Disk) -> Self:
        newest = list_snapshots(disk)[0].position
        facts, arrays = read_snapshot(disk, newest)
        try:
            core = ParameterServer.of(ServerState.restored(facts, arrays))
        except (KeyError, TypeError, ValueError) as e:
            raise StateError(
                f"snapshot {newest} in {disk.label} is sound, but does not say what this release "
                f"expects ({e!r}): start the release that wrote it"
            ) from e
        del arrays
        run = core.state.run
        if newest > 0 and newest not in list_segments(disk):  # each snapshot begins a segment
            raise StateError(
                f"{disk.label} holds snapshot {newest}, but not {segment_name(newest)}, where the "
                f"log goes on: put the file back, or {remedy(disk)}"
            )
        contents = read_log(disk, run, newest)
        replayed, changed = 0, set[tuple[int, int]]()
        for record in contents:
            reply = _carry_out_again(core, record, newest + replayed)
            replayed += 1
            if _checksum(record.method, reply) != record.reply_crc:
                header = peek_header(record.payload)
                changed.add((header.worker_id, header.member))
        log = Log.open(disk, run, newest + replayed)
        recovery = Recovery(newest, replayed, contents.torn, len(changed))
        durable = cls(disk, core, log, recovery)
        if changed:
            durable._drop(changed)
        return durable

    def _check_same_model(self, init: Mapping[str, FloatArray]) -> None:
        """Make sure that a model which the state goes before is the same one, further trained."""
        space = self.core.space
        if space is None:
            return
        try:
            space.flatten(init)
        except ModelMismatchError as e:
            raise StateError(
                f"{self._disk.label} holds the state of another model than the one to start from: "
                f"{e}. Name another folder with --state-dir, or leave out --init"
            ) from e

    def _drop(self, sessions: set[tuple[int, int]]) -> None:
        """End sessions whose workers have something else than their records say."""
        for number, member in sessions:
            self.core.state.registry.forget(number, member)
        logger.warning(
            "%d session(s) end: this release, or this machine, makes other replies from the log "
            "than were given. The model is complete; the workers join again by themselves",
            len(sessions),
        )
        self.finish_snapshot(self.begin_snapshot())

    @property
    def position(self) -> int:
        """Number of requests that changed the state, since it was begun."""
        return self._log.position

    @property
    def durable(self) -> int:
        """How many of them are on disk."""
        return self._log.durable

    @property
    def log_bytes(self) -> int:
        """Length of the log that a restart may have to read."""
        return self._log.size_bytes

    @property
    def trouble(self) -> str:
        """Why nothing can be acknowledged until the process is started again; empty if it can."""
        return self._defect or self._log.failed

    def handle(self, method: str, request: bytes) -> bytes:
        """Carry out one request in memory, and note it if it changed the state.

        Nobody may be told of the reply before `durable` has reached `position`.

        Raises:
            DgsError: as the core does.
            StateError: an earlier request broke off half done; only starting again helps.
        """
        if self._defect:
            raise StateError(self._defect)
        before = self.core.state.changes
        try:
            reply = self.core.handle(method, request)
        except BaseException as e:
            if self.core.state.is_torn or not isinstance(e, DgsError):
                self._defect = _DEFECT
            raise
        if self.core.state.changes != before:
            self._log.append(_record(method, request, reply))
        return reply

    def max_request_bytes(self, method: str) -> int:
        """Return the core's limit."""
        return self.core.max_request_bytes(method)

    def commit(self) -> int:
        """Make everything noted so far durable.

        Returns:
            The position that is durable now.

        Raises:
            StateError: the disk does not take it. Nothing may be acknowledged; where it is full,
                another call may succeed.
        """
        return self._log.commit()

    def close(self) -> None:
        """Close the log; what is not committed is lost."""
        self._log.close()

    def begin_snapshot(self) -> Snapshot:
        """Commit, begin a new piece of the log, and return the state as it is now.

        Takes two syncs, and no time for the state's size. No request and no commit meanwhile.

        Raises:
            StateError: the disk does not take it, or the state in memory is not to be trusted.
        """
        if self._defect:
            raise StateError(self._defect)
        self._log.rotate()
        return _snapshot_of(self.core, self._log.position)

    def finish_snapshot(self, snapshot: Snapshot) -> int:
        """Write a snapshot, remove all but the newest two, and the log that only older ones need.

        Returns:
            Its bytes.

        Raises:
            OSError: the disk does not take it; the earlier snapshots and the log stand.
        """
        written = write_snapshot(self._disk, snapshot)
        self.snapshot_position = snapshot.position
        self._log.cut(prune(self._disk, KEPT_SNAPSHOTS))
        return written


def _snapshot_of(core: ParameterServer, position: int) -> Snapshot:
    facts, arrays = core.state.save()
    return Snapshot(position, json.loads(json.dumps(facts)), {**arrays})


def _carry_out_again(core: ParameterServer, record: Record, position: int) -> bytes:
    try:
        return core.handle(record.method, bytes(record.payload))
    except DgsError as e:
        raise StateError(
            f"request {position} of the log ({record.method}), which was carried out when it was "
            f"written, is refused now: {e}. If the library was changed since, start the release "
            "that wrote the log and end it with SIGTERM, which makes a snapshot; then change"
        ) from e


def _record(method: str, request: bytes, reply: bytes) -> Record:
    checksum = _checksum(method, reply)
    if method != "Exchange":
        return Record(method, 0, 0, 0, checksum, request)
    h = peek_header(request)
    return Record(method, h.worker_id, h.incarnation, h.seq, checksum, request)


def _checksum(method: str, reply: bytes) -> int:
    """Return what tells one difference from another; nothing else has to be the same again."""
    return frame_checksum(reply) if method == "Exchange" else 0
