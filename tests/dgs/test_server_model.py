"""The server is its plain model, whatever it is asked in whatever order: many random histories.

Each history runs a few workers against one server, with every kind of request that a peer can send,
right or wrong, and compares all that can be seen of it with `PlainServer` after each step: so a
refusal, a repeat and a look change nothing. Some histories by default, 20,000 with
``MANY_HISTORIES=1``. One that fails is made shorter with ``SHRINK_HISTORIES=1``; that may take
minutes, so also give ``-o faulthandler_timeout=0``.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from dgs.config import ServerConfig
from dgs.errors import (
    ChecksumError,
    DgsError,
    MalformedError,
    ModelMismatchError,
    ViewError,
    WrongRunError,
)
from dgs.frame import FrameKind
from dgs.messages import space_to_message, views_to_message
from tests.helpers.server_model import Ask, Held, Update
from tests.helpers.server_twins import (
    LAYOUTS,
    RUN,
    SEATS,
    SPACE,
    Seat,
    Twins,
    last_but,
    leave_request,
)
from tests.helpers.sites import space_of

Floats = npt.NDArray[np.float32]

MANY = os.environ.get("MANY_HISTORIES") == "1"
BATCHES, HISTORIES = (100, 200) if MANY else (4, 40)
STEPS = 50
PHASES = [hypothesis.Phase.generate]
if os.environ.get("SHRINK_HISTORIES") == "1":
    PHASES.append(hypothesis.Phase.shrink)

SETTINGS: list[dict[str, Any]] = [
    {},
    {"density": 0.02},
    {"density": 0.004},
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
OTHER_SPACE = space_of([(24, 16), (), (0, 3), (130,), (6,)], [(4,), (2,)])
AMOUNTS = np.array([-2, -1, -1, -0.5, -0.0, 0.0, 0.25, 1, 1, 1.5, 1e-45, 1e-30], np.float32)
EXTREMES = np.array([3.3e38, -3.3e38, 1.0], np.float32)
POISONS = [np.nan, np.inf, -np.inf]

names = st.sampled_from("abc")
ages = st.sampled_from(["newer", "newer", "same", "older"])
seats = st.sampled_from([SEATS[0], SEATS[0], SEATS[0], *SEATS[1:]])
settings = st.sampled_from(SETTINGS)
picks = st.integers(0, 9)
seeds = st.integers(0, 1 << 20)
counts = st.sampled_from([1, 2, 0, 4, 1, 8, 60, 1000])
turns = st.sampled_from([2, 3, 4, 6, 9, 30])


def someone_is_there(machine: Histories) -> bool:
    return any(machine.twins.plain.sessions())


def someone_has_been_there(machine: Histories) -> bool:
    return bool(machine.twins.tickets)


class Histories(RuleBasedStateMachine):
    """What workers, their late messages and their faults do to one server."""

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
        config = ServerConfig(hash_interval=hash_interval, max_workers=max_workers)
        init = draw_model(seed, SPACE.size) if start == "given" else None
        self.twins = Twins(shard, config, init, is_close_look)
        self.newest: dict[str, int] = {}
        self.is_extreme = is_extreme
        if start == "joined":
            self.join("a", "newer", SEATS[0], {}, {})
            self.put_model(0, 0, seed, poisoned=False)
            self.join("a", "same", SEATS[0], {}, {})

    def incarnation(self, name: str, age: str) -> int:
        newest = self.newest.setdefault(name, 1)
        if age == "newer" and newest < 16:  # as many as a server remembers
            self.newest[name] = newest = newest + 1
        return max(1, newest - (age == "older"))

    def allowed(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Keep coarse values away from models so large that rounding would leave float32."""
        return {**settings, "values": "float32"} if self.is_extreme else settings

    @rule(name=names, age=ages, seat=seats, settings=settings, offer=st.sampled_from(OFFERS))
    def join(
        self, name: str, age: str, seat: Seat, settings: dict[str, Any], offer: dict[str, bool]
    ) -> None:
        incarnation = self.incarnation(name, age)
        self.twins.join(seat, name=name, incarnation=incarnation, **self.allowed(settings), **offer)

    @precondition(lambda self: self.twins.saves)
    @rule(
        pick=picks,
        age=ages,
        settings=settings,
        in_flight=st.booleans(),
        late=st.sampled_from([0, 0, 0, 1, 2]),
        other=picks,
    )
    def come_back_with_a_saved_state(
        self,
        pick: int,
        age: str,
        settings: dict[str, Any],
        in_flight: bool,
        late: int,
        other: int,
    ) -> None:
        (name, seat, incarnation), seq = last_but(list(self.twins.saves.items()), pick)
        seq = max(0, seq - late)
        if other == 1:
            seat = ("whole", 0) if seat != ("whole", 0) else ("columns", 0)
        self.twins.join(
            seat,
            name=name,
            incarnation=self.incarnation(name, age),
            resume=incarnation,
            resume_seqs=range(seq, seq + 1 + in_flight),
            restores=other == 2,
            **self.allowed(settings),
        )

    @precondition(someone_is_there)
    @rule(pick=picks, settings=settings, in_flight=st.booleans())
    def restart_with_the_last_state(
        self, pick: int, settings: dict[str, Any], in_flight: bool
    ) -> None:
        _, session = self.twins.session(pick)
        self.twins.join(
            self.twins.seat_of(session),
            name=session.ask.name,
            incarnation=self.incarnation(session.ask.name, "newer"),
            resume=session.incarnation,
            resume_seqs=range(max(0, session.seq - in_flight), session.seq + 1),
            **self.allowed(settings),
        )

    @precondition(lambda self: self.twins.plain.model is not None)
    @rule(
        what=st.sampled_from(["shard", "model", "protocol", "density", "name", "gap", "cut off"]),
        name=names,
    )
    def join_wrongly(self, what: str, name: str) -> None:
        newest = self.newest.get(name, 1) + 1
        held, shard = self.twins.held[SEATS[0]], self.twins.plain.shard
        ask = Ask(name=name, incarnation=newest, member=0, held=held, shard=shard)
        request = self.twins.join_request(ask, "whole")
        error: type[DgsError] = ModelMismatchError
        if what == "shard":
            request.num_shards, request.shard = 5, 2
        elif what == "model":
            del request.tensors[:]
            request.tensors.extend(space_to_message(OTHER_SPACE))
        elif what == "protocol":
            request.protocol = 7
        elif what == "gap":
            error = ViewError
            request.views.extend(views_to_message(LAYOUTS["columns"][:1]))
        else:
            error = MalformedError
            request.download_density = 0.0 if what == "density" else 1.0
            request.worker = "\n" if what == "name" else name
        data = request.SerializeToString()
        self.twins.refuses("Join", data[:-1] if what == "cut off" else data, error)

    @precondition(someone_has_been_there)
    @rule(pick=picks, other=picks, again=st.booleans())
    def leave(self, pick: int, other: int, again: bool) -> None:
        ticket, _ = last_but(self.twins.tickets, pick)
        if other == 0 and someone_is_there(self):  # not often: others are to get far
            ticket, _ = self.twins.session(pick)
        if other == 1:
            self.twins.refuses("Leave", leave_request(ticket, RUN + 1), WrongRunError)
            return
        for _ in range(1 + again):
            self.twins.leave(ticket)

    @precondition(someone_has_been_there)
    @rule(pick=picks, skew=st.sampled_from([0, 0, 0, -1, 1]), seed=seeds, poisoned=st.booleans())
    def put_model(self, pick: int, skew: int, seed: int, poisoned: bool) -> None:
        (number, member, incarnation), _ = last_but(self.twins.tickets, pick)
        start, stop = self.twins.range
        model = draw_model(seed, stop - start)
        if poisoned:
            model[seed % model.size] = POISONS[seed % 3]
        self.twins.put_model((number, member, max(0, incarnation + skew)), model)

    @precondition(someone_has_been_there)
    @rule(pick=picks)
    def pull(self, pick: int) -> None:
        self.twins.pull(last_but(self.twins.tickets, pick)[0])

    @precondition(someone_is_there)
    @rule(pick=picks, seed=seeds, count=counts, ahead=st.sampled_from([1, 1, 1, 0, 0, -1, 2]))
    def exchange(self, pick: int, seed: int, count: int, ahead: int) -> None:
        ticket, session = self.twins.session(pick)
        held = session.ask.held
        update = draw_update(held, seed, count, AMOUNTS)
        self.twins.exchange(ticket, held, max(0, session.seq + ahead), update)

    @precondition(someone_is_there)
    @rule(pick=picks, seed=seeds, count=counts, turns=turns, others=st.booleans())
    def exchange_in_turns(self, pick: int, seed: int, count: int, turns: int, others: bool) -> None:
        for turn in range(turns):
            self.exchange(pick + turn * others, seed + turn, count, 1)

    @precondition(someone_has_been_there)
    @rule(pick=picks, seed=seeds, seq=st.integers(0, 3))
    def exchange_as_anyone_who_ever_was_there(self, pick: int, seed: int, seq: int) -> None:
        ticket, held = last_but(self.twins.tickets, pick)
        self.twins.exchange(ticket, held, seq, draw_update(held, seed, 2, AMOUNTS))

    @precondition(someone_is_there)
    @rule(pick=picks, seed=seeds, count=counts, poison=st.sampled_from(["no", "entry", "buffer"]))
    def exchange_extremes(self, pick: int, seed: int, count: int, poison: str) -> None:
        ticket, session = self.twins.session(pick)
        held = session.ask.held
        amounts = EXTREMES if self.is_extreme else AMOUNTS * np.float32(1e3)
        update = draw_update(held, seed, count, amounts)
        if poison == "entry":
            update.values[seed % max(1, count) :][:1] = POISONS[seed % 3]
        if poison == "buffer":
            update.tail[:1] = POISONS[seed % 3]
        self.twins.exchange(ticket, held, session.seq + 1, update)

    @precondition(someone_is_there)
    @rule(pick=picks, what=st.sampled_from(["damaged", "run", "kind", "size", "tail", "short"]))
    def exchange_nonsense(self, pick: int, what: str) -> None:
        ticket, session = self.twins.session(pick)
        held, seq = session.ask.held, session.seq + 1
        update = replace(draw_update(held, 0, 0, AMOUNTS), cursor=b"")
        if what == "tail":
            update = replace(update, tail=np.zeros(held.averaged.size + 1, np.float32))
        changes: dict[str, dict[str, Any]] = {
            "run": {"run": RUN + 1},
            "kind": {"kind": FrameKind.DIFFERENCE},
            "size": {"size": held.trained.size + 1},
        }
        frame = self.twins.frame(ticket, held, seq, update, **changes.get(what, {}))
        if what == "damaged":
            frame = frame[:-1] + bytes([frame[-1] ^ 1])
        if what == "short":
            frame = frame[:50]
        errors = {"damaged": ChecksumError, "run": WrongRunError}
        self.twins.refuses("Exchange", frame, errors.get(what, MalformedError))

    @rule()
    def save(self) -> None:
        self.twins.save()

    @rule(is_saved_first=st.booleans())
    def crash_and_recover(self, is_saved_first: bool) -> None:
        if is_saved_first or self.twins.snapshot is None:
            self.twins.save()
        self.twins.crash_and_recover()

    @invariant()
    def everything_that_can_be_seen_is_equal(self) -> None:
        self.twins.compare()


def draw_model(seed: int, size: int) -> Floats:
    """Draw multiples of 1/8, zeros of both signs among them."""
    return (np.random.default_rng(seed).integers(-8, 9, size) / -8).astype(np.float32)


def draw_update(held: Held, seed: int, count: int, amounts: Floats) -> Update:
    """Draw an update of some coordinates; every other time, of the first few."""
    rng = np.random.default_rng(seed)
    size = held.trained.size if seed % 2 else min(12, held.trained.size)
    indices = np.sort(rng.permutation(size)[:count])
    values = rng.choice(amounts, indices.size)
    if seed % 5 == 0:
        values = values * rng.random(indices.size, np.float32)
    tail = rng.choice(amounts, held.averaged.size)
    return Update(
        size=held.trained.size, indices=indices, values=values, tail=tail, cursor=b"%d" % seed
    )


@pytest.mark.parametrize("batch", range(BATCHES))
def test_any_history_shows_the_same_as_the_plain_model(batch: int) -> None:
    run_state_machine_as_test(
        hypothesis.seed(batch)(Histories),
        settings=hypothesis.settings(
            max_examples=HISTORIES,
            stateful_step_count=STEPS,
            deadline=None,
            report_multiple_bugs=False,
            phases=PHASES,
            suppress_health_check=list(hypothesis.HealthCheck),
        ),
    )
