"""The parameter server of one shard, as a deterministic state machine.

`ParameterServer.handle` takes a request's bytes and returns a reply's bytes. There are no threads,
no clock, no files and no sockets in here: the state after a list of requests is a function of the
list. What carries the bytes stands in `dgs.transport`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from threading import Lock
from typing import Self

import numpy as np

from dgs._proto import parameter_server_pb2 as pb
from dgs.config import ServerConfig
from dgs.errors import (
    DgsError,
    FencedError,
    MalformedError,
    NonFiniteError,
    NotReadyError,
    SequenceError,
    WrongRunError,
)
from dgs.frame import Frame, FrameKind, Header, decode_frame, encode_frame
from dgs.joining import Joining
from dgs.kernels import kernels
from dgs.messages import parse, space_to_message
from dgs.quantize import first_non_finite
from dgs.session import Session
from dgs.shard import Shard
from dgs.space import FloatArray, Int64Array, ParameterSpace
from dgs.state import ServerState
from dgs.tracker import digest
from dgs.view import Part

__all__ = ["ParameterServer"]

CONTROL_BYTES = 64 << 20
"""Largest control message; a Join carries the names and shapes of the whole model."""


class ParameterServer:
    """Hold one shard of the model, apply updates, and answer each with a difference.

    For each exchange: ``model -= update; difference = select(model - replica[k]); replica[k] +=
    difference; version += 1``.

    Args:
        config: limits and intervals.
        init: the model to start from, by tensor name, unsharded; without it the first worker to
            join gives the model.
        run: number that identifies this server's state, stamped on every frame; random if None.

    Note:
        Requests are carried out one at a time, whichever threads they come from. One that raises
        has changed nothing but the count of refusals.

    Example:
        >>> server = ParameterServer()
        >>> server.ready
        False

    References:
        Yan et al., ICPP 2020, Algorithm 2 (with the sign of line 14 as in eq. 4).
    """

    def __init__(
        self,
        config: ServerConfig | None = None,
        *,
        init: Mapping[str, FloatArray] | None = None,
        run: int | None = None,
    ) -> None:
        """Start without a model, or remember `init` until the first worker names its order."""
        self.state = ServerState.begun(config or ServerConfig(), init=init, run=run)
        """Read it, and change it through `handle` only."""
        self._turn = Lock()
        self._handlers: dict[str, Callable[[bytes], bytes]] = {
            "Join": self._join,
            "PutModel": self._put_model,
            "Exchange": self._exchange,
            "PullModel": self._pull_model,
            "Leave": self._leave,
            "Status": self._status,
        }

    @classmethod
    def of(cls, state: ServerState) -> Self:
        """Go on from a state, such as a restored one."""
        server = cls()
        server.state = state
        return server

    @property
    def ready(self) -> bool:
        """Whether the server has a model."""
        return self.state.shard is not None

    @property
    def version(self) -> int:
        """Number of updates applied."""
        return self.state.version

    @property
    def space(self) -> ParameterSpace | None:
        """The model's index space, once the first worker has named it."""
        return self.state.agreed.space

    def handle(self, method: str, request: bytes) -> bytes:
        """Carry out one request and return the reply.

        Args:
            method: name of the RPC.
            request: a control message, or a frame for PutModel and Exchange.

        Raises:
            DgsError: the request was refused; the state is unchanged, the refusal counted.

        Note:
            A repeated Exchange returns the same bytes and changes nothing.
        """
        with self._turn:
            handler = self._handlers.get(method)
            try:
                if handler is None:
                    raise MalformedError(f"the service has no method {method!r}")
                return handler(request)
            except DgsError:
                self.state.totals.refused += 1
                raise

    def max_request_bytes(self, method: str) -> int:
        """Return how long a request may be; a transport refuses longer ones while they arrive."""
        if method not in ("PutModel", "Exchange"):
            return CONTROL_BYTES
        return self.state.agreed.max_frame_bytes

    def _join(self, request: bytes) -> bytes:
        joining = Joining.from_message(parse(pb.JoinRequest, request), self.state.config)
        self.state.registry.check_incarnation(joining)
        if self.state.shard is not None:
            self.state.agreed.check(joining)
        elif self.state.init is not None:
            flat = joining.view.space.flatten(self.state.init)
            self.state.agreed.adopt(joining)
            start, stop = self.state.agreed.shard_range
            self.state.shard, self.state.init = Shard(flat[start:stop]), None
        reply = pb.JoinReply(run=self.state.run, version=self.version)
        if self.state.shard is None or (joining.restore and self.state.untrained):
            worker = self.state.registry.appoint(joining, has_model=self.ready)
            reply.outcome = pb.JoinReply.GIVE_MODEL
            self.state.changes += 1
        else:
            worker, session, is_new = self.state.registry.open(joining, self.state.shard)
            reply.outcome = pb.JoinReply.RESUMED if session.resumed else pb.JoinReply.JOINED
            reply.unchanged, reply.cursor = session.unchanged, session.cursor
            reply.earlier_exchanges = session.earlier
            self.state.changes += is_new
        reply.worker_id = worker.number
        reply.initialiser = self.state.agreed.initialiser
        return reply.SerializeToString()

    def _put_model(self, request: bytes) -> bytes:
        frame = decode_frame(request, max_size=self.max_request_bytes("PutModel"))
        header = frame.header
        self._check_run(header.run)
        worker = self.state.registry.worker_numbered(header.worker_id)
        if self.ready and not (self.state.untrained and self.state.registry.is_asked(worker)):
            return b""  # repeated, or overtaken: the model that stands is the one that counts
        if header.incarnation != worker.incarnation:
            raise FencedError(
                f"a newer process has joined as worker {worker.name!r}; this one may not give the "
                "model any more"
            )
        space = self.state.agreed.require_space()
        self.state.shard = Shard(_read_model(frame, space, *self.state.agreed.shard_range))
        self.state.is_fresh = not self.state.registry.take_given(worker)
        self.state.changes += 1
        return b""

    def _exchange(self, request: bytes) -> bytes:
        frame = decode_frame(request, max_size=self.max_request_bytes("Exchange"))
        header = frame.header
        session = self._session(header.run, header.worker_id, header.member, header.incarnation)
        if header.seq == session.seq and session.reply:
            return session.reply
        if header.seq != session.seq + 1:
            raise SequenceError(
                f"exchange {header.seq} of worker {session.worker!r} does not follow "
                f"{session.seq}; join again"
            )
        indices, values, mean = self._checked(session, frame)
        shard, staleness = self._require_shard(), self.version - session.version
        try:
            bad = shard.apply(_places(session.part, indices), values)
            if bad < 0:
                shard.model[session.part.tail_coordinates] = mean
                session.version = shard.version
                reply = self._answer(session, header, staleness)
                session.record_exchange(
                    header.seq, staleness, len(request), reply, bytes(frame.cursor)
                )
        except BaseException:  # half done: the same request must never be applied again
            self.state.is_torn = True
            self.state.registry.forget(header.worker_id, header.member)
            raise
        if bad >= 0:
            name = session.part.name_at(int(indices[bad]))
            what = "holds NaN or Inf" if not np.isfinite(values[bad]) else "overflows the model"
            raise NonFiniteError(
                f"the update of worker {session.worker!r} {what} in tensor {name!r}; "
                "it was refused whole"
            )
        self.state.totals.staleness.add(staleness)
        self.state.totals.bytes_up += len(request)
        self.state.totals.bytes_down += len(reply)
        self.state.registry.settle(session)
        self.state.bound_replies(session)
        self.state.changes += 1
        return reply

    def _checked(self, session: Session, frame: Frame) -> tuple[Int64Array, FloatArray, FloatArray]:
        """Return an update's entries, and what it makes of the buffers."""
        header, part = frame.header, session.part
        if header.kind != FrameKind.UPDATE or header.replaces:
            raise MalformedError("an Exchange carries an update, to be added")
        if header.size != part.size or len(frame.tail) != part.tail_size:
            raise MalformedError(
                f"the update is of {header.size} coordinates and {len(frame.tail)} buffer values; "
                f"worker {session.worker!r} holds {part.size} and {part.tail_size} of this shard"
            )
        decode = kernels(part.size).decode_body
        indices, values = decode(frame.body, part.segment_sizes, header.values, header.nnz)
        mean = self._require_shard().model[part.tail_coordinates]
        with np.errstate(over="ignore", invalid="ignore"):
            active = self.state.registry.num_active(self.version)
            mean = mean + (frame.tail - mean) / np.float32(active)
        bad = first_non_finite(mean)
        if bad is not None:
            name = part.view.name_at(part.local_tail.start + bad)
            raise NonFiniteError(
                f"worker {session.worker!r} sent NaN or Inf in buffer {name!r}; "
                "its update was refused whole"
            )
        return indices, values, mean

    def _answer(self, session: Session, header: Header, staleness: int) -> bytes:
        """Advance the session's record and encode what it advanced by."""
        difference = session.record.advance()
        every = self.state.config.hash_interval
        hashed = every > 0 and header.seq % every == 0
        reply = Header(
            kind=FrameKind.DIFFERENCE,
            values=session.record.values,
            replaces=difference.replaces,
            worker_id=header.worker_id,
            member=header.member,
            shard=header.shard,
            run=self.state.run,
            incarnation=header.incarnation,
            seq=header.seq,
            version=self.version,
            size=session.part.size,
            nnz=difference.count,
            staleness=min(staleness, 0xFFFFFFFF),
            hash=digest(session.record.replica) if hashed else None,
        )
        model = self._require_shard().model
        tail = np.ascontiguousarray(model[session.part.tail_coordinates], dtype="<f4")
        return encode_frame(reply, difference.body, tail)

    def _pull_model(self, request: bytes) -> bytes:
        pull = parse(pb.PullRequest, request)
        model = self._require_shard().model
        if pull.run:
            self._check_run(pull.run)
        values, tail = model, model[:0]
        if pull.incarnation:
            session = self._session(pull.run, pull.worker_id, pull.member, pull.incarnation)
            values, tail = session.record.replica, model[session.part.tail_coordinates]
        header = Header(
            kind=FrameKind.MODEL,
            values="float32",
            worker_id=pull.worker_id,
            member=pull.member,
            shard=self.state.agreed.shard,
            run=self.state.run,
            incarnation=pull.incarnation,
            version=self.version,
            size=len(values),
            nnz=len(values),
        )
        body = np.ascontiguousarray(values, dtype="<f4")
        return encode_frame(header, body, np.ascontiguousarray(tail, dtype="<f4"))

    def _leave(self, request: bytes) -> bytes:
        leave = parse(pb.LeaveRequest, request)
        self._check_run(leave.run)
        who = leave.worker_id, leave.member, leave.incarnation
        self.state.changes += self.state.registry.close(*who)
        return pb.LeaveReply().SerializeToString()

    def _status(self, request: bytes) -> bytes:
        parse(pb.StatusRequest, request)
        start, stop = self.state.agreed.shard_range
        space, totals = self.state.agreed.space, self.state.totals
        return pb.StatusReply(
            run=self.state.run,
            ready=self.ready,
            version=self.version,
            shard=self.state.agreed.shard,
            num_shards=self.state.agreed.num_shards,
            range_start=start,
            range_stop=stop,
            tensors=space_to_message(space) if space else (),
            workers=[s.status(self.version) for s in self.state.registry.sessions()],
            refused=totals.refused,
            initialiser=self.state.agreed.initialiser,
            staleness_p50=totals.staleness.percentile(50),
            staleness_p99=totals.staleness.percentile(99),
            bytes_up=totals.bytes_up,
            bytes_down=totals.bytes_down,
        ).SerializeToString()

    def _session(self, run: int, worker_id: int, member: int, incarnation: int) -> Session:
        self._check_run(run)
        return self.state.registry.session(worker_id, member, incarnation)

    def _check_run(self, run: int) -> None:
        if run != self.state.run:
            raise WrongRunError(
                "this server is not the one that was joined: it was restarted without its state, "
                "or the address now belongs to another run; start the workers again"
            )

    def _require_shard(self) -> Shard:
        if self.state.shard is None:
            raise NotReadyError("the server has no model yet: no worker has joined")
        return self.state.shard


def _read_model(frame: Frame, space: ParameterSpace, start: int, stop: int) -> FloatArray:
    """Return a copy of the model that a frame gives a shard."""
    header = frame.header
    if header.kind != FrameKind.MODEL or header.size != stop - start:
        raise MalformedError(
            f"a model of {header.size} coordinates was sent; this shard has {stop - start}"
        )
    values = np.frombuffer(frame.body, dtype="<f4")
    bad = first_non_finite(values)
    if bad is not None:
        name = space.tensor_at(start + bad).name
        raise NonFiniteError(f"the initial model holds NaN or Inf in tensor {name!r}")
    return np.array(values, dtype=np.float32)


def _places(part: Part, indices: Int64Array) -> Int64Array:
    """Return where in the shard a session's indices are."""
    where = part.coordinates
    if not isinstance(where, slice):
        return where[indices]
    return indices + where.start if where.start else indices
