"""What must hold, noted as it happens and compared as soon as it can be."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Any, NamedTuple

from dgs.server import ParameterServer

__all__ = ["Applied", "Essence", "Ledger", "Update", "Violation", "essence_of", "frame_names"]

Essence = tuple[Any, ...]

_NAMES = struct.Struct("<8xI12xQQ")


class Violation(Exception):
    """A promise was broken."""


class Update(NamedTuple):
    """One shard's part of one update, as the worker that made it knows it."""

    number: int
    """Counts all of a run; the parts of one update have numbers of their own."""
    worker: str
    shard: int
    checksum: int
    """Of the payload."""


@dataclass(slots=True)
class Applied:
    """One request that has changed a shard's state."""

    method: str
    request: bytes
    essence: Essence
    """The state after it, as far as it is cheap to note."""
    update: Update | None = None
    """What an Exchange applied."""
    joined: tuple[str, int] | None = None
    """Worker and incarnation of a Join."""


class FrameNames(NamedTuple):
    """What a frame's header says of whom it is from: a fast way to read that."""

    worker_id: int
    incarnation: int
    seq: int


def frame_names(frame: bytes) -> FrameNames:
    """Return whom a frame is from.

    Example:
        >>> from dgs.frame import FrameKind, Header, encode_frame
        >>> header = Header(kind=FrameKind.UPDATE, values="float32", worker_id=5, size=0, nnz=0)
        >>> frame_names(encode_frame(header, b""))
        FrameNames(worker_id=5, incarnation=0, seq=0)
    """
    return FrameNames._make(_NAMES.unpack_from(frame))


def _payload_of(frame: bytes) -> int:
    """Return a checksum of what a frame carries: all but its incarnation and its checksum."""
    return zlib.crc32(frame[96:], zlib.crc32(frame[32:92], zlib.crc32(frame[:24])))


def essence_of(core: ParameterServer) -> Essence:
    """Return model, replicas, numbers and cached replies: what must come back after a crash."""
    shard = core.state.shard
    if shard is None:
        return (0, b"", ())
    sessions = tuple(
        (s.worker, s.incarnation, s.seq, s.version, zlib.crc32(s.reply), s.record.replica.tobytes())
        for s in core.state.registry.sessions()
    )
    return (shard.version, shard.model.tobytes(), sessions)


class Ledger:
    """All updates of a run: made, applied, acknowledged.

    Attributes:
        made: by worker, incarnation, shard and sequence number: what the frame of that name is.
        applied: by shard: numbers of the updates that its state contains, with their position.
        acknowledged: numbers of the updates whose reply has left a server.
    """

    def __init__(self, num_shards: int) -> None:
        self.made: dict[tuple[str, int, int, int], Update] = {}
        self.applied: list[dict[int, int]] = [{} for _ in range(num_shards)]
        self.acknowledged: list[set[int]] = [set() for _ in range(num_shards)]
        self._newest: list[dict[str, int]] = [{} for _ in range(num_shards)]
        self._opened: dict[tuple[int, str, int], bytes] = {}
        self._replies: dict[tuple[int, int], int] = {}
        self._replicas: dict[int, bytes] = {}
        self._numbered = 0

    def number(self) -> int:
        """Return the next number."""
        self._numbered += 1
        return self._numbered

    def note_made(self, worker: str, shard: int, frame: bytes, number: int) -> None:
        """Note that a worker may send this frame from now on."""
        names = frame_names(frame)
        update = Update(number, worker, shard, _payload_of(frame))
        known = self.made.setdefault((worker, names.incarnation, shard, names.seq), update)
        if known != update:
            raise Violation(
                f"worker {worker} made two updates {names.seq} for shard {shard} in one session"
            )

    def update_of(self, worker: str, shard: int, request: bytes) -> Update:
        """Return what the request of an exchange is, or complain that nobody made it."""
        _, incarnation, seq = frame_names(request)
        update = self.made.get((worker, incarnation, shard, seq))
        if update is None:
            raise Violation(f"shard {shard} carried out exchange {seq} that {worker} never made")
        if update.checksum != _payload_of(request):
            raise Violation(f"the payload of update {update.number} was changed on its way")
        return update

    def note_joined(self, shard: int, worker: str, incarnation: int) -> None:
        """Note that an incarnation has joined: it replaces all earlier ones."""
        newest = self._newest[shard]
        newest[worker] = max(incarnation, newest.get(worker, 0))

    def restart_joined(self, shard: int) -> None:
        """Forget who has joined, to be told anew what a crash has left."""
        self._newest[shard].clear()

    def note_opened(self, shard: int, essence: Essence) -> None:
        """Note the records of sessions that have not exchanged yet."""
        for worker, incarnation, seq, _, _, replica in essence[2]:
            if seq == 0:
                self._opened[shard, worker, incarnation] = replica

    def check_opened(self, shard: int, worker: str, incarnation: int, base: bytes) -> None:
        """Compare what a worker begins with with the record of its session."""
        if self._opened.get((shard, worker, incarnation)) != base:
            raise Violation(f"worker {worker} begins with another base than shard {shard} recorded")

    def note_applied(
        self, shard: int, position: int, update: Update, incarnation: int, replica: bytes
    ) -> None:
        """Note that a shard has applied an update, and what its worker's record is then.

        Raises:
            Violation: it had been applied before, or its worker has been replaced.
        """
        number, worker = update.number, update.worker
        before = self.applied[shard].get(number)
        if before is not None:
            raise Violation(
                f"shard {shard} applied update {number} of {worker} at {before} and at {position}"
            )
        newest = self._newest[shard].get(worker, 0)
        if incarnation < newest:
            raise Violation(
                f"shard {shard} applied update {number} of an incarnation of {worker} that another "
                "has replaced"
            )
        self.applied[shard][number] = position
        self._replicas[number] = replica

    def note_acknowledged(self, shard: int, update: Update, reply: bytes) -> None:
        """Note that the reply to an update leaves the server.

        Raises:
            Violation: it is not applied, or was answered differently before.
        """
        if update.number not in self.applied[shard]:
            raise Violation(
                f"shard {shard} acknowledged update {update.number} without applying it"
            )
        self.acknowledged[shard].add(update.number)
        checksum = zlib.crc32(reply)
        if self._replies.setdefault((shard, update.number), checksum) != checksum:
            raise Violation(f"shard {shard} answered update {update.number} in two ways")

    def forget_after(self, shard: int, position: int) -> None:
        """Take back what a crash has undone: everything after a position.

        Raises:
            Violation: something acknowledged was among it.
        """
        applied = self.applied[shard]
        lost = [number for number, at in applied.items() if at > position]
        for number in lost:
            if number in self.acknowledged[shard]:
                raise Violation(f"shard {shard} lost update {number}, which it had acknowledged")
            del applied[number], self._replicas[number]

    def check_base(self, number: int, base: bytes) -> None:
        """Compare what a worker has after a reply with what the server recorded of it then."""
        if self._replicas.get(number) != base:
            raise Violation(f"base and replica differ after update {number}")
