"""Who takes part in a run: workers, their sessions, and which of them are still valid.

A worker is known by its name and by an incarnation that grows with every start; the newest one
fences all older ones. Each of its members has one session per shard. The session that a newer
incarnation replaces is kept until the newer one has made its first exchange: a process that comes
back with its own saved state can then go on exactly where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Self

from dgs._proto import parameter_server_pb2 as pb
from dgs.errors import (
    FencedError,
    ModelMismatchError,
    NotReadyError,
    TooLargeError,
    UnknownWorkerError,
)
from dgs.frame import max_frame_bytes
from dgs.joining import Joining
from dgs.metrics import Histogram
from dgs.space import FloatArray, ParameterSpace
from dgs.tracker import Record
from dgs.view import Part

__all__ = ["Registry", "Session", "Worker"]

ACTIVE_ROUNDS = 8
"""A worker counts as active until every worker could have exchanged this often since its last."""

FIRST_FRAME_BYTES = 64 << 20
"""Longest frame that is read before the model is known: enough to tell a worker of an earlier run
what became of its server."""

MOST_NAMES = 16
"""Incarnations that are remembered of a session; each can resume it until it exchanges."""

DEPARTED = 4096
"""Sessions that are remembered after they left, the latest; some hundred bytes each."""


@dataclass(slots=True)
class Session:
    """One member of one incarnation of a worker: its record, and its last reply."""

    worker: str
    member: int
    incarnation: int
    part: Part
    record: Record
    version: int
    """The model's version when this session was last answered."""
    seq: int = 0
    """Sequence number of the last exchange that was applied."""
    reply: bytes = b""
    """What that exchange was answered with; a repeated request gets it again."""
    resumed: bool = False
    """Whether an earlier incarnation began it."""
    unchanged: bool = False
    """Whether nothing was applied between the exchange that its worker saved and its opening."""
    claimed: bool = False
    """Whether its worker loaded a saved state into it: worth keeping before it has exchanged."""
    names: tuple[int, ...] = ()
    """Incarnations that had this very session since its last exchange: each may resume it."""
    points: dict[int, int] = field(default_factory=dict)
    """Incarnations, and their sequence numbers, since which nothing of the worker was applied."""
    exchanges: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    staleness: Histogram = field(default_factory=Histogram)

    @classmethod
    def opened(
        cls, joining: Joining, model: FloatArray, version: int, points: Mapping[int, int]
    ) -> Self:
        """Open a session whose record equals the model.

        Args:
            joining: who joins, and how replies are to be made.
            model: the shard's.
            version: the model's.
            points: what nothing was applied since, the saved state to resume among it; or empty.
        """
        record = Record(
            joining.part,
            model,
            density=joining.download_density,
            selection=joining.selection,
            dense_below=joining.dense_below,
            values=joining.values,
        )
        return cls(
            joining.worker,
            joining.member,
            joining.incarnation,
            joining.part,
            record,
            version,
            unchanged=bool(points),
            claimed=joining.resume > 0,
            names=(joining.incarnation,),
            points={**points, joining.incarnation: 0},
        )

    def is_at(self, joining: Joining) -> bool:
        """Tell whether this is the session to resume, at the exchange where its worker saved it."""
        return joining.resume in self.names and self.seq in joining.resume_seqs

    def resume(self, joining: Joining) -> None:
        """Go on under a newer incarnation, with the settings that it joins with."""
        self.incarnation = joining.incarnation
        self.names = (*self.names, self.incarnation)[-MOST_NAMES:]
        self.points = _merged(self.points, {self.incarnation: self.seq})
        self.resumed = self.unchanged = True
        self.record.configure(
            density=joining.download_density,
            selection=joining.selection,
            dense_below=joining.dense_below,
            values=joining.values,
        )

    def record_exchange(self, seq: int, staleness: int, bytes_up: int, reply: bytes) -> None:
        """Note an applied exchange and keep its reply."""
        self.seq, self.reply = seq, reply
        self.names, self.points = (self.incarnation,), {self.incarnation: seq}
        self.exchanges += 1
        self.bytes_up += bytes_up
        self.bytes_down += len(reply)
        self.staleness.add(staleness)

    def status(self, version: int) -> pb.WorkerStatus:
        """Describe the session, at a version of the model."""
        return pb.WorkerStatus(
            worker=self.worker,
            member=self.member,
            incarnation=self.incarnation,
            exchanges=self.exchanges,
            staleness_p50=self.staleness.percentile(50),
            staleness_p99=self.staleness.percentile(99),
            bytes_up=self.bytes_up,
            bytes_down=self.bytes_down,
            behind=version - self.version,
        )


@dataclass(frozen=True, slots=True)
class _Departed:
    """What is remembered of a session that left: its incarnation, and see `Session.points`."""

    incarnation: int
    points: dict[int, int]


def _merged(older: Mapping[int, int], newer: Mapping[int, int]) -> dict[int, int]:
    """Join two sets of points; the oldest give way."""
    both = {**older, **newer}
    return {i: both[i] for i in list(both)[-MOST_NAMES:]}


@dataclass(slots=True)
class Worker:
    """A worker: the short number that frames know it by, and its newest incarnation."""

    name: str
    number: int
    incarnation: int
    live: dict[int, Session] = field(default_factory=dict)
    """Sessions of the newest incarnation, by member."""
    retired: dict[int, Session] = field(default_factory=dict)
    """Sessions of earlier incarnations that may still be resumed, by member."""


class Registry:
    """The workers of a run, and the model and shard that they agreed on.

    Args:
        max_workers: sessions admitted at a time.
    """

    def __init__(self, max_workers: int) -> None:
        """Start with nobody and without a model."""
        self._max_workers = max_workers
        self._workers: dict[str, Worker] = {}
        self._by_number: dict[int, Worker] = {}
        self._numbered = 0
        self._departed: dict[tuple[str, int], _Departed] = {}
        self._asked = ""  # the worker that was asked for the model, until it gives it
        self._asked_to_restore = False
        self.space: ParameterSpace | None = None
        self.shard = 0
        self.num_shards = 1
        self.shard_range = (0, 0)
        self.max_frame_bytes = FIRST_FRAME_BYTES
        self.initialiser = ""

    def num_active(self, version: int) -> int:
        """Count the workers that still exchange, as far as updates tell; at least 1.

        Args:
            version: the model's version.
        """
        last = [max(s.version for s in w.live.values()) for w in self._workers.values() if w.live]
        window = ACTIVE_ROUNDS * len(last)
        return max(1, sum(1 for v in last if version - v <= window))

    def sessions(self) -> Iterator[Session]:
        """Iterate over the live sessions."""
        return (s for w in self._workers.values() for s in w.live.values())

    def require_space(self) -> ParameterSpace:
        """Return the model's index space.

        Raises:
            NotReadyError: nobody has joined yet.
        """
        if self.space is None:
            raise NotReadyError("the server has no model yet: no worker has joined")
        return self.space

    def check_model(self, joining: Joining) -> None:
        """Hold a join request to the run's model and shard.

        Raises:
            ModelMismatchError: names the first differing tensor, or the shards.
        """
        difference = self.require_space().first_difference(joining.view.space)
        if difference is not None:
            raise ModelMismatchError(
                f"the model of worker {joining.worker!r} (there) is not the server's (here): "
                + difference
            )
        mine = (self.shard, self.num_shards)
        if (joining.shard, joining.num_shards) != mine:
            raise ModelMismatchError(
                f"this server is shard {mine[0]} of {mine[1]}, and was joined as shard "
                f"{joining.shard} of {joining.num_shards}; every worker must list the same "
                "servers in the same order"
            )

    def check_incarnation(self, joining: Joining) -> None:
        """Hold a join request to newer incarnations of its worker, and to its own leaving.

        Raises:
            FencedError: a newer one has joined, or this one has left.
        """
        worker = self._workers.get(joining.worker)
        if worker is not None and joining.incarnation < worker.incarnation:
            raise FencedError(
                f"a newer process has joined as worker {joining.worker!r} (incarnation "
                f"{worker.incarnation}, this one is {joining.incarnation}); give each worker its "
                "own name, or check the clock of this machine"
            )
        departed = self._departed.get((joining.worker, joining.member))
        left = departed.incarnation if departed else 0
        if joining.incarnation <= left:
            raise FencedError(
                f"worker {joining.worker!r} has left since this request was made (incarnation "
                f"{left}, this one is {joining.incarnation}); check the clock of this machine"
            )

    def adopt(self, joining: Joining) -> None:
        """Take the model's tensors, the shard and the initialiser from the first to join."""
        self.space = joining.view.space
        self.shard, self.num_shards = joining.shard, joining.num_shards
        self.shard_range = start, stop = joining.part.start, joining.part.stop
        size = max(0, min(stop, self.space.num_parameters) - start)
        segments = self.space.count_segments(start, stop)
        self.max_frame_bytes = max_frame_bytes(size, segments, stop - start - size)
        self.initialiser = joining.worker

    def appoint(self, joining: Joining, *, has_model: bool) -> Worker:
        """Ask a worker for the model that the server does not have, or is to be restored to.

        Raises:
            NotReadyError: another worker was asked already, or this one did not offer.
        """
        asked = self._asked
        if not joining.may_initialise:
            raise NotReadyError(
                f"the server has no model yet; worker {asked!r} was asked to give it"
                if asked
                else "the server has no model yet; the worker that gave shard 0 must give this one"
            )
        if asked and asked != joining.worker and not joining.take_over:
            raise NotReadyError(f"worker {asked!r} was asked to give the model; it has not yet")
        worker = self._enrol(joining)
        self._asked, self._asked_to_restore = joining.worker, joining.restore
        if not has_model:
            self.adopt(joining)
        return worker

    def is_asked(self, worker: Worker) -> bool:
        """Tell whether a worker was asked for the model and has not given it yet."""
        return self._asked == worker.name

    def take_given(self, worker: Worker) -> bool:
        """Note who gave the model; sessions with an earlier model end, to be opened anew.

        Returns:
            Whether it was asked to restore one that was trained before.
        """
        self.initialiser, self._asked = worker.name, ""
        for w in self._workers.values():
            w.live, w.retired = {}, {}
        return self._asked_to_restore

    def open(self, joining: Joining, model: FloatArray, version: int) -> tuple[bool, bool]:
        """Open a session whose record equals the model, or continue an earlier one.

        Returns:
            Whether the session to resume was continued; and if not, whether nothing was applied
            since the exchange at which it was to be resumed.

        Raises:
            TooLargeError: as many sessions as admitted are open.
        """
        known = self._workers.get(joining.worker)
        current = known.live.get(joining.member) if known else None
        if known and current and current.incarnation == joining.incarnation:
            return current.resumed, current.unchanged  # repeated
        if current is None and sum(1 for _ in self.sessions()) >= self._max_workers:
            raise TooLargeError(
                f"{self._max_workers} sessions are open, as many as this server admits "
                "(ServerConfig.max_workers)"
            )
        joining.part.prepare()  # takes memory, so before anything changes
        worker = self._enrol(joining)
        earlier = worker.retired.get(joining.member)
        saved = earlier if earlier is not None and earlier.is_at(joining) else None
        if saved is not None and saved.part == joining.part:
            del worker.retired[joining.member]
            saved.resume(joining)
            worker.live[joining.member] = saved
            return True, True
        points = self._points(joining, earlier)
        worker.live[joining.member] = Session.opened(joining, model, version, points)
        return False, bool(points)

    def _points(self, joining: Joining, earlier: Session | None) -> dict[int, int]:
        """Return what nothing was applied since, if the saved state to resume is among it."""
        departed = self._departed.get((joining.worker, joining.member))
        known = _merged(departed.points if departed else {}, earlier.points if earlier else {})
        return known if known.get(joining.resume, -1) in joining.resume_seqs else {}

    def _enrol(self, joining: Joining) -> Worker:
        """Find or number the worker; a newer incarnation retires its sessions."""
        worker = self._workers.get(joining.worker)
        if worker is None:
            if len(self._workers) >= 2 * self._max_workers:
                raise TooLargeError(
                    f"{len(self._workers)} workers have a name here, twice as many as sessions are "
                    "admitted (ServerConfig.max_workers)"
                )
            worker = Worker(joining.worker, self._numbered, joining.incarnation)
            self._numbered += 1
            self._workers[worker.name] = self._by_number[worker.number] = worker
        elif joining.incarnation > worker.incarnation:
            worker.incarnation = joining.incarnation
            kept = {
                member: session
                for member, session in worker.live.items()
                if session.seq > 0 or session.claimed or member not in worker.retired
            }
            worker.retired = {**worker.retired, **kept}
            worker.live = {}
        return worker

    def worker(self, name: str) -> Worker:
        """Return a worker that has joined."""
        return self._workers[name]

    def worker_numbered(self, number: int) -> Worker:
        """Return the worker that frames know by `number`.

        Raises:
            UnknownWorkerError: there is none, or it left.
        """
        worker = self._by_number.get(number)
        if worker is None:
            raise UnknownWorkerError(f"no worker has the number {number}: it never joined, or left")
        return worker

    def session(self, number: int, member: int, incarnation: int) -> Session:
        """Return a live session.

        Raises:
            UnknownWorkerError: there is none.
            FencedError: a newer incarnation has replaced it.
        """
        worker = self.worker_numbered(number)
        if incarnation < worker.incarnation:
            raise FencedError(
                f"a newer process has joined as worker {worker.name!r}; this one can change "
                "nothing any more (give each worker its own name)"
            )
        session = worker.live.get(member)
        if session is None or session.incarnation != incarnation:
            raise UnknownWorkerError(f"worker {worker.name!r} has no such session; join again")
        return session

    def discard(self, session: Session) -> None:
        """Forget a session whose last request broke off half done; its worker must join again."""
        worker = self._workers[session.worker]
        self.settle(session)
        if worker.live.get(session.member) is session:
            del worker.live[session.member]

    def settle(self, session: Session) -> None:
        """Drop what came before this session: it has exchanged, so nothing else will be resumed."""
        self._workers[session.worker].retired.pop(session.member, None)
        self._departed.pop((session.worker, session.member), None)

    def close(self, number: int, member: int, incarnation: int) -> None:
        """Free a session's record; one that is gone already is no error.

        Raises:
            FencedError: a newer incarnation has replaced it.
        """
        worker = self._by_number.get(number)
        if worker is None:
            return
        if incarnation < worker.incarnation:
            raise FencedError(f"a newer process has joined as worker {worker.name!r}")
        session = worker.live.pop(member, None)
        earlier = worker.retired.pop(member, None)
        if session is not None:
            before = self._departed.pop((worker.name, member), None)  # the newest stands last
            points = _merged(before.points if before else {}, earlier.points if earlier else {})
            points = _merged(points, session.points)
            self._departed[worker.name, member] = _Departed(session.incarnation, points)
            if len(self._departed) > DEPARTED:
                del self._departed[next(iter(self._departed))]
        if not worker.live and not worker.retired:
            del self._workers[worker.name], self._by_number[worker.number]
