"""One member of one worker, as a shard's server knows it: its record, its last reply, its past."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import numpy as np

from dgs._proto import parameter_server_pb2 as pb
from dgs.joining import Joining
from dgs.metrics import Histogram
from dgs.shard import Shard
from dgs.space import FloatArray, ParameterSpace
from dgs.tracker import Arrays, Record
from dgs.view import Part, Slab, View

__all__ = ["Departed", "Home", "Past", "Session", "Worker", "merged"]

MOST_NAMES = 16
"""Incarnations that are remembered of a session; each can resume it until it exchanges."""

_PLAIN = ("worker", "member", "incarnation", "version", "seq", "resumed", "unchanged", "claimed")
_COUNTS = ("exchanges", "bytes_up", "bytes_down")


class Past(NamedTuple):
    """What is told to a worker that joins anew: its last cursor, and how many updates it gave."""

    cursor: bytes = b""
    exchanges: int = 0


class Home(NamedTuple):
    """The shard that a session belongs to, and its range of the model's index space."""

    shard: Shard
    start: int
    stop: int


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
    cursor: bytes = b""
    """What came with the worker's last applied update, also of an earlier session."""
    earlier: int = 0
    """Updates that were applied in earlier sessions of this worker and member."""
    exchanges: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    staleness: Histogram = field(default_factory=Histogram)

    @classmethod
    def opened(
        cls,
        joining: Joining,
        model: FloatArray,
        version: int,
        points: Mapping[int, int],
        past: Past,
    ) -> Self:
        """Open a session whose record equals the model.

        Args:
            joining: who joins, and how replies are to be made.
            model: the shard's.
            version: the model's.
            points: what nothing was applied since, the saved state to resume among it; or empty.
            past: of the session that this one takes the place of.
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
            cursor=past.cursor,
            earlier=past.exchanges,
        )

    def is_at(self, joining: Joining) -> bool:
        """Tell whether this is the session to resume, at the exchange where its worker saved it."""
        return joining.resume in self.names and self.seq in joining.resume_seqs

    def resume(self, joining: Joining) -> None:
        """Go on under a newer incarnation, with the settings that it joins with."""
        self.incarnation = joining.incarnation
        self.names = (*self.names, self.incarnation)[-MOST_NAMES:]
        self.points = merged(self.points, {self.incarnation: self.seq})
        self.resumed = self.unchanged = True
        self.record.configure(
            density=joining.download_density,
            selection=joining.selection,
            dense_below=joining.dense_below,
            values=joining.values,
        )

    def record_exchange(
        self, seq: int, staleness: int, bytes_up: int, reply: bytes, cursor: bytes
    ) -> None:
        """Note an applied exchange and keep its reply."""
        self.seq, self.reply, self.cursor = seq, reply, cursor
        self.names, self.points = (self.incarnation,), {self.incarnation: seq}
        self.exchanges += 1
        self.bytes_up += bytes_up
        self.bytes_down += len(reply)
        self.staleness.add(staleness)

    @property
    def past(self) -> Past:
        """What a session that takes this one's place is told."""
        return Past(self.cursor, self.earlier + self.exchanges)

    def facts(self) -> dict[str, Any]:
        """Return what `restored` needs besides `lend`: numbers, strings and lists."""
        view = self.part.view
        whole = view == View.whole(view.space)
        return {
            **{name: getattr(self, name) for name in (*_PLAIN, *_COUNTS, "earlier")},
            "names": list(self.names),
            "points": list(self.points.items()),
            "cursor": _text(self.cursor),
            "staleness": self.staleness.items(),
            "slabs": None if whole else [[s.tensor, s.offset, s.shape] for s in view.slabs],
            "record": self.record.facts(),
        }

    def lend(self) -> Callable[[], Arrays]:
        """Return a function that computes the session's arrays as they are now; see `Record`."""
        record, reply = self.record.lend(), np.frombuffer(self.reply, np.uint8)
        return lambda: {**record(), "reply": reply}

    @classmethod
    def restored(
        cls, facts: Mapping[str, Any], arrays: Mapping[str, Any], space: ParameterSpace, home: Home
    ) -> Self:
        """Rebuild a session that was saved together with its shard."""
        slabs, (shard, start, stop) = facts["slabs"], home
        view = View.whole(space)
        if slabs is not None:
            view = View(space, tuple(Slab(t, tuple(o), tuple(n)) for t, o, n in slabs))
        part = Part(view, start, stop)
        part.prepare()
        return cls(
            **{name: facts[name] for name in (*_PLAIN, *_COUNTS, "earlier")},
            part=part,
            record=Record.restored(part, shard, facts["record"], arrays),
            reply=arrays["reply"].tobytes(),
            names=tuple(facts["names"]),
            points=_points(facts),
            cursor=b64decode(facts["cursor"]),
            staleness=Histogram.of(facts["staleness"]),
        )

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
class Departed:
    """What is remembered of a session that left: its incarnation, and see `Session.points`."""

    incarnation: int
    points: dict[int, int]
    past: Past

    def facts(self) -> dict[str, Any]:
        """Return what `restored` needs."""
        past = [_text(self.past.cursor), self.past.exchanges]
        return {"incarnation": self.incarnation, "points": list(self.points.items()), "past": past}

    @classmethod
    def restored(cls, facts: Mapping[str, Any]) -> Self:
        """Rebuild what was saved."""
        cursor, exchanges = facts["past"]
        return cls(facts["incarnation"], _points(facts), Past(b64decode(cursor), exchanges))


def merged(older: Mapping[int, int], newer: Mapping[int, int]) -> dict[int, int]:
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


def _text(data: bytes) -> str:
    return b64encode(data).decode("ascii")


def _points(facts: Mapping[str, Any]) -> dict[int, int]:
    return dict(facts["points"])
