"""The server is its plain model, whatever it is asked in whatever order: many random histories.

Each history runs a few workers against one server, with every kind of request that a peer can send,
right or wrong, and compares all that can be seen of it with `PlainServer` after each step: so a
refusal, a repeat and a look change nothing. Some histories by default, 20,000 with
``MANY_HISTORIES=1`` (with ``-o faulthandler_timeout=0`` on a slow machine).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from dgs._proto import parameter_server_pb2 as pb
from dgs.codec import decode_body, encode_body
from dgs.config import ServerConfig
from dgs.errors import ChecksumError, DgsError, MalformedError, ModelMismatchError, ViewError
from dgs.errors import WrongRunError
from dgs.frame import WIRE_VERSION, FrameKind, Header, decode_frame, encode_frame
from dgs.messages import space_to_message, views_to_message
from dgs.server import ParameterServer
from dgs.state import ServerState, fingerprint
from dgs.view import Slab, View
from tests.helpers.server_model import Answer, Ask, Held, PlainServer, PlainSession, Update, held_of
from tests.helpers.sites import space_of

T = TypeVar("T")
Ticket = tuple[int, int, int]

MANY = os.environ.get("MANY_HISTORIES") == "1"
BATCHES, HISTORIES = (100, 200) if MANY else (4, 50)
STEPS = 50
RUN = 9

SPACE = space_of([(24, 16), (), (0, 3), (130,), (7,)], [(4,), (2,)])
OTHER_SPACE = space_of([(24, 16), (), (0, 3), (130,), (6,)], [(4,), (2,)])
TENSORS = space_to_message(SPACE)


def _views(*members: dict[int, tuple[tuple[int, ...], tuple[int, ...]]]) -> list[View]:
    """Build views from offset and shape per tensor."""
    return [View(SPACE, tuple(Slab(t, *box) for t, box in m.items())) for m in members]


WHOLE = {s.tensor: (s.offset, s.shape) for s in View.whole(SPACE).slabs}
LAYOUTS = {
    "whole": [View.whole(SPACE)],
    "columns": _views(
        {0: ((0, 0), (24, 5)), 3: ((0,), (40,)), 5: ((1,), (3,))},
        {**WHOLE, 0: ((0, 5), (24, 11)), 3: ((40,), (90,)), 5: ((0,), (1,))},
    ),
    "spread": _views({0: WHOLE[0]}, {t: box for t, box in WHOLE.items() if t > 0}, {}),
}
SEATS = [(layout, i) for layout, views in LAYOUTS.items() for i in range(len(views))]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"density": 0.02},
    {"selection": "tracked"},
    {"density": 0.3},
    {"density": 0.05, "selection": "tracked"},
    {"density": 0.3, "values": "int8"},
    {"density": 0.05, "selection": "tracked", "dense_below": 20, "values": "sign"},
    {"values": "bfloat16"},
]
OFFERS: list[dict[str, bool]] = [
    {},
    {},
    {},
    {"offers": False},
    {"takes_over": True},
    {"restores": True},
    {"restores": True, "takes_over": True},
]
AMOUNTS = np.array([-2, -1, -1, -0.5, -0.0, 0.0, 0.25, 1, 1, 1.5, 1e-45, 1e-30], np.float32)
EXTREMES = np.array([3.3e38, -3.3e38, 1.0], np.float32)
POISONS = [np.nan, np.inf, -np.inf]

names = st.sampled_from("abc")
ages = st.sampled_from(["newer", "newer", "same", "older"])
seats = st.sampled_from(["whole", "whole", *SEATS]).map(lambda s: s if s != "whole" else SEATS[0])
settings = st.sampled_from(SETTINGS)
picks = st.integers(0, 9)
seeds = st.integers(0, 1 << 20)
counts = st.sampled_from([1, 2, 0, 4, 8, 60, 1000])


class Histories(RuleBasedStateMachine):
    """One server and its plain model."""

    @initialize(
        shard=st.sampled_from([(0, 1), (0, 2), (1, 2)]),
        max_workers=st.sampled_from([64, 64, 3, 1]),
        hash_interval=st.sampled_from([1, 2, 0]),
        start=st.sampled_from(["joined", "joined", "empty", "given"]),
        seed=seeds,
        is_close_look=st.booleans(),
        is_extreme=st.booleans(),
    )
    def begin(
        self,
        shard: tuple[int, int],
        max_workers: int,
        hash_interval: int,
        start: str,
        seed: int,
        is_close_look: bool,
        is_extreme: bool,
    ) -> None:
        self.is_close_look, self.is_extreme = is_close_look, is_extreme
        config = ServerConfig(hash_interval=hash_interval, max_workers=max_workers)
        self.range = SPACE.shard_ranges(shard[1])[shard[0]]
        self.plain = PlainServer(shard, max_workers, hash_interval)
        init = None
        if start == "given":
            flat = draw_model(seed, SPACE.size)
            self.plain.init = flat[slice(*self.range)]
            init = SPACE.unflatten(flat)
        self.server = ParameterServer(config, init=init, run=RUN)
        self.held = {
            (layout, i): held_of(SPACE, view.slabs, *self.range)
            for layout, views in LAYOUTS.items()
            for i, view in enumerate(views)
        }
        self.newest: dict[str, int] = {}
        self.tickets: list[tuple[Ticket, Held]] = []
        self.saves: list[tuple[str, tuple[str, int], int, int]] = []
        self.moments: dict[tuple[str, int, int, int], int] = {}
        self.log: list[tuple[str, bytes, bytes]] = []
        self.snapshot: Callable[[], ParameterServer] | None = None
        if start == "joined":
            self.join("a", "newer", SEATS[0], {}, {})
            self.put_model(0, 0, seed, poisoned=False)
            self.join("a", "same", SEATS[0], {}, {})

    # what every request goes through

    def ask(self, method: str, request: bytes, answer: Callable[[], T]) -> tuple[bytes, T] | None:
        """Ask both; return both answers, or None if both refuse in the same way."""
        state = self.server.state
        changes, before = state.changes, fingerprint(state) if self.is_close_look else ""
        outcome: tuple[bytes, T] | None = None
        try:
            expected = answer()
        except DgsError as e:
            with pytest.raises(DgsError) as caught:
                self.server.handle(method, request)
            assert caught.type is type(e), caught.value
            assert state.changes == changes
            self.plain.refused += 1
        else:
            reply = self.server.handle(method, request)
            outcome = reply, expected
            if state.changes != changes:
                assert state.changes == changes + 1
                self.log.append((method, request, reply))
        if self.is_close_look and state.changes == changes:
            assert fingerprint(state) == before
        return outcome

    def refuses(self, method: str, request: bytes, error: type[DgsError]) -> None:
        def answer() -> None:
            raise error

        assert self.ask(method, request, answer) is None

    # joining and leaving

    def join_request(self, ask: Ask, layout: str) -> pb.JoinRequest:
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

    def incarnation(self, name: str, age: str) -> int:
        newest = self.newest.setdefault(name, 1)
        if age == "newer" and newest < 16:  # as many as a server remembers
            self.newest[name] = newest = newest + 1
        return max(1, newest - (age == "older"))

    def allowed(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Keep what rounds values away from models so large that rounding leaves float32."""
        return {**settings, "values": "float32"} if self.is_extreme else settings

    def try_to_join(self, ask: Ask, seat: tuple[str, int]) -> None:
        request = self.join_request(ask, seat[0]).SerializeToString()
        key, before = (ask.name, ask.member), self.tickets[-1:]
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
        if before != [(ticket, ask.held)]:
            self.tickets.append((ticket, self.held[seat]))
        if joined.outcome == "GIVE_MODEL":
            return
        session = self.plain.session(*ticket)
        past = self.plain.applied.get(key, [])
        if (*key, ask.incarnation, session.seq) not in self.moments:
            if joined.unchanged:  # never apply twice what is kept for this reason
                then = [self.moments.get((*key, ask.resume, seq)) for seq in ask.resume_seqs]
                assert len(past) in then
            self.remember(session, seat)

    def remember(self, session: PlainSession, seat: tuple[str, int]) -> None:
        """Note that the worker may save its state now, and how much of it was applied then."""
        name, incarnation = session.ask.name, session.incarnation
        key = name, session.ask.member
        self.moments[*key, incarnation, session.seq] = len(self.plain.applied.get(key, []))
        self.saves.append((name, seat, incarnation, session.seq))

    @rule(name=names, age=ages, seat=seats, settings=settings, offer=st.sampled_from(OFFERS))
    def join(
        self,
        name: str,
        age: str,
        seat: tuple[str, int],
        settings: dict[str, Any],
        offer: dict[str, bool],
    ) -> None:
        held, incarnation = self.held[seat], self.incarnation(name, age)
        ask = Ask(
            name=name,
            incarnation=incarnation,
            member=seat[1],
            held=held,
            shard=self.plain.shard,
            **self.allowed(settings),
            **offer,
        )
        self.try_to_join(ask, seat)

    @precondition(lambda self: self.saves)
    @rule(pick=picks, age=ages, settings=settings, in_flight=st.booleans(), moves=picks)
    def come_back(
        self, pick: int, age: str, settings: dict[str, Any], in_flight: bool, moves: int
    ) -> None:
        name, seat, incarnation, seq = last_but(self.saves, pick)
        if moves == 1:
            seat = ("whole", 0) if seat != ("whole", 0) else ("columns", 0)
        ask = Ask(
            name=name,
            incarnation=self.incarnation(name, age),
            member=seat[1],
            held=self.held[seat],
            shard=self.plain.shard,
            resume=incarnation,
            resume_seqs=range(seq, seq + 1 + in_flight),
            restores=moves == 2,
            **self.allowed(settings),
        )
        self.try_to_join(ask, seat)

    @precondition(lambda self: self.plain.model is not None)
    @rule(
        what=st.sampled_from(["shard", "model", "protocol", "density", "name", "gap", "nonsense"]),
        name=names,
    )
    def join_wrongly(self, what: str, name: str) -> None:
        newest = self.newest.get(name, 0) + 1
        held, shard = self.held[SEATS[0]], self.plain.shard
        ask = Ask(name=name, incarnation=newest, member=0, held=held, shard=shard)
        request = self.join_request(ask, "whole")
        error: type[DgsError] = ModelMismatchError
        if what == "shard":
            request.num_shards, request.shard = 5, 2
        elif what == "model":
            del request.tensors[:]
            request.tensors.extend(space_to_message(OTHER_SPACE))
        elif what == "protocol":
            request.protocol = 7
        else:
            error = MalformedError
            request.download_density = 0.0 if what == "density" else 1.0
            request.worker = "\n" if what == "name" else name
        if what == "gap":
            error = ViewError
            request.views.extend(views_to_message(LAYOUTS["columns"][:1]))
        data = request.SerializeToString()
        self.refuses("Join", data[:-1] + b"\xff" if what == "nonsense" else data, error)

    @precondition(lambda self: self.tickets)
    @rule(pick=picks, of_all=picks, run=st.sampled_from([RUN, RUN, RUN, 8]), again=st.booleans())
    def leave(self, pick: int, of_all: int, run: int, again: bool) -> None:
        ticket, _ = last_but(self.tickets, pick)
        if of_all == 0 and any(self.plain.sessions()):  # not often: others are to go far
            ticket, _ = self.pick_session(pick)
        for _ in range(1 + again):
            self.leave_as(ticket, run)

    def leave_as(self, ticket: Ticket, run: int = RUN) -> None:
        number, member, incarnation = ticket
        request = pb.LeaveRequest(
            run=run, worker_id=number, member=member, incarnation=incarnation
        ).SerializeToString()
        if run != RUN:
            self.refuses("Leave", request, WrongRunError)
        else:
            self.ask("Leave", request, lambda: self.plain.leave(*ticket))

    # the model

    @precondition(lambda self: self.tickets)
    @rule(pick=picks, skew=st.sampled_from([0, 0, 0, -1, 1]), seed=seeds, poisoned=st.booleans())
    def put_model(self, pick: int, skew: int, seed: int, poisoned: bool) -> None:
        (number, member, incarnation), _ = last_but(self.tickets, pick)
        start, stop = self.range
        model = draw_model(seed, stop - start)
        if poisoned:
            model[seed % model.size] = POISONS[seed % 3]
        header = Header(
            kind=FrameKind.MODEL,
            values="float32",
            worker_id=number,
            member=member,
            run=RUN,
            incarnation=max(0, incarnation + skew),
            size=model.size,
            nnz=model.size,
        )
        take = lambda: self.plain.put_model(number, header.incarnation, model)  # noqa: E731
        self.ask("PutModel", encode_frame(header, model), take)

    @precondition(lambda self: self.tickets)
    @rule(pick=picks)
    def pull(self, pick: int) -> None:
        ticket, _ = last_but(self.tickets, pick)
        answers = self.ask("PullModel", pull_request(ticket), lambda: self.plain.pull(*ticket))
        if answers is not None:
            self.check_record(answers[0], ticket, answers[1])

    # exchanging

    def pick_session(self, pick: int) -> tuple[Ticket, PlainSession]:
        worker, session = last_but(list(self.plain.sessions()), pick)
        return (worker.number, session.ask.member, session.incarnation), session

    def frame(self, ticket: Ticket, held: Held, seq: int, update: Update, **changed: Any) -> bytes:
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

    def exchange_as(self, ticket: Ticket, held: Held, seq: int, update: Update) -> None:
        request = self.frame(ticket, held, seq, update)
        answers = self.ask(
            "Exchange", request, lambda: self.plain.exchange(ticket, seq, update)
        )
        if answers is None:
            return
        reply, expected = answers
        if isinstance(expected, bytes):
            assert reply == expected
            return
        check_answer(reply, expected, held)
        self.plain.note(ticket, len(request), reply)
        session = self.plain.session(*ticket)
        seat = next(s for s, h in self.held.items() if h.slabs == held.slabs)
        self.remember(session, seat)

    @precondition(lambda self: any(self.plain.sessions()))
    @rule(pick=picks, seed=seeds, count=counts)
    def exchange(self, pick: int, seed: int, count: int) -> None:
        ticket, session = self.pick_session(pick)
        held = session.ask.held
        update = draw_update(held, seed, count, AMOUNTS)
        self.exchange_as(ticket, held, session.seq + 1, update)

    @precondition(lambda self: any(self.plain.sessions()))
    @rule(pick=picks, seed=seeds, count=counts, turns=st.integers(2, 12), others=st.booleans())
    def exchange_in_turns(
        self, pick: int, seed: int, count: int, turns: int, others: bool
    ) -> None:
        for turn in range(turns):
            self.exchange(pick + turn * others, seed + turn, count)

    @precondition(lambda self: any(self.plain.sessions()))
    @rule(pick=picks, seed=seeds, count=counts, ahead=st.sampled_from([0, 0, 0, -1, 2, 3]))
    def exchange_out_of_turn(self, pick: int, seed: int, count: int, ahead: int) -> None:
        ticket, session = self.pick_session(pick)
        held = session.ask.held
        update = draw_update(held, seed, count, AMOUNTS)
        self.exchange_as(ticket, held, max(0, session.seq + ahead), update)

    @precondition(lambda self: self.tickets)
    @rule(pick=picks, seed=seeds, seq=st.integers(0, 3))
    def exchange_as_anyone_ever(self, pick: int, seed: int, seq: int) -> None:
        ticket, held = last_but(self.tickets, pick)
        self.exchange_as(ticket, held, seq, draw_update(held, seed, 2, AMOUNTS))

    @precondition(lambda self: any(self.plain.sessions()))
    @rule(pick=picks, seed=seeds, count=counts, poison=st.sampled_from(["no", "entry", "buffer"]))
    def exchange_extremes(self, pick: int, seed: int, count: int, poison: str) -> None:
        ticket, session = self.pick_session(pick)
        held = session.ask.held
        amounts = EXTREMES if self.is_extreme else AMOUNTS * np.float32(1e3)
        update = draw_update(held, seed, count, amounts)
        if poison == "entry":
            update.values[seed % max(1, count) :][:1] = POISONS[seed % 3]
        if poison == "buffer":
            update.tail[:1] = POISONS[seed % 3]
        self.exchange_as(ticket, held, session.seq + 1, update)

    @precondition(lambda self: any(self.plain.sessions()))
    @rule(pick=picks, what=st.sampled_from(["damaged", "run", "kind", "size", "tail", "short"]))
    def exchange_nonsense(self, pick: int, what: str) -> None:
        ticket, session = self.pick_session(pick)
        held, seq = session.ask.held, session.seq + 1
        update = draw_update(held, 0, 0, AMOUNTS)
        if what == "tail":
            update = replace(update, tail=np.zeros(held.averaged.size + 1, np.float32))
        changed = {
            "run": {"run": 8},
            "kind": {"kind": FrameKind.DIFFERENCE},
            "size": {"size": held.trained.size + 1},
        }.get(what, {})
        if what == "kind":
            update = replace(update, cursor=b"")
        frame = self.frame(ticket, held, seq, update, **changed)
        if what == "damaged":
            frame = frame[:-1] + bytes([frame[-1] ^ 1])
        if what == "short":
            frame = frame[:50]
        errors = {"damaged": ChecksumError, "run": WrongRunError}
        self.refuses("Exchange", frame, errors.get(what, MalformedError))

    # saving and restoring

    @rule()
    def save(self) -> None:
        saved, refused = self.server.state.save(), self.plain.refused
        facts = json.dumps(saved.facts)

        def restored() -> ParameterServer:
            arrays = {name: compute() for name, compute in saved.arrays.items()}
            self.plain.refused = refused
            return ParameterServer.of(ServerState.restored(json.loads(facts), arrays))

        self.snapshot, self.log = restored, []

    @precondition(lambda self: self.snapshot is not None)
    @rule()
    def crash_and_recover(self) -> None:
        assert self.snapshot is not None
        server = self.snapshot()
        for method, request, reply in self.log:
            assert server.handle(method, request) == reply
        assert server.state.changes == self.server.state.changes
        assert fingerprint(server.state) == fingerprint(self.server.state)
        self.server = server

    # what can be seen

    @invariant()
    def everything_that_can_be_seen_is_equal(self) -> None:
        plain = self.plain
        assert seen(self.server) == plain.status()
        assert (self.server.ready, self.server.version) == (plain.model is not None, plain.version)
        if plain.model is None:
            return
        frame = decode_frame(self.server.handle("PullModel", b""))
        assert (frame.header.run, frame.header.version) == (RUN, plain.version)
        assert bytes(frame.body) == plain.model.tobytes()
        for worker, session in plain.sessions():
            ticket = worker.number, session.ask.member, session.incarnation
            reply = self.server.handle("PullModel", pull_request(ticket))
            self.check_record(reply, ticket, session)

    def check_record(self, reply: bytes, ticket: Ticket, session: PlainSession) -> None:
        assert self.plain.model is not None
        frame = decode_frame(reply)
        header = frame.header
        assert (header.worker_id, header.member, header.incarnation) == ticket
        assert header.version == self.plain.version
        assert bytes(frame.body) == session.replica.tobytes()
        assert frame.tail.tobytes() == self.plain.model[session.ask.held.averaged].tobytes()


def last_but(items: list[T], pick: int) -> T:
    return items[-1 - pick % len(items)]


def draw_model(seed: int, size: int) -> np.ndarray:
    return (np.random.default_rng(seed).integers(-8, 9, size) / -8).astype(np.float32)


def draw_update(held: Held, seed: int, count: int, amounts: np.ndarray) -> Update:
    """Draw an update of some coordinates; every other time, of the first few."""
    rng = np.random.default_rng(seed)
    size = held.trained.size if seed % 2 else min(12, held.trained.size)
    indices = np.sort(rng.permutation(size)[:count])
    values = rng.choice(amounts, indices.size)
    if seed % 5 == 0:
        values = values * rng.random(indices.size, np.float32)
    tail = rng.choice(amounts, held.averaged.size)
    return Update(indices=indices, values=values, tail=tail, cursor=b"%d" % seed)


def check_answer(reply: bytes, expected: Answer, held: Held) -> None:
    frame = decode_frame(reply)
    header = frame.header
    assert header.kind == FrameKind.DIFFERENCE
    assert {name: getattr(header, name) for name in expected.header} == expected.header
    indices, values = decode_body(frame.body, held.sizes, header.values, header.nnz)
    assert indices.tolist() == expected.indices.tolist()
    assert values.tobytes() == expected.values.tobytes()
    assert frame.tail.tobytes() == expected.tail.tobytes()


def pull_request(ticket: Ticket) -> bytes:
    number, member, incarnation = ticket
    return pb.PullRequest(
        run=RUN, worker_id=number, member=member, incarnation=incarnation
    ).SerializeToString()


def seen(server: ParameterServer) -> dict[str, Any]:
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


@pytest.mark.parametrize("batch", range(BATCHES))
def test_any_history_shows_the_same_as_the_plain_model(batch: int) -> None:
    run_state_machine_as_test(
        hypothesis.seed(batch)(Histories),
        settings=hypothesis.settings(
            max_examples=HISTORIES,
            stateful_step_count=STEPS,
            deadline=None,
            report_multiple_bugs=False,
            phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
            suppress_health_check=list(hypothesis.HealthCheck),
        ),
    )
