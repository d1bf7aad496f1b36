"""One worker process: the real worker and the real client, driven by events instead of threads."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import numpy as np
import torch

from dgs._proto import parameter_server_pb2 as pb
from dgs.client import Client, Joined, Resume, settled
from dgs.errors import (
    ChecksumError,
    FencedError,
    InternalError,
    NotReadyError,
    SequenceError,
    ServerUnavailableError,
    UnknownWorkerError,
)
from dgs.frame import decode_frame
from dgs.worker import Worker
from experiments.faults.simulation.checks import Violation
from experiments.faults.simulation.network import Outcome
from experiments.faults.simulation.script import Asked, Call, Inline, Script, ScriptedTransport
from experiments.faults.simulation.site import FIRST_INCARNATION, Site
from experiments.faults.simulation.stage import Stage

__all__ = ["Saved", "WorkerProcess"]

_MANY = 1 << 30
_ATTEMPT_S = 0.3
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0
_PATIENCE = 7
"""Attempts at a server without a model, until this worker offers its own."""

_AGAIN = (ServerUnavailableError, ChecksumError, InternalError)
_REPLIES_WITH_CHECKSUM = ("Exchange", "PullModel")


class Saved(NamedTuple):
    """What a worker's checkpoint holds."""

    state: dict[str, Any]
    numbers: list[int]


_Course = Generator[float | list[Call], Any, None]


class WorkerProcess:
    """Join, exchange for ever, and join again when told to; see `dgs.exchange.Exchanger`.

    Args:
        name: the worker's name; several processes may have it, one after the other or at once.
        sites: the servers.
        stage: what the history shares.
        produced: progress made so far under this name, per coordinate.
        saved: the checkpoint to go on from.
        ends: called at some time if the process is to die.

    Attributes:
        answered: exchanges whose replies were taken.
        goal: how many it makes.
        is_alive: whether it still runs.
        is_newest: whether no other process was started under its name since.
        saved: its last checkpoint.
        yields: tells whether this process may be shut out, because another one took its place.
    """

    def __init__(
        self,
        name: str,
        sites: list[Site],
        stage: Stage,
        produced: np.ndarray[Any, np.dtype[np.float64]],
        saved: Saved | None = None,
        ends: Callable[[WorkerProcess], None] = lambda process: None,
    ) -> None:
        self.name = name
        self._sites = sites
        self._stage = stage
        self._script = Script()
        config = stage.weather.config
        transports = [ScriptedTransport(i, self._script) for i in range(len(sites))]
        self._client = Client(transports, config, name, [stage.view])
        self._client._pool = Inline()  # type: ignore[assignment]
        self._worker = Worker(stage.view, len(sites), config)
        self._numbers: list[int] = []
        self._outcomes: list[Outcome | None] = []
        self._batch = 0
        self.answered = 0
        self.goal = _MANY
        self.is_alive = self.is_newest = True
        self.saved = saved
        self._produced = produced
        self._ends = ends
        self.yields: Callable[[WorkerProcess], bool] = lambda process: False
        self._flips = stage.weather.flip > 0
        self._course = self._run(saved)
        self._resume(None)

    @property
    def lags(self) -> bool:
        """Whether it still has to get answers."""
        return self.is_alive and self.is_newest and self.answered < self.goal

    def stop(self) -> None:
        """End the process, at once."""
        self.is_alive = False

    # ---- events

    def _resume(self, value: Any) -> None:
        """Go on with the course until it waits again."""
        if not self.is_alive:
            return
        try:
            wanted = self._course.send(value)
        except StopIteration:
            return
        if isinstance(wanted, float):
            self._stage.clock.after(wanted, lambda: self._resume(None))
            return
        self._batch += 1
        self._outcomes = [None] * len(wanted)
        for place, call in enumerate(wanted):
            self._attempt(self._batch, place, call, 1)

    def _attempt(self, batch: int, place: int, call: Call, count: int) -> None:
        """Send a request, and send it again if no answer comes."""
        if not self.is_alive or batch != self._batch or self._outcomes[place] is not None:
            return
        over = [False]

        def answered(outcome: Outcome) -> None:
            if not over[0] and self.is_alive and batch == self._batch:
                over[0] = True
                self._take(batch, place, call, count, outcome)

        def timed_out() -> None:
            if not over[0]:
                over[0] = True
                self._attempt(batch, place, call, count + 1)

        self._stage.network.call(self._sites[call.shard], call.method, call.request, answered)
        self._stage.clock.after(_ATTEMPT_S, timed_out)

    def _take(self, batch: int, place: int, call: Call, count: int, outcome: Outcome) -> None:
        """Keep an answer, or ask again."""
        if self._flips and isinstance(outcome, bytes) and call.method in _REPLIES_WITH_CHECKSUM:
            try:
                decode_frame(outcome)
            except ChecksumError as damaged:
                outcome = damaged
        if isinstance(outcome, NotReadyError) and count >= _PATIENCE:
            error = ServerUnavailableError("the connect budget is spent")
            error.__cause__ = outcome
            outcome = error
        elif isinstance(outcome, (*_AGAIN, NotReadyError)):
            pause_s = min(_FIRST_PAUSE_S * 2**count, _LONGEST_PAUSE_S)
            again = lambda: self._attempt(batch, place, call, count + 1)  # noqa: E731
            self._stage.clock.after(pause_s * (0.5 + 0.5 * self._stage.rng.random()), again)
            return
        self._outcomes[place] = outcome
        if all(o is not None for o in self._outcomes):
            self._resume(self._outcomes)

    # ---- the course

    def _run(self, saved: Saved | None) -> _Course:
        """Do what a training process does."""
        try:
            yield from self._enter()
            if saved is not None:
                yield from self._restore(saved)
            while self.answered < self.goal:
                yield self._think()
                self._collect()
                if self._stage.rng.random() < self._stage.weather.worker_crash:
                    delay_s = self._stage.soon(3 * self._stage.weather.delay_s)
                    self._stage.clock.after(delay_s, lambda: self._ends(self))
                self._save()
                yield from self._exchange()
                self._save()
        except (FencedError, UnknownWorkerError) as error:
            if self.is_newest and not self.yields(self):
                raise Violation(f"the only worker {self.name} was shut out: {error}") from error
            self._stage.trace.add("shut out", self.name)
            self.is_alive = False

    def _think(self) -> float:
        weather, rng = self._stage.weather, self._stage.rng
        if rng.random() < 0.02 and not weather.is_calm:
            return 3.0  # stopped for a while
        return self._stage.soon(weather.think_s)

    def _enter(self) -> _Course:
        """Open sessions and start from the servers' model."""
        joined: Joined = yield from self._join(self._first_model, None)
        self._begin(joined)

    def _was_evicted(self) -> bool:
        return any(self.name in site.evicted for site in self._sites)

    def _begin(self, joined: Joined) -> None:
        assert joined.models is not None
        self._worker.join(joined.tickets, joined.models)
        for shard, ticket in enumerate(joined.tickets):
            self._stage.ledger.check_opened(shard, self.name, ticket.incarnation, self._base(shard))
        self._stage.trace.add("joined", self.name, _name(joined))

    def _join(
        self, give_model: Callable[[], Any], resume: list[Resume] | None
    ) -> Generator[float | list[Call], Any, Joined]:
        """Run the client's join until it has all its replies."""
        while True:
            now = FIRST_INCARNATION + int(self._stage.clock.now * 1e9)
            before = max(now, self._client._incarnation)
            self._script.replies = []
            try:
                joins = self._ask_on(before, lambda: self._client.join(give_model, resume))
                return (yield from joins)
            except (FencedError, UnknownWorkerError):
                if not (self.is_newest and self._was_evicted()):
                    raise
                self._stage.trace.add("evicted, joining", self.name)

    def _ask_on(
        self, before: int, join: Callable[[], Joined]
    ) -> Generator[float | list[Call], Any, Joined]:
        """Run a join anew with every reply that comes."""
        while True:
            self._client._incarnation = before
            self._script.rewind()
            try:
                return join()
            except Asked as asked:
                outcomes = yield [asked.call]
                self._script.replies.append(outcomes[0])

    def _restore(self, saved: Saved) -> _Course:
        """Go on from a checkpoint, with its session if the servers still have that."""
        state = saved.state
        in_flight = bool(state["in_flight"])
        seq = state["sequence"] - in_flight
        sessions = [
            Resume(incarnation=i, seq=seq, in_flight=in_flight) for i in state["incarnations"]
        ]
        joined: Joined = yield from self._join(lambda: self._worker.saved_model(state), sessions)
        self._worker.load_velocity(state)
        if joined.models is not None:
            gone = [i for i, same in enumerate(joined.unchanged) if not same]
            self._worker.forget_velocity(gone)
            self._begin(joined)
            return
        self._worker.load_state(state)
        self._worker.dialog.resume(joined.tickets)
        self._stage.tally.worker_resumes += 1
        self._stage.trace.add("resumed", self.name, _name(joined))
        if self._worker.dialog.pending is not None:
            self._note_frames(saved.numbers)
            yield from self._exchange()

    def _collect(self) -> None:
        """Make an update of some progress."""
        stage, worker, rng = self._stage, self._worker, self._stage.rng
        size = worker.base.numel()
        if stage.weather.exact:  # positive, and without rounding
            progress = [rng.randrange(1, 64) / 64 for _ in range(size)]
        else:
            progress = [rng.gauss(0.0, 1.0) for _ in range(size)]
        flat = torch.from_numpy(np.array(progress, np.float32))
        self._produced += progress
        zeros = torch.zeros(size)
        for i in range(len(worker.buffers)):
            worker.buffers[i] = rng.gauss(0.0, 1.0)
        worker.collect(lambda unit: (flat[worker.ranges[unit]], zeros[worker.ranges[unit]]))
        self._note_frames([stage.ledger.number() for _ in self._sites])

    def _note_frames(self, numbers: list[int]) -> None:
        """Write down the frames that are on their way from now on."""
        self._numbers = numbers
        assert self._worker.dialog.pending is not None
        for shard, frame in enumerate(self._worker.dialog.pending):
            self._stage.ledger.note_made(self.name, shard, frame, numbers[shard])

    def _exchange(self) -> _Course:
        """Send the pending update until it is answered."""
        frames = self._worker.dialog.pending
        assert frames is not None
        outcomes = yield [Call(i, "Exchange", frame) for i, frame in enumerate(frames)]
        try:
            replies = settled(outcomes)
        except UnknownWorkerError:
            if not (self.is_newest and self._was_evicted()):
                raise
            self._stage.tally.rejoins += 1
            self._stage.trace.add("rejoins", self.name)
            yield from self._enter()
            return
        except SequenceError as error:
            raise Violation(f"the numbers of {self.name} were lost: {error}") from error
        if self._worker.absorb(replies).diverged:
            raise Violation(f"the hash of {self.name}'s base is not its replica's")
        for shard in range(len(self._sites)):
            self._stage.ledger.check_base(self._numbers[shard], self._base(shard))
        self.answered += 1
        self._stage.tally.acknowledged += 1

    def _base(self, shard: int) -> bytes:
        return self._worker.base[self._worker.parts[shard].local].numpy().tobytes()

    def _save(self) -> None:
        weather = self._stage.weather
        if weather.worker_crash and self._stage.rng.random() < weather.keeps_state / 2:
            self.saved = Saved(self._worker.state(), list(self._numbers))

    def _first_model(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Return the model that a worker begins with: the same for all."""
        return (np.arange(self._stage.view.size) % 7 - 3).astype(np.float32) / np.float32(4)

    def leave(self) -> None:
        """Leave the run; the process ends, its last words are on their way."""
        for shard, ticket in enumerate(self._worker.dialog.tickets):
            request = pb.LeaveRequest(
                run=ticket.run,
                worker_id=ticket.worker_id,
                member=ticket.member,
                incarnation=ticket.incarnation,
            )
            message = request.SerializeToString()
            self._stage.network.call(self._sites[shard], "Leave", message, lambda _: None)
        self.is_alive = False


def _name(joined: Joined) -> int:
    """Return what a trace calls an incarnation."""
    return joined.tickets[0].incarnation - FIRST_INCARNATION
