"""Speak with the servers that hold a model: join, exchange, pull, leave.

A client knows which shard is where, splits nothing itself (a worker's frames come one per shard),
and waits for all shards at once. Every wait is bounded by the budgets of `RetryConfig`.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from dgs._proto import parameter_server_pb2 as pb
from dgs.config import SLOWEST_BYTES_PER_S, WorkerConfig
from dgs.dialog import Ticket
from dgs.errors import (
    ChecksumError,
    ConfigError,
    DgsError,
    ForkError,
    MalformedError,
    ModelMismatchError,
    NotReadyError,
    ServerUnavailableError,
    UnknownWorkerError,
)
from dgs.frame import (
    MAX_CURSOR_BYTES,
    WIRE_VERSION,
    FrameKind,
    Header,
    decode_frame,
    encode_frame,
)
from dgs.messages import parse, space_from_message, space_to_message, views_to_message
from dgs.space import FloatArray, ParameterSpace
from dgs.transport.base import Method, Transport
from dgs.view import View

__all__ = ["Client", "Joined", "Outgoing", "Resume", "pull_model", "server_status", "settled"]

logger = logging.getLogger("dgs.client")

LEAVE_BUDGET_S = 2.0
"""Seconds that leaving may take: a server that is gone must not hold up the end of a run."""

JOIN_ATTEMPTS = 3
"""How often a join is begun whose session the server closes before it is used."""

DAMAGED_REPLIES = 3
"""How often a reply with a wrong checksum is asked for again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Joined:
    """The sessions that a join opened, one per shard."""

    tickets: list[Ticket]
    models: list[bytes] | None
    """Frames of the records to start from; None where earlier sessions go on."""
    gave_model: bool
    """Whether this worker gave the servers their model."""
    unchanged: list[bool]
    """Whether a shard has applied nothing of this worker since the exchange to resume."""
    cursor: bytes
    """What came with the last update that the furthest shard has applied of this worker."""
    earlier: int
    """Updates that shard has applied in earlier sessions of this worker."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resume:
    """An earlier session to go on with."""

    incarnation: int
    seq: int
    """Sequence number of the last exchange whose reply was taken."""
    in_flight: bool
    """Whether the next exchange was sent, and will be repeated."""


class Outgoing:
    """Calls to shards, each made as soon as its request is there.

    Args:
        call: makes one, given the shard and the request.
        pool: where calls run; None for a single one, which then runs in `wait`.
    """

    def __init__(
        self, call: Callable[[int, bytes], bytes], pool: ThreadPoolExecutor | None
    ) -> None:
        """Start with nothing sent."""
        self._call = call
        self._pool = pool
        self._results: list[Callable[[], bytes]] = []

    def send(self, shard: int, request: bytes) -> None:
        """Make one call; shards in order."""
        if self._pool is None:
            self._results.append(lambda: self._call(shard, request))
        else:
            self._results.append(self._pool.submit(self._call, shard, request).result)

    def wait(self) -> list[bytes | DgsError]:
        """Return what became of each, once all have ended: what follows must not overtake any."""
        outcomes: list[bytes | DgsError] = []
        for result in self._results:
            try:
                outcomes.append(result())
            except DgsError as e:
                outcomes.append(e)
        return outcomes


class Client:
    """One member's connections to all shards.

    Args:
        transports: one per shard, in the order that all workers use.
        config: what the sessions ask of the servers, and the budgets.
        name: the worker's name.
        views: what each member of the worker holds; a single process holds everything.
        member: position of this process among them.

    Note:
        Used by one thread; waits for several shards with threads of its own.
    """

    def __init__(
        self,
        transports: Sequence[Transport],
        config: WorkerConfig,
        name: str,
        views: Sequence[View],
        member: int = 0,
    ) -> None:
        """Keep the connections; nothing is sent before `join`."""
        self._transports = list(transports)
        self._config = config
        self.name = name
        self._views = list(views)
        self._member = member
        self._ranges = views[member].space.shard_ranges(len(self._transports))
        self._incarnation = 0
        self._tickets: list[Ticket] = []
        self._pid = os.getpid()
        self._pool: ThreadPoolExecutor | None = None
        self._closed = False

    @property
    def bytes_up(self) -> int:
        """Bytes of update frames handed to the transports, repeated attempts included."""
        return sum(t.traffic.up_bytes[Method.EXCHANGE] for t in self._transports)

    @property
    def bytes_down(self) -> int:
        """Bytes of difference frames received, repeated ones included."""
        return sum(t.traffic.down_bytes[Method.EXCHANGE] for t in self._transports)

    @property
    def setup_bytes(self) -> int:
        """Bytes of everything else: joining, pulling, leaving; both ways."""
        traffic = [t.traffic for t in self._transports]
        total = sum(sum(t.up_bytes.values()) + sum(t.down_bytes.values()) for t in traffic)
        return total - self.bytes_up - self.bytes_down

    def join(
        self,
        give_model: Callable[[], FloatArray],
        resume: Sequence[Resume] | None = None,
        *,
        restore: Sequence[bool] = (),
    ) -> Joined:
        """Open a session with every shard, as a new incarnation of this worker.

        Args:
            give_model: returns the whole model, flat, float32; called only if the servers have
                none and ask this worker for it.
            resume: earlier sessions to go on with, one per shard; if any server cannot, all
                sessions are opened anew.
            restore: whether to offer the model also to a server that has one, but has trained
                nothing; one per shard.

        Raises:
            ServerUnavailableError: a server was not reached within the connect budget.
            ModelMismatchError: the servers hold another model, or other shards.
        """
        for _ in range(JOIN_ATTEMPTS - 1):
            try:
                return self._try_to_join(give_model, resume, restore)
            except UnknownWorkerError as e:  # closed before it was used: this process was frozen
                logger.info("%s; joining once more", e)
        return self._try_to_join(give_model, resume, restore)

    def _try_to_join(
        self,
        give_model: Callable[[], FloatArray],
        resume: Sequence[Resume] | None,
        restore: Sequence[bool],
    ) -> Joined:
        self._check_usable()
        self._incarnation = max(time.time_ns(), self._incarnation + 1)
        replies: list[pb.JoinReply] = []
        gave = False
        for shard in range(len(self._transports)):
            first = replies[0].initialiser if replies else self.name
            request = self._join_request(shard, may_initialise=first == self.name)
            if any(restore[shard : shard + 1]) and len(self._views) == 1:
                request.restore = request.may_initialise = True
            if resume is not None:
                request.resume_incarnation = resume[shard].incarnation
                request.resume_seq = resume[shard].seq
                request.resume_in_flight = resume[shard].in_flight
            reply = self._join_shard(shard, request)
            if reply.outcome == pb.JoinReply.GIVE_MODEL:
                self._put_model(shard, reply, give_model())
                gave = True
                reply = self._join_shard(shard, request)
            replies.append(reply)
        resumed = [r.outcome == pb.JoinReply.RESUMED for r in replies]
        unchanged = [r.unchanged for r in replies]
        if any(resumed) and not all(resumed):
            again = self.join(give_model)
            return replace(again, unchanged=unchanged, gave_model=gave or again.gave_model)
        self._tickets = [
            Ticket(
                run=r.run,
                worker_id=r.worker_id,
                member=self._member,
                incarnation=self._incarnation,
            )
            for r in replies
        ]
        models = None if all(resumed) else self._for_all(self._pull_record)
        furthest = max(replies, key=lambda r: r.earlier_exchanges)
        return Joined(
            tickets=self._tickets,
            models=models,
            gave_model=gave,
            unchanged=unchanged,
            cursor=furthest.cursor,
            earlier=furthest.earlier_exchanges,
        )

    def _join_request(self, shard: int, *, may_initialise: bool) -> pb.JoinRequest:
        view, config = self._views[self._member], self._config
        whole = len(self._views) == 1 and view == View.whole(view.space)
        return pb.JoinRequest(
            protocol=WIRE_VERSION,
            worker=self.name,
            incarnation=self._incarnation,
            member=self._member,
            shard=shard,
            num_shards=len(self._transports),
            tensors=space_to_message(view.space),
            views=() if whole else views_to_message(self._views),
            download_density=config.download_density,
            values=config.values,
            selection=config.selection,
            dense_below=config.dense_below,
            may_initialise=may_initialise and whole,
        )

    def _join_shard(self, shard: int, request: pb.JoinRequest) -> pb.JoinReply:
        """Join one shard; take over from a worker that was asked for the model and is overdue."""
        budget = self._config.retry.connect_budget_s
        try:
            reply = self._transports[shard].call(
                Method.JOIN, request.SerializeToString(), timeout_s=budget
            )
        except ServerUnavailableError as e:
            if not isinstance(e.__cause__, NotReadyError):
                raise
            logger.warning("%s; giving it the model of worker %s instead", e, self.name)
            request.may_initialise = request.take_over = len(self._views) == 1
            reply = self._transports[shard].call(
                Method.JOIN, request.SerializeToString(), timeout_s=budget
            )
        joined = parse(pb.JoinReply, reply)
        if len(joined.cursor) > MAX_CURSOR_BYTES:
            raise MalformedError(
                f"{self._transports[shard].address} gave a cursor of {len(joined.cursor)} bytes; "
                f"at most {MAX_CURSOR_BYTES} are allowed"
            )
        return joined

    def _put_model(self, shard: int, reply: pb.JoinReply, model: FloatArray) -> None:
        start, stop = self._ranges[shard]
        header = Header(
            kind=FrameKind.MODEL,
            values="float32",
            worker_id=reply.worker_id,
            member=self._member,
            shard=shard,
            run=reply.run,
            incarnation=self._incarnation,
            size=stop - start,
            nnz=stop - start,
        )
        frame = encode_frame(header, np.ascontiguousarray(model[start:stop], dtype="<f4"))
        retry = self._config.retry
        timeout_s = retry.budget_s + retry.room_s(len(frame))
        self._transports[shard].call(Method.PUT_MODEL, frame, timeout_s=timeout_s)

    def _pull_record(self, shard: int) -> bytes:
        t = self._tickets[shard]
        request = pb.PullRequest(
            run=t.run, worker_id=t.worker_id, member=t.member, incarnation=t.incarnation
        )
        return self._intact(shard, Method.PULL_MODEL, request.SerializeToString())

    def exchange(self, frames: Sequence[bytes]) -> list[bytes]:
        """Send one frame per shard and wait for all replies.

        Args:
            frames: what `Worker.collect` made; sending the same again is safe.

        Raises:
            ServerUnavailableError: a server did not answer within the budget; whether it applied
                the update is unknown, and the same frames may be sent again.
        """
        return settled(self.try_exchange(frames))

    def try_exchange(self, frames: Sequence[bytes]) -> list[bytes | DgsError]:
        """Send one frame per shard and wait for what becomes of each: its reply, or its error."""
        outgoing = self.begin_exchange()
        for shard, frame in enumerate(frames):
            outgoing.send(shard, frame)
        return outgoing.wait()

    def begin_exchange(self, *, at_once: bool = False) -> Outgoing:
        """Start an exchange whose frames are still being made.

        Args:
            at_once: send in the background also where there is one shard only, for a caller that
                has other things to do before it waits.
        """
        self._check_usable()
        pool = self._threads() if at_once or len(self._transports) > 1 else None
        return Outgoing(lambda i, frame: self._intact(i, Method.EXCHANGE, frame), pool)

    def _intact(self, shard: int, method: Method, request: bytes) -> bytes:
        """Call, and ask again for a reply that was damaged on its way."""
        start, stop = self._ranges[shard]
        most_bytes = _most_bytes(method, stop - start, self._config.download_density)
        retry = self._config.retry
        timeout_s = retry.budget_s + retry.room_s(len(request) + most_bytes)
        for attempt in range(DAMAGED_REPLIES):
            reply = self._transports[shard].call(method, request, timeout_s=timeout_s)
            try:
                decode_frame(reply)
                break
            except ChecksumError:
                if attempt == DAMAGED_REPLIES - 1:
                    raise
                logger.warning(
                    "a reply of %s was damaged; asking again", self._transports[shard].address
                )
        return reply

    def _for_all(self, call: Callable[[int], bytes]) -> list[bytes]:
        pool = self._threads() if len(self._transports) > 1 else None
        outgoing = Outgoing(lambda i, _: call(i), pool)
        for shard in range(len(self._transports)):
            outgoing.send(shard, b"")
        return settled(outgoing.wait())

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            count = len(self._transports)
            self._pool = ThreadPoolExecutor(count, thread_name_prefix="dgs-client")
        return self._pool

    def _check_usable(self) -> None:
        if os.getpid() != self._pid:
            raise ForkError(
                "this optimizer was made before the process forked; make it in the child process, "
                "or start children with the 'spawn' method"
            )
        if self._closed:
            raise ConfigError("this optimizer is closed")

    def pull_model(self) -> dict[str, FloatArray]:
        """Return the servers' model, by tensor name; see the function of the same name."""
        self._check_usable()
        retry = self._config.retry
        return pull_model(
            self._transports, timeout_s=retry.budget_s, bytes_per_s=retry.slowest_bytes_per_s
        )

    def rename(self, name: str) -> None:
        """Leave, and take another name for the sessions to come."""
        if name != self.name:
            self._leave()
            self.name = name

    def _leave(self) -> None:
        _leave_all(self._transports, self._tickets)
        self._tickets = []

    def close(self, *, leave: bool) -> None:
        """Close the connections; with `leave`, free the servers' records first.

        A server that cannot be told within 2 s is left alone: closing never fails.
        """
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        if leave:
            self._leave()
        for transport in self._transports:
            transport.close()
        if self._pool is not None:
            self._pool.shutdown(wait=True)


def _leave_all(transports: Sequence[Transport], tickets: Sequence[Ticket]) -> None:
    """Free the servers' records, as far as they can be told."""
    for transport, t in zip(transports, tickets, strict=False):
        request = pb.LeaveRequest(
            run=t.run, worker_id=t.worker_id, member=t.member, incarnation=t.incarnation
        )
        try:
            transport.call(Method.LEAVE, request.SerializeToString(), timeout_s=LEAVE_BUDGET_S)
        except DgsError as e:
            logger.info("could not leave %s: %s", transport.address, e)


def _most_bytes(method: Method, size: int, density: float) -> int:
    """Return about how long a reply can be, of a shard of so many values."""
    share = min(1.0, 2 * density) if method is Method.EXCHANGE else 1.0  # tracked: up to twice
    return round(5 * share * size)  # an entry has an index as well


def settled(outcomes: Sequence[bytes | DgsError]) -> list[bytes]:
    """Return the replies of all shards, or raise the first error."""
    replies: list[bytes] = []
    for outcome in outcomes:
        if isinstance(outcome, DgsError):
            raise outcome
        replies.append(outcome)
    return replies


def server_status(transport: Transport, *, timeout_s: float) -> pb.StatusReply:
    """Ask one server for its status."""
    request = pb.StatusRequest().SerializeToString()
    return parse(pb.StatusReply, transport.call(Method.STATUS, request, timeout_s=timeout_s))


def pull_model(
    transports: Sequence[Transport],
    *,
    timeout_s: float,
    bytes_per_s: float = SLOWEST_BYTES_PER_S,
) -> dict[str, FloatArray]:
    """Fetch the model from all its shards, without joining.

    Args:
        transports: one per shard, in order.
        timeout_s: seconds for each call, and more for its bytes ...
        bytes_per_s: ... at this rate.

    Returns:
        Every tensor, averaged buffers included, by name and by each further name that it is tied
        to. Each shard's part is of one version; under way, shards may be a few updates apart.

    Raises:
        ConfigError: the servers are not the shards of one model, in order.
        NotReadyError: a server has no model yet.
    """
    spaces: list[ParameterSpace] = []
    parts: list[FloatArray] = []
    for shard, transport in enumerate(transports):
        status = server_status(transport, timeout_s=timeout_s)
        if not status.ready:
            raise NotReadyError(f"{transport.address} has no model yet: no worker has joined")
        if (status.shard, status.num_shards) != (shard, len(transports)):
            raise ConfigError(
                f"{transport.address} is shard {status.shard} of {status.num_shards}, but was "
                f"listed as {shard} of {len(transports)}; list all servers, in their order"
            )
        spaces.append(space_from_message(status.tensors))
        if (difference := spaces[0].first_difference(spaces[-1])) is not None:
            raise ModelMismatchError(
                f"{transports[0].address} (here) and {transport.address} (there) hold different "
                f"models: {difference}"
            )
        request = pb.PullRequest(run=status.run).SerializeToString()
        room_s = 4 * (status.range_stop - status.range_start) / bytes_per_s
        reply = transport.call(Method.PULL_MODEL, request, timeout_s=timeout_s + room_s)
        frame = decode_frame(reply)
        parts.append(np.frombuffer(frame.body, dtype="<f4").astype(np.float32))
    return spaces[0].unflatten(np.concatenate(parts))
