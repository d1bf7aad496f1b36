"""What a served shard does besides answering: leases, snapshots, and saying how it stands.

The core has no clock and no thread, so what depends on time is done from here, through the same
guard as everything else: an evicted session is closed by a request like any other.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from dgs._proto import parameter_server_pb2 as pb
from dgs.config import StorageConfig
from dgs.durable import Durable
from dgs.errors import DgsError, StateError
from dgs.leases import Leases
from dgs.messages import parse
from dgs.security import ServerSecurity
from dgs.server import ParameterServer
from dgs.transport.guard import GuardedHandler, Handler

__all__ = [
    "Chore",
    "Door",
    "DoorChore",
    "Housekeeper",
    "LeaseChore",
    "Reporting",
    "SnapshotChore",
    "TroubleChore",
    "final_snapshot",
]

logger = logging.getLogger("dgs.server")

_RETRY_S = 10.0
"""Seconds until a snapshot that failed is tried again."""

_LOOK_S = 60.0
"""Seconds between two looks at the certificate."""

Clock = Callable[[], float]


class Chore(Protocol):
    """Something to be done from time to time."""

    def do(self) -> None:
        """Do what is due; often called, mostly in vain. Raises nothing."""
        ...

    def report(self, status: pb.StatusReply) -> None:
        """Add how it stands to a reply; called in a request's turn."""
        ...


class LeaseChore:
    """Close sessions that have been silent for the lease; their workers join again if they live.

    Args:
        guard: of the core.
        core: the server.
        clock: tells seconds; never goes back.
    """

    def __init__(
        self, guard: GuardedHandler, core: ParameterServer, clock: Clock = time.monotonic
    ) -> None:
        """Count every session's silence from now on."""
        self._guard = guard
        self._core = core
        self._clock = clock
        self._leases = Leases(core.state.config.lease_s)
        self._evicted = 0

    def do(self) -> None:
        """Close what has been silent for too long."""
        try:
            with self._guard.turn():
                places = list(self._core.state.registry.places())
            for number, member, incarnation in self._leases.observe(self._clock(), places):
                request = pb.LeaveRequest(
                    run=self._core.state.run,
                    worker_id=number,
                    member=member,
                    incarnation=incarnation,
                )
                self._guard.handle("Leave", request.SerializeToString())
                self._evicted += 1
                logger.info("worker %d (member %d) was silent too long: closed", number, member)
        except DgsError as e:  # stopping, or the disk is full: the silent stay a little longer
            logger.info("leases: %s", e)

    def report(self, status: pb.StatusReply) -> None:
        """Add what bounds the server's memory, and how much sessions take of it."""
        config, sessions = self._core.state.config, list(self._core.state.registry.all_sessions())
        status.evicted = self._evicted
        status.limits.max_workers = config.max_workers
        status.limits.record_bytes = sum(s.record.nbytes for s in sessions)
        status.limits.reply_bytes = sum(len(s.reply) for s in sessions)
        status.limits.max_reply_bytes = config.max_reply_bytes
        status.limits.lease_s = config.lease_s


class SnapshotChore:
    """Make a snapshot when the time, or the log's length, says so and anything has changed.

    Args:
        guard: of the server.
        durable: the server.
        config: how often.
        clock: tells seconds; never goes back.
    """

    def __init__(
        self,
        guard: GuardedHandler,
        durable: Durable,
        config: StorageConfig,
        clock: Clock = time.monotonic,
    ) -> None:
        """Count the first interval from now."""
        self._guard = guard
        self._durable = durable
        self._config = config
        self._clock = clock
        self._finished = clock()
        self._tried = clock() - _RETRY_S

    def do(self) -> None:
        """Make a snapshot if one is due."""
        now, durable, config = self._clock(), self._durable, self._config
        records = durable.position - durable.snapshot_position
        is_due = (
            now - self._finished >= config.snapshot_interval_s
            or durable.log_bytes >= config.snapshot_log_bytes
            or records >= config.snapshot_log_records
        )
        if not is_due or not records or durable.trouble:
            return
        if now - self._tried < min(_RETRY_S, self._config.snapshot_interval_s):
            return
        self._tried = now
        try:
            with self._guard.turn():
                snapshot = durable.begin_snapshot()
            written = durable.finish_snapshot(snapshot)
        except (DgsError, OSError) as e:
            logger.warning("no snapshot was made, the log goes on: %s", e)
            return
        self._finished = self._clock()
        took = self._finished - now
        logger.info("snapshot %d: %d bytes in %.2f s", snapshot.position, written, took)

    def report(self, status: pb.StatusReply) -> None:
        """Add how much is on disk."""
        durable, storage = self._durable, status.storage
        storage.position, storage.durable = durable.position, durable.durable
        storage.snapshot_position = durable.snapshot_position
        storage.snapshot_age_s = self._clock() - self._finished
        storage.log_bytes = durable.log_bytes
        storage.trouble = durable.trouble


class TroubleChore:
    """Notice that a state cannot be kept any more, and say so once.

    Args:
        durable: the server.
        tell: is told why.
    """

    def __init__(self, durable: Durable, tell: Callable[[str], object]) -> None:
        """Nothing is wrong yet."""
        self._durable = durable
        self._tell = tell
        self._told = False

    def do(self) -> None:
        """Look."""
        trouble = self._durable.trouble
        if trouble and not self._told:
            self._told = True
            logger.error("%s", trouble)
            self._tell(trouble)

    def report(self, status: pb.StatusReply) -> None:
        """Add nothing: `SnapshotChore` does."""


class Door(Protocol):
    """What lets callers in, as far as it has to be looked after."""

    @property
    def security(self) -> ServerSecurity:
        """Return whom it lets in."""
        ...

    @property
    def certificate_ends_s(self) -> float:
        """Return the Unix time after which its certificate is not valid; 0 without one."""
        ...

    @property
    def turned_away(self) -> int:
        """Return how many calls were refused for who made them."""
        ...

    def look(self) -> None:
        """Warn if the certificate ends soon."""
        ...


class DoorChore:
    """Warn before the server's certificate ends.

    Args:
        door: lets callers in.
        clock: tells seconds; never goes back.
    """

    def __init__(self, door: Door, clock: Clock = time.monotonic) -> None:
        """Look at once."""
        self._door = door
        self._clock = clock
        self._next_s = clock()

    def do(self) -> None:
        """Look, once a minute."""
        now = self._clock()
        if now >= self._next_s:
            self._next_s = now + _LOOK_S
            self._door.look()

    def report(self, status: pb.StatusReply) -> None:
        """Add who is let in, and until when."""
        door, told = self._door, status.security
        told.tls = door.security.tls
        told.client_certificates = bool(door.security.tls_ca)
        told.tokens = bool(door.security.token_file)
        told.certificate_ends_s = door.certificate_ends_s
        told.turned_away = door.turned_away


class Reporting:
    """A handler whose Status says more: what others add to it.

    Args:
        handler: answers everything.
        reports: each adds its part.
    """

    def __init__(
        self, handler: Handler, reports: Sequence[Callable[[pb.StatusReply], None]]
    ) -> None:
        """Wrap a handler."""
        self._handler = handler
        self._reports = reports

    def handle(self, method: str, request: bytes) -> bytes:
        """Answer one request."""
        reply = self._handler.handle(method, request)
        if method != "Status":
            return reply
        status = parse(pb.StatusReply, reply)
        for report in self._reports:
            report(status)
        return status.SerializeToString()

    def max_request_bytes(self, method: str) -> int:
        """Return the handler's limit."""
        return self._handler.max_request_bytes(method)


class Housekeeper:
    """Do chores in a thread of its own, until closed.

    Args:
        chores: done in turn.
        interval_s: seconds between two rounds.
    """

    def __init__(self, chores: Sequence[Chore], interval_s: float) -> None:
        """Start the thread."""
        self._chores = chores
        self._interval_s = interval_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dgs-housekeeper", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End after the chore in progress."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._interval_s):
            for chore in self._chores:
                try:
                    chore.do()
                except Exception:  # a defect in one must not end the others
                    logger.exception("housekeeping failed")


def final_snapshot(durable: Durable) -> None:
    """Make a snapshot of a server that answers nothing any more, so that it starts at once."""
    if durable.trouble or durable.position == durable.snapshot_position:
        return
    try:
        durable.finish_snapshot(durable.begin_snapshot())
    except (StateError, OSError) as e:
        logger.warning("no snapshot was made at the end, the log has everything: %s", e)
