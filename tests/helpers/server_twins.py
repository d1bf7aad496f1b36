"""A server and its plain model, asked the same and held to the same answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import pytest

from dgs._proto import parameter_server_pb2 as pb
from dgs.codec import decode_body, encode_body
from dgs.config import ServerConfig
from dgs.errors import DgsError
from dgs.frame import WIRE_VERSION, FrameKind, Header, decode_frame, encode_frame
from dgs.messages import space_to_message, views_to_message
from dgs.server import ParameterServer
from dgs.state import ServerState, fingerprint
from dgs.view import Slab, View
from tests.helpers.server_model import (
    Answer,
    Ask,
    Floats,
    Held,
    PlainServer,
    PlainSession,
    Update,
    held_of,
)
from tests.helpers.sites import space_of

T = TypeVar("T")
Ticket = tuple[int, int, int]
"""Number of a worker, member, incarnation: what a session is known by."""

Seat = tuple[str, int]
"""A layout, and a member of it."""

RUN = 9
SPACE = space_of([(24, 16), (), (0, 3), (130,), (7,)], [(4,), (2,)])
TENSORS = space_to_message(SPACE)


def _views(*members: dict[int, tuple[tuple[int, ...], tuple[int, ...]]]) -> list[View]:
    """Build views from offset and shape per tensor."""
    return [View(SPACE, tuple(Slab(t, *box) for t, box in m.items())) for m in members]


_WHOLE = {s.tensor: (s.offset, s.shape) for s in View.whole(SPACE).slabs}
LAYOUTS = {
    "whole": [View.whole(SPACE)],
    "columns": _views(
        {0: ((0, 0), (24, 5)), 3: ((0,), (40,)), 5: ((1,), (3,))},
        {**_WHOLE, 0: ((0, 5), (24, 11)), 3: ((40,), (90,)), 5: ((0,), (1,))},
    ),
    "spread": _views({0: _WHOLE[0]}, {t: box for t, box in _WHOLE.items() if t > 0}, {}),
}
SEATS: list[Seat] = [(layout, i) for layout, views in LAYOUTS.items() for i in range(len(views))]


class Twins:
    """The server of one shard, its plain model, and what their workers may remember.

    Args:
        shard: position and number of shards.
        config: of the server.
        init: the whole model to start from, or None.
        is_close_look: whether to compare fingerprints around each request that changes nothing.
    """

    def __init__(
        self,
        shard: tuple[int, int],
        config: ServerConfig,
        init: Floats | None,
        is_close_look: bool,
    ) -> None:
        self.range = start, stop = SPACE.shard_ranges(shard[1])[shard[0]]
        self.plain = PlainServer(shard, config.max_workers, config.hash_interval)
        self.plain.init = None if init is None else init[start:stop]
        given = None if init is None else SPACE.unflatten(init)
        self.server = ParameterServer(config, init=given, run=RUN)
        self.held = {
            (layout, i): held_of(SPACE, LAYOUTS[layout][i].slabs, start, stop)
            for layout, i in SEATS
        }
        self.tickets: list[tuple[Ticket, Held]] = []
        self.saves: dict[tuple[str, Seat, int], int] = {}
        """The sequence number that each name, seat and incarnation had last: it may be saved."""
        self.snapshot: Callable[[], ParameterServer] | None = None
        self._moments: dict[tuple[str, int, int, int], int] = {}
        self._log: list[tuple[str, bytes, bytes]] = []
        self._is_close_look = is_close_look

    def ask(self, method: str, request: bytes, answer: Callable[[], T]) -> tuple[bytes, T] | None:
        """Ask both; return both answers, or None if both refuse in the same way."""
        state = self.server.state
        changes, before = state.changes, fingerprint(state) if self._is_close_look else ""
        expected, refusal = _attempt(answer)
        reply = b""
        if refusal is not None:
            with pytest.raises(DgsError) as caught:
                self.server.handle(method, request)
            assert caught.type is refusal, caught.value
            assert state.changes == changes
            self.plain.refused += 1
        else:
            reply = self.server.handle(method, request)
        if state.changes != changes:
            assert state.changes == changes + 1
            self._log.append((method, request, reply))
        elif self._is_close_look:
            assert fingerprint(state) == before
        return None if expected is None else (reply, expected[0])

    def refuses(self, method: str, request: bytes, error: type[DgsError]) -> None:
        """Ask what must be refused whatever the state is."""

        def answer() -> None:
            raise error

        assert self.ask(method, request, answer) is None

    def join_request(self, ask: Ask, layout: str) -> pb.JoinRequest:
        """Write a request to join."""
        return pb.JoinRequest(
            protocol=WIRE_VERSION,
            worker=ask.name,
            incarnation=ask.incarnation,
            member=ask.member,
            shard=ask.shard[0],
            num_shards=ask.shard[1],
            tensors=TENSORS,
            views=() if layout == "whole" else views_to_message(LAYOUTS[layout]),
            download_density=ask.density,
            values=ask.values,
            selection=ask.selection,
            dense_below=ask.dense_below,
            may_initialise=ask.offers,
            take_over=ask.takes_over,
            restore=ask.restores,
            resume_incarnation=ask.resume,
            resume_seq=ask.resume_seqs.start,
            resume_in_flight=len(ask.resume_seqs) == 2,
        )

    def join(self, seat: Seat, **fields: Any) -> None:
        """Join; where the worker is told to keep its velocity, hold that against its history."""
        ask = Ask(member=seat[1], held=self.held[seat], shard=self.plain.shard, **fields)
        request = self.join_request(ask, seat[0]).SerializeToString()
        answers = self.ask("Join", request, lambda: self.plain.join(ask))
        if answers is None:
            return
        reply, joined = pb.JoinReply.FromString(answers[0]), answers[1]
        assert reply.run == RUN
        assert pb.JoinReply.Outcome.Name(reply.outcome) == joined.outcome
        assert (reply.worker_id, reply.version) == (joined.number, joined.version)
        assert reply.initialiser == joined.initialiser
        assert (reply.unchanged, reply.cursor) == (joined.unchanged, joined.cursor)
        assert reply.earlier_exchanges == joined.earlier
        ticket = joined.number, ask.member, ask.incarnation
        self.tickets.append((ticket, ask.held))
        if joined.outcome == "GIVE_MODEL":
            return
        key, session = (ask.name, ask.member), self.plain.session(*ticket)
        if (*key, ask.incarnation, session.seq) in self._moments:  # repeated
            return
        if joined.unchanged:  # or what was applied would be applied again
            then = [self._moments.get((*key, ask.resume, seq)) for seq in ask.resume_seqs]
            assert len(self.plain.applied.get(key, [])) in then
        self._remember(session)

    def _remember(self, session: PlainSession) -> None:
        """Note that the worker may save its state now, and how much of it was applied by then."""
        name, incarnation = session.ask.name, session.incarnation
        key = name, session.ask.member
        self._moments[*key, incarnation, session.seq] = len(self.plain.applied.get(key, []))
        self.saves[name, self.seat_of(session), incarnation] = session.seq

    def seat_of(self, session: PlainSession) -> Seat:
        """Return the layout and the member of a session."""
        return next(s for s, held in self.held.items() if held is session.ask.held)

    def leave(self, ticket: Ticket) -> None:
        """Leave."""
        self.ask("Leave", leave_request(ticket), lambda: self.plain.leave(*ticket))

    def put_model(self, ticket: Ticket, model: Floats) -> None:
        """Give the model."""
        number, member, incarnation = ticket
        header = Header(
            kind=FrameKind.MODEL,
            values="float32",
            worker_id=number,
            member=member,
            run=RUN,
            incarnation=incarnation,
            size=model.size,
            nnz=model.size,
        )
        request = encode_frame(header, model)
        self.ask("PutModel", request, lambda: self.plain.put_model(number, incarnation, model))

    def pull(self, ticket: Ticket) -> None:
        """Pull the record of a session."""
        answers = self.ask("PullModel", pull_request(ticket), lambda: self.plain.pull(*ticket))
        if answers is not None:
            self._check_record(answers[0], ticket, answers[1])

    def session(self, pick: int) -> tuple[Ticket, PlainSession]:
        """Choose a live session."""
        worker, session = last_but(list(self.plain.sessions()), pick)
        return (worker.number, session.ask.member, session.incarnation), session

    def frame(self, ticket: Ticket, held: Held, seq: int, update: Update, **changed: Any) -> bytes:
        """Write an update, finite or not."""
        number, member, incarnation = ticket
        finite = np.nan_to_num(update.values)
        body = bytearray(encode_body(update.indices, finite, held.sizes, "float32").body)
        if finite.size:  # the values stand last; the encoder would refuse what is not finite
            body[-4 * finite.size :] = update.values.tobytes()
        header = Header(
            kind=FrameKind.UPDATE,
            values="float32",
            worker_id=number,
            member=member,
            shard=self.plain.shard[0],
            run=RUN,
            incarnation=incarnation,
            seq=seq,
            size=held.trained.size,
            nnz=finite.size,
        )
        return encode_frame(replace(header, **changed), body, update.tail, update.cursor)

    def exchange(self, ticket: Ticket, held: Held, seq: int, update: Update) -> None:
        """Send an update, and compare what comes back; a repeated one brings the same bytes."""
        request = self.frame(ticket, held, seq, update)
        answers = self.ask("Exchange", request, lambda: self.plain.exchange(ticket, seq, update))
        if answers is None:
            return
        reply, expected = answers
        if isinstance(expected, bytes):
            assert reply == expected
            return
        _check_answer(reply, expected, held)
        self.plain.note(ticket, len(request), reply)
        self._remember(self.plain.session(*ticket))

    def save(self) -> None:
        """Take a snapshot; its arrays are computed when it is needed, as a server may go on."""
        saved, refused = self.server.state.save(), self.plain.refused
        facts = json.dumps(saved.facts)

        def restored() -> ParameterServer:
            self.plain.refused = refused
            arrays = {name: compute() for name, compute in saved.arrays.items()}
            return ParameterServer.of(ServerState.restored(json.loads(facts), arrays))

        self.snapshot, self._log = restored, []

    def crash_and_recover(self) -> None:
        """Go on with the last snapshot, after the requests that changed the state since."""
        assert self.snapshot is not None
        server = self.snapshot()
        for method, request, reply in self._log:
            assert server.handle(method, request) == reply
        assert server.state.changes == self.server.state.changes
        assert fingerprint(server.state) == fingerprint(self.server.state)
        self.server = server

    def compare(self) -> None:
        """Compare all that can be seen: status, model, and the record of each session."""
        plain = self.plain
        assert _seen(self.server) == plain.status()
        assert (self.server.ready, self.server.version) == (plain.model is not None, plain.version)
        if plain.model is None:
            return
        frame = decode_frame(self.server.handle("PullModel", b""))
        assert (frame.header.run, frame.header.version) == (RUN, plain.version)
        assert bytes(frame.body) == plain.model.tobytes()
        for worker, session in plain.sessions():
            ticket = worker.number, session.ask.member, session.incarnation
            reply = self.server.handle("PullModel", pull_request(ticket))
            self._check_record(reply, ticket, session)

    def _check_record(self, reply: bytes, ticket: Ticket, session: PlainSession) -> None:
        assert self.plain.model is not None
        frame = decode_frame(reply)
        header = frame.header
        assert (header.worker_id, header.member, header.incarnation) == ticket
        assert header.version == self.plain.version
        assert bytes(frame.body) == session.replica.tobytes()
        assert frame.tail.tobytes() == self.plain.model[session.ask.held.averaged].tobytes()


def last_but(items: list[T], pick: int) -> T:
    """Choose an item, 0 for the last."""
    return items[-1 - pick % len(items)]


def _attempt(answer: Callable[[], T]) -> tuple[tuple[T] | None, type[DgsError] | None]:
    try:
        return (answer(),), None
    except DgsError as e:
        return None, type(e)


def _check_answer(reply: bytes, expected: Answer, held: Held) -> None:
    frame = decode_frame(reply)
    header = frame.header
    assert (header.kind, header.run) == (FrameKind.DIFFERENCE, RUN)
    assert {name: getattr(header, name) for name in expected.header} == expected.header
    indices, values = decode_body(frame.body, held.sizes, header.values, header.nnz)
    assert indices.tolist() == expected.indices.tolist()
    assert values.tobytes() == expected.values.tobytes()
    assert frame.tail.tobytes() == expected.tail.tobytes()


def pull_request(ticket: Ticket) -> bytes:
    """Write a request for the record of a session."""
    number, member, incarnation = ticket
    return pb.PullRequest(
        run=RUN, worker_id=number, member=member, incarnation=incarnation
    ).SerializeToString()


def leave_request(ticket: Ticket, run: int = RUN) -> bytes:
    """Write a request to end a session."""
    number, member, incarnation = ticket
    return pb.LeaveRequest(
        run=run, worker_id=number, member=member, incarnation=incarnation
    ).SerializeToString()


def _seen(server: ParameterServer) -> dict[str, Any]:
    """Return a server's status as `PlainServer.status` tells it."""
    status = pb.StatusReply.FromString(server.handle("Status", b""))
    assert status.run == RUN
    return {
        "ready": status.ready,
        "version": status.version,
        "initialiser": status.initialiser,
        "refused": status.refused,
        "bytes": (status.bytes_up, status.bytes_down),
        "staleness": (status.staleness_p50, status.staleness_p99),
        "workers": {
            (w.worker, w.member): {
                "incarnation": w.incarnation,
                "exchanges": w.exchanges,
                "behind": w.behind,
                "bytes": (w.bytes_up, w.bytes_down),
                "staleness": (w.staleness_p50, w.staleness_p99),
            }
            for w in status.workers
        },
    }
