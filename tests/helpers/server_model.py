"""What a parameter server is, in dictionaries and whole arrays: nothing is compiled, coded or kept.

`PlainServer` answers as `dgs.server.ParameterServer` must, from requests that are not bytes yet. It
keeps a dense replica per session, compares everything at each exchange, and remembers the whole
history of each worker where the server keeps what it needs of it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dgs.config import Selection, Values
from dgs.errors import (
    FencedError,
    MalformedError,
    ModelMismatchError,
    NonFiniteError,
    NotReadyError,
    SequenceError,
    TooLargeError,
    UnknownWorkerError,
)
from dgs.quantize import quantize
from dgs.select import Selector, make_selector
from dgs.space import ParameterSpace
from dgs.view import Slab

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
LARGEST = np.finfo(np.float32).max


@dataclass(frozen=True)
class Held:
    """What a member exchanges with a shard: positions there, and how many of each segment."""

    slabs: tuple[Slab, ...]
    trained: Ints
    sizes: tuple[int, ...]
    averaged: Ints


def held_of(space: ParameterSpace, slabs: Sequence[Slab], start: int, stop: int) -> Held:
    """Mark what the slabs cover of [start, stop); the tensors are too small to be cut."""
    owned = np.zeros(space.size, bool)
    bounds = space.offsets.tolist()
    for slab in slabs:
        box = tuple(slice(a, a + n) for a, n in zip(slab.offset, slab.shape, strict=True))
        tensor = slice(bounds[slab.tensor], bounds[slab.tensor + 1])
        owned[tensor].reshape(space.tensors[slab.tensor].shape)[box] = True
    sizes = tuple(
        int(owned[a : a + t.size].sum())
        for t, a in zip(space.tensors, bounds, strict=False)
        if not t.buffer and t.size and start <= a < stop
    )
    at = np.flatnonzero(owned)
    at = at[(start <= at) & (at < stop)]
    trains = at < space.num_parameters
    return Held(tuple(slabs), at[trains] - start, sizes, at[~trains] - start)


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A request to join that is well formed."""

    name: str
    incarnation: int
    member: int
    held: Held
    shard: tuple[int, int]
    density: float = 1.0
    values: Values = "float32"
    selection: Selection = "exact"
    dense_below: int = 0
    offers: bool = True
    takes_over: bool = False
    restores: bool = False
    resume: int = 0
    resume_seqs: range = range(1)


@dataclass
class PlainSession:
    """One member of one incarnation, with what it has of the model."""

    ask: Ask
    incarnation: int
    replica: Floats
    version: int
    points: dict[int, int]
    names: set[int]
    earlier: int
    selector: Selector
    unchanged: bool
    resumed: bool = False
    seq: int = 0
    reply: bytes = b""
    bytes_up: int = 0
    bytes_down: int = 0
    staleness: list[int] = field(default_factory=list)

    def can_resume(self, ask: Ask) -> bool:
        """Tell whether this is the session, at the exchange, that was saved."""
        at = ask.resume in self.names and self.seq in ask.resume_seqs
        return at and self.ask.held.slabs == ask.held.slabs

    def resume(self, ask: Ask) -> None:
        """Go on under a newer incarnation, with its settings for the differences to come."""
        old, self.ask = self.ask, replace(ask, resume=self.ask.resume)
        if (old.selection, old.dense_below) != (ask.selection, ask.dense_below):
            self.selector = selector_of(ask)
        self.incarnation = ask.incarnation
        self.names.add(ask.incarnation)
        self.points[ask.incarnation] = self.seq
        self.resumed = self.unchanged = True

    def advance(self, model: Floats) -> tuple[Ints, Floats]:
        """Select from ``model - replica``, bring the replica there, and return what to send."""
        now, ask = model[self.ask.held.trained], self.ask
        with np.errstate(over="ignore"):
            waiting = now - self.replica
        chosen, counts, start = [np.zeros(0, np.int64)], [], 0
        for unit, n in enumerate(ask.held.sizes):
            one = waiting[start : start + n]
            if ask.selection == "exact":
                at = largest(one, math.ceil(round(ask.density * n, 9)))
            else:
                at = self.selector.select(torch.from_numpy(one), unit, ask.density).numpy()
            chosen.append(at + start)
            counts.append(at.size)
            start += n
        where = np.concatenate(chosen)
        if ask.values == "float32":
            sent = self.replica[where] = now[where]
        else:
            clipped = np.clip(waiting[where], -LARGEST, LARGEST)
            sent = quantize(clipped, counts, ask.values).decoded
            self.replica[where] += sent
        return where, sent


def largest(values: Floats, k: int) -> Ints:
    """Return where the `k` largest magnitudes are; ties to the lower index, zeros left out."""
    order = np.argsort(-np.abs(values), kind="stable")[:k]
    return np.sort(order[values[order] != 0])


def selector_of(ask: Ask) -> Selector:
    """Make a selector that has seen nothing."""
    return make_selector(ask.selection, len(ask.held.sizes), ask.dense_below)


@dataclass
class PlainWorker:
    """A name: its number, its newest incarnation, the sessions of that one and of earlier ones."""

    number: int
    incarnation: int
    live: dict[int, PlainSession] = field(default_factory=dict)
    retired: dict[int, PlainSession] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Joined:
    """The answer to a request to join."""

    outcome: str
    number: int
    version: int
    initialiser: str
    unchanged: bool = False
    cursor: bytes = b""
    earlier: int = 0


@dataclass(frozen=True, kw_only=True)
class Update:
    """What a worker sends, of a part with as many trained coordinates."""

    size: int
    indices: Ints
    values: Floats
    tail: Floats
    cursor: bytes = b""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What it gets: what to change where, and the fields of the header."""

    indices: Ints
    values: Floats
    tail: Floats
    header: dict[str, Any]


@dataclass
class PlainServer:
    """One shard; the fields are the whole state."""

    shard: tuple[int, int]
    max_workers: int
    hash_interval: int
    model: Floats | None = None
    init: Floats | None = None
    version: int = 0
    is_fresh: bool = False
    asked: str = ""
    restoring: bool = False
    initialiser: str = ""
    numbered: int = 0
    refused: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    staleness: list[int] = field(default_factory=list)
    workers: dict[str, PlainWorker] = field(default_factory=dict)
    departed: dict[tuple[str, int], tuple[int, dict[int, int]]] = field(default_factory=dict)
    applied: dict[tuple[str, int], list[bytes]] = field(default_factory=dict)
    """The cursors of all updates ever applied, by worker and member."""

    def sessions(self) -> Iterator[tuple[PlainWorker, PlainSession]]:
        """Iterate over the live sessions."""
        return ((w, s) for w in self.workers.values() for s in w.live.values())

    def join(self, ask: Ask) -> Joined:
        """Open a session, go on with one, or ask for the model."""
        worker = self.workers.get(ask.name)
        left, _ = self.departed.get((ask.name, ask.member), (0, {}))
        if worker and ask.incarnation < worker.incarnation:
            raise FencedError
        if ask.incarnation <= left:
            raise UnknownWorkerError
        if self.model is not None and ask.shard != self.shard:
            raise ModelMismatchError
        if self.init is not None:
            self.model = self.init + np.float32(0)  # a zero has one form
            self.init, self.initialiser = None, ask.name
        if self.model is None or (ask.restores and self.is_fresh and self.version == 0):
            return self._appoint(ask)
        session = self._open(ask, self.model)
        return Joined(
            outcome="RESUMED" if session.resumed else "JOINED",
            number=self.workers[ask.name].number,
            version=self.version,
            initialiser=self.initialiser,
            unchanged=session.unchanged,
            cursor=(self.applied.get((ask.name, ask.member)) or [b""])[-1],
            earlier=session.earlier,
        )

    def _appoint(self, ask: Ask) -> Joined:
        if not ask.offers or (self.asked not in ("", ask.name) and not ask.takes_over):
            raise NotReadyError
        worker = self._enrol(ask)
        self.asked, self.restoring = ask.name, ask.restores
        if self.model is None:
            self.initialiser = ask.name
        return Joined(
            outcome="GIVE_MODEL",
            number=worker.number,
            version=self.version,
            initialiser=self.initialiser,
        )

    def _enrol(self, ask: Ask) -> PlainWorker:
        worker = self.workers.get(ask.name)
        if worker is None:
            if len(self.workers) == 2 * self.max_workers:
                raise TooLargeError
            worker = self.workers[ask.name] = PlainWorker(self.numbered, ask.incarnation)
            self.numbered += 1
        elif ask.incarnation > worker.incarnation:
            for member, s in worker.live.items():  # unless nobody can want it back
                if s.seq or s.ask.resume or member not in worker.retired:
                    worker.retired[member] = s
            worker.incarnation, worker.live = ask.incarnation, {}
        return worker

    def _open(self, ask: Ask, model: Floats) -> PlainSession:
        key = ask.name, ask.member
        known = self.workers.get(ask.name)
        current = known.live.get(ask.member) if known else None
        if current is None and len(list(self.sessions())) >= self.max_workers:
            raise TooLargeError
        if current is not None and current.incarnation == ask.incarnation:
            return current
        worker = self._enrol(ask)
        earlier = worker.retired.get(ask.member)
        if earlier and earlier.can_resume(ask):
            worker.live[ask.member] = worker.retired.pop(ask.member)
            earlier.resume(ask)
            return earlier
        points = {**self.departed.get(key, (0, {}))[1], **(earlier.points if earlier else {})}
        unchanged = points.get(ask.resume, -1) in ask.resume_seqs
        worker.live[ask.member] = session = PlainSession(
            ask,
            ask.incarnation,
            model[ask.held.trained],
            self.version,
            points={**(points if unchanged else {}), ask.incarnation: 0},
            names={ask.incarnation},
            earlier=len(self.applied.get(key, ())),
            selector=selector_of(ask),
            unchanged=unchanged,
        )
        return session

    def put_model(self, number: int, incarnation: int, model: Floats) -> None:
        """Take the model, unless there is one that counts; the sessions with it end."""
        name, worker = self._numbered(number)
        replaceable = self.is_fresh and self.version == 0 and self.asked == name
        if self.model is not None and not replaceable:
            return
        if incarnation != worker.incarnation:
            raise FencedError
        if not np.isfinite(model).all():
            raise NonFiniteError
        self.model = model + np.float32(0)
        restores = self.restoring and self.asked == name
        if restores or not self.restoring:
            self.asked = ""
        self.initialiser, self.is_fresh = name, not restores
        for w in self.workers.values():
            w.live, w.retired = {}, {}

    def session(self, number: int, member: int, incarnation: int) -> PlainSession:
        """Return a live session."""
        _, worker = self._numbered(number)
        if incarnation < worker.incarnation:
            raise FencedError
        if member not in worker.live or worker.live[member].incarnation != incarnation:
            raise UnknownWorkerError
        return worker.live[member]

    def pull(self, number: int, member: int, incarnation: int) -> PlainSession:
        """Return the session whose record is asked for."""
        if self.model is None:
            raise NotReadyError
        return self.session(number, member, incarnation)

    def _numbered(self, number: int) -> tuple[str, PlainWorker]:
        for name, worker in self.workers.items():
            if worker.number == number:
                return name, worker
        raise UnknownWorkerError

    def exchange(self, ticket: tuple[int, int, int], seq: int, update: Update) -> Answer | bytes:
        """Apply an update and return what is to be answered; of a repeated one, the very bytes."""
        session = self.session(*ticket)
        if seq == session.seq > 0:
            return session.reply
        if seq != session.seq + 1:
            raise SequenceError
        held = session.ask.held
        if (update.size, update.tail.size) != (held.trained.size, held.averaged.size):
            raise MalformedError
        assert self.model is not None
        where, before = held.trained[update.indices], self.model[held.averaged]
        with np.errstate(over="ignore", invalid="ignore"):
            mean = before + (update.tail - before) / np.float32(self._active())
            after = self.model[where] - update.values
        if not (np.isfinite(mean).all() and np.isfinite(after).all()):
            raise NonFiniteError
        self.model[where], self.model[held.averaged] = after, mean
        staleness = self.version - session.version
        self.version += 1
        session.version, session.seq = self.version, seq
        session.staleness.append(staleness)
        self.staleness.append(staleness)
        session.names, session.points = {session.incarnation}, {session.incarnation: seq}
        key = session.ask.name, session.ask.member
        self.applied.setdefault(key, []).append(update.cursor)
        self.departed.pop(key, None)
        self.workers[session.ask.name].retired.pop(session.ask.member, None)
        return self._answer(session, ticket, staleness)

    def _answer(
        self, session: PlainSession, ticket: tuple[int, int, int], staleness: int
    ) -> Answer:
        assert self.model is not None
        where, sent = session.advance(self.model)
        digest = hashlib.blake2b(session.replica.tobytes(), digest_size=8).digest()
        hashed = self.hash_interval and session.seq % self.hash_interval == 0
        number, member, incarnation = ticket
        header = {
            "values": session.ask.values,
            "replaces": session.ask.values == "float32",
            "worker_id": number,
            "member": member,
            "incarnation": incarnation,
            "seq": session.seq,
            "version": self.version,
            "size": session.replica.size,
            "nnz": where.size,
            "staleness": staleness,
            "hash": int.from_bytes(digest, "little") if hashed else None,
        }
        tail = self.model[session.ask.held.averaged]
        return Answer(indices=where, values=sent, tail=tail, header=header)

    def note(self, ticket: tuple[int, int, int], bytes_up: int, reply: bytes) -> None:
        """Keep the bytes of an exchange that was answered for the first time."""
        session = self.session(*ticket)
        session.reply = reply
        for counter in (session, self):
            counter.bytes_up += bytes_up
            counter.bytes_down += len(reply)

    def _active(self) -> int:
        """Count the workers of which one session was answered within 8 rounds of all."""
        last = [max(s.version for s in w.live.values()) for w in self.workers.values() if w.live]
        return sum(self.version - v <= 8 * len(last) for v in last) or 1

    def leave(self, number: int, member: int, incarnation: int) -> None:
        """End a session, if it is there; remember how it can be joined again."""
        try:
            name, worker = self._numbered(number)
        except UnknownWorkerError:
            return
        if incarnation < worker.incarnation:
            raise FencedError
        session, earlier = worker.live.pop(member, None), worker.retired.pop(member, None)
        if session:
            _, points = self.departed.get((name, member), (0, {}))
            points = {**points, **(earlier.points if earlier else {}), **session.points}
            self.departed[name, member] = incarnation, points
        if not worker.live and not worker.retired:
            del self.workers[name]

    def status(self) -> dict[str, Any]:
        """Describe the run and its sessions."""
        return {
            "ready": self.model is not None,
            "version": self.version,
            "initialiser": self.initialiser,
            "refused": self.refused,
            "bytes": (self.bytes_up, self.bytes_down),
            "staleness": percentiles(self.staleness),
            "workers": {
                (s.ask.name, s.ask.member): {
                    "incarnation": s.incarnation,
                    "exchanges": len(s.staleness),
                    "behind": self.version - s.version,
                    "bytes": (s.bytes_up, s.bytes_down),
                    "staleness": percentiles(s.staleness),
                }
                for _, s in self.sessions()
            },
        }


def percentiles(values: Sequence[int]) -> tuple[int, int]:
    """Return the smallest values with at least 50 % and 99 % at or below them."""
    ordered = sorted(values) or [0]
    at = [math.ceil(len(ordered) * percent / 100) - 1 for percent in (50, 99)]
    return ordered[at[0]], ordered[at[1]]
