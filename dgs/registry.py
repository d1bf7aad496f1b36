"""Who takes part in a run: workers, their sessions, and which of them are still valid.

A worker is known by its name and by an incarnation that grows with every start; the newest one
fences all older ones. Each of its members has one session per shard. The session that a newer
incarnation replaces is kept until the newer one has made its first exchange: a process that comes
back with its own saved state can then go on exactly where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Self

from dgs.agreement import Agreement
from dgs.errors import (
    FencedError,
    NotReadyError,
    TooLargeError,
    UnknownWorkerError,
)
from dgs.joining import Joining
from dgs.session import Departed, Home, Past, Session, Worker, merged
from dgs.shard import Shard
from dgs.tracker import Arrays

__all__ = ["Opened", "Registry"]

ACTIVE_ROUNDS = 8
"""A worker counts as active until every worker could have exchanged this often since its last."""

DEPARTED = 4096
"""Sessions that are remembered after they left, the latest; some hundred bytes each."""


class Opened(NamedTuple):
    """The session that a request to join gets.

    Attributes:
        worker: whose it is.
        session: opened, continued, or there already.
        is_new: False where the request was a repeated one.
    """

    worker: Worker
    session: Session
    is_new: bool = True


def session_key(number: int, kind: str, member: int) -> str:
    """Name a session's arrays: by its worker's number, ``live`` or ``retired``, and its member."""
    return f"session-{number}-{kind}-{member}"


class Registry:
    """The workers of a run, and the model and shard that they agreed on.

    Args:
        max_workers: sessions admitted at a time.
        agreed: the model, of which the worker that is asked for it tells the tensors.
    """

    def __init__(self, max_workers: int, agreed: Agreement) -> None:
        """Start with nobody."""
        self.max_workers = max_workers
        self._agreed = agreed
        self._workers: dict[str, Worker] = {}
        self._by_number: dict[int, Worker] = {}
        self._numbered = 0
        self._departed: dict[tuple[str, int], Departed] = {}
        self._asked = ""  # the worker that was asked for the model, until it gives it
        self._asked_to_restore = False

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

    def all_sessions(self) -> Iterator[Session]:
        """Iterate over the live sessions and those that may be resumed."""
        for w in self._workers.values():
            yield from (*w.live.values(), *w.retired.values())

    def places(self) -> Iterator[tuple[tuple[int, int, int], int]]:
        """Iterate over what `close` can free, each with a number that grows with its exchanges."""
        for w in self._workers.values():
            for member in {*w.live, *w.retired} or {0}:
                session = w.live.get(member)
                yield (w.number, member, w.incarnation), session.exchanges if session else -1

    def check_incarnation(self, joining: Joining) -> None:
        """Hold a join request to newer incarnations of its worker, and to its own leaving.

        Raises:
            FencedError: a newer one has joined.
            UnknownWorkerError: this one has left.
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
            raise UnknownWorkerError(
                f"worker {joining.worker!r} has left since this request was made (incarnation "
                f"{left}, this one is {joining.incarnation}), or its lease has run out; join "
                "again, and if that does not help, check the clock of this machine"
            )

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
            self._agreed.adopt(joining)
        return worker

    def is_asked(self, worker: Worker) -> bool:
        """Tell whether a worker was asked for the model and has not given it yet."""
        return self._asked == worker.name

    def take_given(self, worker: Worker) -> bool:
        """Note who gave the model; sessions with an earlier model end, to be opened anew.

        Returns:
            Whether it was asked to restore one that was trained before.
        """
        restores = self._asked_to_restore and self.is_asked(worker)
        if restores or not self._asked_to_restore:  # else: the one with the saved model is to come
            self._asked = ""
        self._agreed.initialiser = worker.name
        for w in self._workers.values():
            w.live, w.retired = {}, {}
        return restores

    def open(self, joining: Joining, shard: Shard) -> Opened:
        """Open a session whose record equals the model, or continue an earlier one.

        Raises:
            TooLargeError: as many sessions as admitted are open.
        """
        known = self._workers.get(joining.worker)
        current = known.live.get(joining.member) if known else None
        if known and current and current.incarnation == joining.incarnation:
            return Opened(known, current, is_new=False)
        if current is None and sum(1 for _ in self.sessions()) >= self.max_workers:
            raise TooLargeError(
                f"{self.max_workers} sessions are open, as many as this server admits "
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
            return Opened(worker, saved)
        points, past = self._points(joining, earlier), self._past(joining, earlier)
        session = Session.opened(joining, shard.model, shard.version, points, past)
        session.record.follow(shard)
        worker.live[joining.member] = session
        return Opened(worker, session)

    def _past(self, joining: Joining, earlier: Session | None) -> Past:
        """Return what the worker is told of its earlier sessions."""
        if earlier is not None:
            return earlier.past
        departed = self._departed.get((joining.worker, joining.member))
        return departed.past if departed else Past()

    def _points(self, joining: Joining, earlier: Session | None) -> dict[int, int]:
        """Return what nothing was applied since, if the saved state to resume is among it."""
        departed = self._departed.get((joining.worker, joining.member))
        known = merged(departed.points if departed else {}, earlier.points if earlier else {})
        return known if known.get(joining.resume, -1) in joining.resume_seqs else {}

    def _enrol(self, joining: Joining) -> Worker:
        """Find or number the worker; a newer incarnation retires its sessions."""
        worker = self._workers.get(joining.worker)
        if worker is None:
            if len(self._workers) >= 2 * self.max_workers:
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

    def forget(self, number: int, member: int) -> None:
        """Forget a member's sessions, as if they had never been; its worker must join again."""
        worker = self._by_number.get(number)
        if worker is not None:
            worker.live.pop(member, None)
            worker.retired.pop(member, None)
            self._departed.pop((worker.name, member), None)

    def settle(self, session: Session) -> None:
        """Drop what came before this session: it has exchanged, so nothing else will be resumed."""
        self._workers[session.worker].retired.pop(session.member, None)
        self._departed.pop((session.worker, session.member), None)

    def close(self, number: int, member: int, incarnation: int) -> bool:
        """Free a session's record; one that is gone already is no error.

        Returns:
            Whether there was anything to free.

        Raises:
            FencedError: a newer incarnation has replaced it.
        """
        worker = self._by_number.get(number)
        if worker is None:
            return False
        if incarnation < worker.incarnation:
            raise FencedError(f"a newer process has joined as worker {worker.name!r}")
        if incarnation > worker.incarnation:
            return False
        session = worker.live.pop(member, None)
        earlier = worker.retired.pop(member, None)
        if session is not None:
            before = self._departed.pop((worker.name, member), None)  # the newest stands last
            points = merged(before.points if before else {}, earlier.points if earlier else {})
            points = merged(points, session.points)
            departed = Departed(session.incarnation, points, session.past)
            self._departed[worker.name, member] = departed
            if len(self._departed) > DEPARTED:
                del self._departed[next(iter(self._departed))]
        if not worker.live and not worker.retired:
            del self._workers[worker.name], self._by_number[worker.number]
            return True
        return session is not None or earlier is not None

    def facts(self) -> dict[str, Any]:
        """Return what `restored` needs besides the sessions' arrays."""
        return {
            "numbered": self._numbered,
            "asked": [self._asked, self._asked_to_restore],
            "departed": [[*key, departed.facts()] for key, departed in self._departed.items()],
            "workers": [
                {
                    "name": w.name,
                    "number": w.number,
                    "incarnation": w.incarnation,
                    "live": [s.facts() for s in w.live.values()],
                    "retired": [s.facts() for s in w.retired.values()],
                }
                for w in self._workers.values()
            ],
        }

    def lend(self) -> dict[str, Callable[[], Arrays]]:
        """Return, per session, a function that computes its arrays as they are now."""
        return {
            session_key(w.number, kind, member): session.lend()
            for w in self._workers.values()
            for kind, sessions in (("live", w.live), ("retired", w.retired))
            for member, session in sessions.items()
        }

    @classmethod
    def restored(
        cls,
        max_workers: int,
        facts: Mapping[str, Any],
        agreed: Agreement,
        shard: Shard | None,
        arrays: Mapping[str, Arrays],
    ) -> Self:
        """Rebuild a registry that was saved together with its shard."""
        registry = cls(max_workers, agreed)
        registry._numbered = facts["numbered"]
        registry._asked, registry._asked_to_restore = facts["asked"]
        for name, member, departed in facts["departed"]:
            registry._departed[name, member] = Departed.restored(departed)
        for saved in facts["workers"]:
            worker = Worker(saved["name"], saved["number"], saved["incarnation"])
            registry._workers[worker.name] = registry._by_number[worker.number] = worker
            for kind, sessions in (("live", worker.live), ("retired", worker.retired)):
                for one in saved[kind]:
                    assert shard is not None
                    found = arrays[session_key(worker.number, kind, one["member"])]
                    home = Home(shard, *agreed.shard_range)
                    session = Session.restored(one, found, agreed.require_space(), home)
                    sessions[session.member] = session
        return registry
