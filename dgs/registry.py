"""Who takes part in a run: workers, their sessions, and which of them are still valid.

A worker is known by its name and by an incarnation that grows with every start; the newest one
fences all older ones. Each of its members has one session per shard. The session that a newer
incarnation replaces is kept until the newer one has made its first exchange: a process that comes
back with its own saved state can then go on exactly where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Self, cast, get_args

from dgs._proto import parameter_server_pb2 as pb
from dgs.config import Selection, Values
from dgs.errors import (
    FencedError,
    MalformedError,
    ModelMismatchError,
    NotReadyError,
    TooLargeError,
    UnknownWorkerError,
)
from dgs.frame import WIRE_VERSION
from dgs.messages import space_from_message, views_from_message
from dgs.metrics import Histogram
from dgs.space import FloatArray, ParameterSpace
from dgs.tracker import Record
from dgs.view import Part, View, check_cover

__all__ = ["Joining", "Registry", "Session", "Worker"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Joining:
    """A checked request to join."""

    worker: str
    incarnation: int
    member: int
    shard: int
    num_shards: int
    view: View
    download_density: float
    values: Values
    selection: Selection
    dense_below: int
    may_initialise: bool
    take_over: bool
    resume: int
    """Incarnation of the session to continue, 0 for none ..."""
    resume_seqs: range
    """... and the sequence numbers of its last exchange with which it can be."""

    @classmethod
    def from_message(cls, message: pb.JoinRequest) -> Self:
        """Check everything that does not depend on the server's state.

        Raises:
            ModelMismatchError: the protocol differs.
            ViewError: the model or the views are impossible, leave gaps or overlap.
            MalformedError: another field is out of range; names it.
        """
        m = message
        if m.protocol != WIRE_VERSION:
            raise ModelMismatchError(
                f"the worker speaks wire version {m.protocol}, this server {WIRE_VERSION}; "
                "install the same release on both sides"
            )
        _require(0 < len(m.worker) <= 128, "worker", "a name of 1 to 128 characters")
        _require(m.incarnation > 0, "incarnation", "a number above 0")
        _require(0 < m.num_shards <= 1024 and m.shard < m.num_shards, "shard", "a shard below 1024")
        _require(0.0 < m.download_density <= 1.0, "download_density", "a fraction in (0, 1]")
        _require(m.values in get_args(Values), "values", "one of the known value codes")
        _require(m.selection in get_args(Selection), "selection", "'exact' or 'tracked'")
        space = space_from_message(m.tensors)
        views = views_from_message(space, m.views)
        _require(m.member < min(len(views), 1 << 16), "member", "a member that has a view")
        check_cover(space, views)
        return cls(
            worker=m.worker,
            incarnation=m.incarnation,
            member=m.member,
            shard=m.shard,
            num_shards=m.num_shards,
            view=views[m.member],
            download_density=m.download_density,
            values=cast(Values, m.values),
            selection=cast(Selection, m.selection),
            dense_below=m.dense_below,
            may_initialise=m.may_initialise,
            take_over=m.take_over,
            resume=m.resume_incarnation,
            resume_seqs=range(m.resume_seq, m.resume_seq + 1 + m.resume_in_flight),
        )


def _require(condition: bool, name: str, wanted: str) -> None:
    if not condition:
        raise MalformedError(f"the Join request's field {name} is not valid: it must be {wanted}")


@dataclass(slots=True)
class Session:
    """One member of one incarnation of a worker: its record, and its last reply."""

    worker: str
    member: int
    incarnation: int
    part: Part
    record: Record
    values: Values
    version: int
    """The model's version when this session was last answered."""
    seq: int = 0
    """Sequence number of the last exchange that was applied."""
    reply: bytes = b""
    """What that exchange was answered with; a repeated request gets it again."""
    resumed: bool = False
    """Whether an earlier incarnation began it."""
    resumed_from: int = 0
    """That incarnation, until the next exchange: its saved state may be resumed again."""
    exchanges: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    staleness: Histogram = field(default_factory=Histogram)

    def record_exchange(self, seq: int, staleness: int, bytes_up: int, reply: bytes) -> None:
        """Note an applied exchange and keep its reply."""
        self.seq, self.reply, self.resumed_from = seq, reply, 0
        self.exchanges += 1
        self.bytes_up += bytes_up
        self.bytes_down += len(reply)
        self.staleness.add(staleness)

    def status(self) -> pb.WorkerStatus:
        """Describe the session."""
        return pb.WorkerStatus(
            worker=self.worker,
            member=self.member,
            incarnation=self.incarnation,
            exchanges=self.exchanges,
            staleness_p50=self.staleness.percentile(50),
            staleness_p99=self.staleness.percentile(99),
            bytes_up=self.bytes_up,
            bytes_down=self.bytes_down,
        )


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
        self.space: ParameterSpace | None = None
        self.shard = 0
        self.num_shards = 1
        self.shard_range = (0, 0)
        self.initialiser = ""

    @property
    def num_workers(self) -> int:
        """Count the workers with a live session."""
        return sum(1 for w in self._workers.values() if w.live)

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
        """Hold a join request to newer incarnations of its worker.

        Raises:
            FencedError: one has joined.
        """
        worker = self._workers.get(joining.worker)
        if worker is not None and joining.incarnation < worker.incarnation:
            raise FencedError(
                f"a newer process has joined as worker {joining.worker!r} (incarnation "
                f"{worker.incarnation}, this one is {joining.incarnation}); give each worker its "
                "own name, or check the clock of this machine"
            )

    def adopt(self, joining: Joining) -> None:
        """Take the model's tensors, the shard and the initialiser from the first to join."""
        self.space = joining.view.space
        self.shard, self.num_shards = joining.shard, joining.num_shards
        self.shard_range = self.space.shard_ranges(joining.num_shards)[joining.shard]
        self.initialiser = joining.worker

    def appoint(self, joining: Joining) -> Worker:
        """Ask a worker to give the model that the server does not have.

        Raises:
            NotReadyError: another worker was asked already, or this one did not offer.
        """
        asked = self.initialiser
        if not joining.may_initialise:
            raise NotReadyError(
                f"the server has no model yet; worker {asked!r} was asked to give it"
                if asked
                else "the server has no model yet; the worker that gave shard 0 must give this one"
            )
        if asked and asked != joining.worker and not joining.take_over:
            raise NotReadyError(f"worker {asked!r} was asked to give the model; it has not yet")
        worker = self._enrol(joining)
        self.adopt(joining)
        return worker

    def open(self, joining: Joining, model: FloatArray, version: int) -> bool:
        """Open a session whose record equals the model, or continue an earlier one.

        Returns:
            Whether an earlier session was continued.

        Raises:
            TooLargeError: as many sessions as admitted are open.
        """
        known = self._workers.get(joining.worker)
        current = known.live.get(joining.member) if known else None
        if known and current and current.incarnation == joining.incarnation:
            return current.resumed  # repeated
        if current is None and sum(1 for _ in self.sessions()) >= self._max_workers:
            raise TooLargeError(
                f"{self._max_workers} sessions are open, as many as this server admits "
                "(ServerConfig.max_workers)"
            )
        worker = self._enrol(joining)
        resumable = self._resumable(worker, joining)
        if resumable is not None:
            del worker.retired[joining.member]
            resumable.incarnation, resumable.resumed = joining.incarnation, True
            resumable.resumed_from = joining.resume
            worker.live[joining.member] = resumable
            return True
        part = Part(joining.view, *self.shard_range)
        record = Record(
            part,
            model,
            density=joining.download_density,
            selection=joining.selection,
            dense_below=joining.dense_below,
            values=joining.values,
        )
        worker.live[joining.member] = Session(
            joining.worker,
            joining.member,
            joining.incarnation,
            part,
            record,
            joining.values,
            version,
        )
        return False

    def _enrol(self, joining: Joining) -> Worker:
        """Find or number the worker; a newer incarnation retires its sessions."""
        worker = self._workers.get(joining.worker)
        if worker is None:
            worker = Worker(joining.worker, self._numbered, joining.incarnation)
            self._numbered += 1
            self._workers[worker.name] = self._by_number[worker.number] = worker
        elif joining.incarnation > worker.incarnation:
            worker.incarnation = joining.incarnation
            kept = {
                member: session
                for member, session in worker.live.items()
                if session.seq > 0 or member not in worker.retired
            }
            worker.retired = {**worker.retired, **kept}
            worker.live = {}
        return worker

    def _resumable(self, worker: Worker, joining: Joining) -> Session | None:
        session = worker.retired.get(joining.member)
        if session is None or joining.resume == 0:
            return None
        if joining.resume not in (session.incarnation, session.resumed_from):
            return None
        same_view = session.part.view == joining.view
        return session if same_view and session.seq in joining.resume_seqs else None

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
        if worker.live.get(session.member) is session:
            del worker.live[session.member]

    def settle(self, session: Session) -> None:
        """Drop what this session replaced: it has exchanged, so nothing else will be resumed."""
        self._workers[session.worker].retired.pop(session.member, None)

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
        worker.live.pop(member, None)
        worker.retired.pop(member, None)
        if not worker.live and not worker.retired:
            del self._workers[worker.name], self._by_number[worker.number]
