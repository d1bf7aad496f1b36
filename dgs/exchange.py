"""The rounds of one worker: progress out, difference in, parameters set to where to go on.

An `Exchanger` joins what the other modules keep apart: the user's tensors (`Binding`), the
exchange's arithmetic (`Worker`) and the servers (`Client`). It knows nothing of optimizers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dgs.binding import Binding
from dgs.client import Client, Joined, Outgoing, Resume, settled
from dgs.config import WorkerConfig
from dgs.errors import (
    ConfigError,
    DgsError,
    NonFiniteError,
    SequenceError,
    ServerUnavailableError,
    UnknownWorkerError,
)
from dgs.frame import MAX_CURSOR_BYTES
from dgs.metrics import Histogram, Stats
from dgs.sparsify import Rounds
from dgs.transport.base import Transport
from dgs.view import View
from dgs.worker import Answer, Worker

__all__ = ["Exchanger"]

logger = logging.getLogger("dgs.optimizer")

COUNTS_SAVED = ("steps", "exchanges")


class Exchanger:
    """Carry out exchanges, waiting for each or overlapping it with the next round.

    A round starts from `start`: the base, or (compensated, overlapped) ahead of it. At its end the
    progress is ``start - local``. While an exchange is in flight, `start` is not a function of base
    and velocity any more, so overlapping keeps it.

    Args:
        binding: the user's tensors; set to the server's model at once.
        transports: one per shard.
        config: rule, codes, budgets.
        name: the worker's name.

    Raises:
        ServerUnavailableError: a server was not reached within the connect budget.
        ModelMismatchError: the servers hold another model.
    """

    def __init__(
        self, binding: Binding, transports: Sequence[Transport], config: WorkerConfig, name: str
    ) -> None:
        """Join the run."""
        view = View.whole(binding.space)
        self.stats = Stats()
        self._staleness = Histogram()
        self._config = config
        self._binding = binding
        self._client = Client(transports, config, name, [view])
        self._worker = Worker(view, len(transports), config, binding.device)
        self._start = torch.zeros_like(self._worker.base) if config.overlap else None
        self._outgoing: Outgoing | None = None
        try:
            joined = self._join()
        except BaseException:
            self._client.close(leave=False)
            raise
        self.stats.replaced = joined.earlier

    @property
    def name(self) -> str:
        """The worker's name."""
        return self._client.name

    @property
    def cursor(self) -> bytes:
        """What travels with the next update; see `DistributedOptimizer.cursor`."""
        return self._worker.dialog.cursor

    @cursor.setter
    def cursor(self, value: bytes) -> None:
        _check_cursor(value)
        self._worker.dialog.cursor = value

    @property
    def in_flight(self) -> bool:
        """Whether an exchange has been begun, but not finished."""
        return self._worker.dialog.pending is not None

    def finish(self) -> None:
        """Finish the exchange that is in flight, if one is.

        Raises:
            ServerUnavailableError: the server does not answer.
        """
        if self.in_flight:
            self._finish()
            if self._start is None:
                self._restart()

    def begin_step(self) -> None:
        """Finish an exchange whose server did not answer last time, before the next step.

        Raises:
            ServerUnavailableError: it still does not.
        """
        if self.stats.replaced and not self.stats.steps:  # and so did not go on with its session
            _tell_what_was_lost(self.name, self.stats.replaced)
        if self._start is None:
            cursor = self.cursor  # the user has set it for the step to come
            self.finish()
            self.cursor = cursor

    def end_round(self, save: Callable[[], None] | None = None) -> None:
        """Send what the round changed, take the difference, and start the next round.

        Args:
            save: called once the update has been made, before any of it is sent. What `state`
                returns then goes on bit for bit, whether or not the servers get the update.

        Raises:
            NonFiniteError: a parameter or buffer is NaN or infinite. Nothing was sent, the
                parameters are back where the round started, and the refusal is counted. Or a
                server refused the update, because it overflows the model.
            ServerUnavailableError: no answer within the budget; `begin_step` tries again.
        """
        try:
            self._binding.check_finite()
        except NonFiniteError:
            self._refuse()
            raise
        if self._start is None:
            self._worker.buffers[:] = self._binding.read_buffers()
            held = self._collect(lambda i: (self._worker.start(i), self._local(i)), save)
            self._save_and_send(held, save)
            self._finish()
            self._restart()
        else:
            held = self._overlap(self._start, save)
            self._restart()
            self._save_and_send(held, save)

    def _overlap(self, start: Tensor, save: Callable[[], None] | None) -> Outgoing:
        """Land the last exchange, send the next, and go on from ahead of the base."""
        buffers = self._binding.read_buffers()
        self.finish()
        averaged = self._worker.buffers.copy() if self.stats.exchanges else buffers
        self._worker.buffers[:] = buffers
        held = self._collect(lambda i: (start[self._worker.ranges[i]], self._local(i)), save)
        for unit, part in enumerate(self._worker.ranges):
            start[part] -= self._local(unit)
        self._worker.start_in_flight(start)
        self._worker.buffers[:] = averaged
        return held

    def _collect(self, rounds: Rounds, save: Callable[[], None] | None) -> Outgoing:
        """Make the update of a round and put it on its way; or hold it, if something is to save."""
        outgoing = self._client.begin_exchange(at_once=self._start is not None)
        try:
            self._worker.collect(rounds, _keep if save else outgoing.send)
        except NonFiniteError:
            self._worker.drop_non_finite()
            self._refuse()
            raise
        self._outgoing = None if save else outgoing
        return outgoing

    def _save_and_send(self, held: Outgoing, save: Callable[[], None] | None) -> None:
        """Let the state be saved, and put on its way what was held until then."""
        if save is None:
            return
        save()
        for shard, frame in enumerate(self._worker.dialog.pending or ()):
            held.send(shard, frame)
        self._outgoing = held

    def _local(self, unit: int) -> Tensor:
        return self._binding.local(unit).to(self._worker.base.device)

    def _finish(self) -> None:
        """Wait for the exchange that is pending, and take its difference."""
        pending = self._worker.dialog.pending
        assert pending is not None
        try:
            outgoing, self._outgoing = self._outgoing, None
            outcomes = outgoing.wait() if outgoing else self._client.try_exchange(pending)
            refused = {i: e for i, e in enumerate(outcomes) if isinstance(e, NonFiniteError)}
            if refused:
                self.stats.refused += 1
                outcomes = self._client.try_exchange(self._worker.blank(refused))
            replies = settled(outcomes)
        except (SequenceError, UnknownWorkerError) as e:  # a server has dropped the session
            self.stats.rejoins += 1
            _tell_of_loss(self.name, e)
            self._join()
            return
        finally:
            _count_bytes(self.stats, self._client)
        answer = self._worker.absorb(replies)
        _count_exchange(self.stats, self._staleness, answer)
        if answer.diverged:
            self.stats.resyncs += 1
            _tell_of_defect(self.name)
            self._join()
        if refused:
            self._restart()
            raise next(iter(refused.values()))

    def _restart(self) -> None:
        """Set the user's tensors to where the next round starts."""
        for unit, part in enumerate(self._worker.ranges):
            start = self._worker.start(unit) if self._start is None else self._start[part]
            self._binding.write(unit, start)
        self._binding.write_buffers(self._worker.buffers)

    def _refuse(self) -> None:
        self.stats.refused += 1
        self._restart()

    def _join(self) -> Joined:
        """Open sessions and start from the servers' model, or give them this worker's."""
        joined = self._client.join(self._binding.read_model)
        _count_bytes(self.stats, self._client)
        self._begin(joined)
        return joined

    def _begin(self, joined: Joined) -> None:
        """Start from the records of fresh sessions."""
        assert joined.models is not None
        self._worker.join(joined.tickets, joined.models)
        if joined.earlier:  # otherwise they do not know this worker, and what it knows stands
            self.cursor = joined.cursor
        if self._start is not None:
            for unit, part in enumerate(self._worker.ranges):
                self._start[part] = self._worker.start(unit)
        self._restart()

    def pull_model(self) -> dict[str, Tensor]:
        """Fetch the servers' model; float32 on the CPU."""
        model = {n: torch.from_numpy(v) for n, v in self._client.pull_model().items()}
        _count_bytes(self.stats, self._client)
        return model

    def state(self) -> dict[str, Any]:
        """Return everything that later exchanges depend on, as copies.

        Waits for an exchange in flight; if its server does not answer, the state holds the update,
        to be sent again.
        """
        if self._outgoing is not None:
            try:
                self.finish()
            except ServerUnavailableError as e:
                logger.warning("saved with an exchange in flight: %s", e)
        return {
            "worker": self.name,
            "cursor": torch.tensor(list(self.cursor), dtype=torch.uint8, device="cpu"),
            "worker_state": self._worker.state(),
            **self._binding.state(),
            "start": None if self._start is None else self._start.clone(),
            **{name: getattr(self.stats, name) for name in COUNTS_SAVED},
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Check that a saved state fits.

        Raises:
            ConfigError: it is of another model, rule, number of shards or setting of overlap.
        """
        _check_cursor(bytes(state["cursor"].tolist()))
        if (state["start"] is None) != (self._start is None):
            raise ConfigError("the state was saved with another setting of overlap")
        self._worker.check_state(state["worker_state"])

    def load_state(self, state: dict[str, Any], *, rename: bool) -> bool:
        """Go on from a saved, checked state.

        Args:
            state: from `state`.
            rename: take the saved worker's name, where this one's was made up.

        Returns:
            Whether the session goes on bit for bit. If not, the base is the servers' model: the
            saved one where they had trained nothing yet. The saved velocity is kept unless some
            of it may have been applied since.
        """
        if rename:
            self._client.rename(state["worker"])
        if self.name != state["worker"]:
            _tell_of_stranger(self.name, state["worker"])
            return False
        saved = state["worker_state"]
        self.cursor = bytes(state["cursor"].tolist())
        self.stats.steps, self.stats.exchanges = state["steps"], state["exchanges"]
        tickets = self._worker.dialog.tickets
        is_new = [run != t.run for run, t in zip(saved["runs"], tickets, strict=True)]
        joined = self._client.join(
            lambda: self._worker.saved_model(saved), _sessions_of(saved), restore=is_new
        )
        _count_bytes(self.stats, self._client)
        self._worker.load_velocity(saved)
        if joined.models is None:
            self._go_on(state, joined)
            self.stats.replaced = 0
            return True
        ahead = _ahead(is_new, joined.unchanged)
        self._worker.forget_velocity(ahead)
        self._begin(joined)
        self.stats.rejoins += 1
        _tell_of_rejoin(self.name, is_new, len(ahead), joined)
        return False

    def _go_on(self, state: dict[str, Any], joined: Joined) -> None:
        """Set everything to where the state was saved; the sessions are still those."""
        self._worker.load_state(state["worker_state"])
        self._worker.dialog.resume(joined.tickets)
        if self._start is not None:
            self._start.copy_(state["start"])
        self._binding.load_state(state)

    def close(self, *, leave: bool) -> None:
        """Land the exchange in flight and close the connections."""
        try:
            if self._outgoing is not None:
                self.finish()
        except ServerUnavailableError as e:
            logger.warning("closed with an exchange in flight: %s", e)
        finally:
            self._client.close(leave=leave)


def _keep(shard: int, frame: bytes) -> None:
    """Send nothing: the frames stay in `Dialog.pending`."""


def _ahead(is_new: Sequence[bool], unchanged: Sequence[bool]) -> list[int]:
    """Return the shards that have applied some of a velocity since it was saved.

    Nobody knows which part of it, and nothing must be applied twice.
    """
    known = zip(is_new, unchanged, strict=True)
    return [shard for shard, kept in enumerate(known) if not any(kept)]


def _count_exchange(stats: Stats, staleness: Histogram, answer: Answer) -> None:
    staleness.add(answer.staleness)
    stats.exchanges += 1
    stats.version, stats.staleness = answer.version, answer.staleness
    stats.staleness_p50, stats.staleness_p99 = staleness.percentile(50), staleness.percentile(99)


def _count_bytes(stats: Stats, client: Client) -> None:
    stats.bytes_up, stats.bytes_down = client.bytes_up, client.bytes_down
    stats.setup_bytes = client.setup_bytes


def _check_cursor(value: object) -> None:
    if not isinstance(value, bytes):
        raise ConfigError(
            f"the cursor is a {type(value).__name__}; give bytes, such as str(step).encode()"
        )
    if len(value) > MAX_CURSOR_BYTES:
        raise ConfigError(
            f"the cursor has {len(value)} bytes, and may have {MAX_CURSOR_BYTES}; give a position "
            "or a file's name, and keep the rest in a file of your own"
        )


def _tell_of_defect(name: str) -> None:
    logger.error(
        "worker %s: its base is not what the server has recorded of it; pulling the whole "
        "model. Training goes on, but this is a defect: please report it",
        name,
    )


def _tell_of_loss(name: str, cause: DgsError) -> None:
    logger.warning(
        "%s. Worker %s joins again and goes on from the servers' model; the update that was "
        "on its way may be lost, the rest of the velocity is kept",
        cause,
        name,
    )


def _tell_what_was_lost(name: str, exchanges: int) -> None:
    logger.warning(
        "worker %s takes the place of its earlier process, of which the servers have applied %d "
        "update(s); these stay. What is lost is at most that process's velocity and the update "
        "that was on its way; checkpoint=PATH keeps these too",
        name,
        exchanges,
    )


def _tell_of_stranger(name: str, saved: str) -> None:
    logger.warning(
        "worker %s was given the state of worker %s: it takes the optimizer's state from "
        "it, but goes on in its own session, from the servers' model",
        name,
        saved,
    )


def _tell_of_rejoin(name: str, is_new: Sequence[bool], num_ahead: int, joined: Joined) -> None:
    logger.warning(
        "worker %s could not go on with its saved session: of %d server(s), %d are new and %d "
        "have answered it since, or dropped it. It starts from the servers' model%s, and "
        "keeps its saved velocity%s",
        name,
        len(is_new),
        sum(is_new),
        num_ahead,
        ", having given them its saved one" if joined.gave_model else "",
        ", except where it may have been applied since" if num_ahead else "",
    )


def _sessions_of(saved: dict[str, Any]) -> list[Resume]:
    in_flight = bool(saved["in_flight"])
    return [
        Resume(incarnation=i, seq=saved["sequence"] - in_flight, in_flight=in_flight)
        for i in saved["incarnations"]
    ]
