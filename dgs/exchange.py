"""The rounds of one worker: progress out, difference in, parameters set to where to go on.

An `Exchanger` joins what the other modules keep apart: the user's tensors (`Binding`), the
exchange's arithmetic (`Worker`) and the servers (`Client`). It knows nothing of optimizers.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
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
from dgs.metrics import Histogram, Stats
from dgs.sparsify import Rounds
from dgs.transport.base import Transport
from dgs.view import View
from dgs.worker import Worker

__all__ = ["Exchanger"]

logger = logging.getLogger("dgs.optimizer")


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
            self._join()
        except BaseException:
            self._client.close(leave=False)
            raise

    @property
    def name(self) -> str:
        """The worker's name."""
        return self._client.name

    def begin_step(self) -> None:
        """Finish an exchange whose server did not answer last time, before the next step.

        Raises:
            ServerUnavailableError: it still does not.
        """
        if self._worker.dialog.pending is not None and self._start is None:
            self._finish()
            self._restart()

    def end_round(self) -> None:
        """Send what the round changed, take the difference, and start the next round.

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
            self._send(lambda i: (self._worker.start(i), self._local(i)))
            self._finish()
        else:
            self._overlap(self._start)
        self._restart()

    def _overlap(self, start: Tensor) -> None:
        """Land the last exchange, send the next, and go on from ahead of the base."""
        buffers = self._binding.read_buffers()
        self._land()
        averaged = self._worker.buffers.copy() if self.stats.exchanges else buffers
        self._worker.buffers[:] = buffers
        self._send(lambda i: (start[self._worker.ranges[i]], self._local(i)))
        for unit, part in enumerate(self._worker.ranges):
            start[part] -= self._local(unit)
        self._worker.start_in_flight(start)
        self._worker.buffers[:] = averaged

    def _send(self, rounds: Rounds) -> None:
        """Make the update of a round and put it on its way."""
        outgoing = self._client.begin_exchange(at_once=self._start is not None)
        try:
            self._worker.collect(rounds, outgoing.send)
        except NonFiniteError:
            self._worker.drop_non_finite()
            self._refuse()
            raise
        self._outgoing = outgoing

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
        except (SequenceError, UnknownWorkerError) as e:
            self._rejoin(e)
            return
        finally:
            self._count_bytes()
        answer = self._worker.absorb(replies)
        self.stats.exchanges += 1
        self._staleness.add(answer.staleness)
        self.stats.version, self.stats.staleness = answer.version, answer.staleness
        self.stats.staleness_p50 = self._staleness.percentile(50)
        self.stats.staleness_p99 = self._staleness.percentile(99)
        if answer.diverged:
            self.stats.resyncs += 1
            logger.error(
                "worker %s: its base is not what the server has recorded of it; pulling the whole "
                "model. Training goes on, but this is a defect: please report it",
                self.name,
            )
            self._join()
        if refused:
            self._restart()
            raise next(iter(refused.values()))

    def _rejoin(self, cause: DgsError) -> None:
        """Go on from the servers' model, because a server has dropped this worker's session."""
        self.stats.rejoins += 1
        logger.warning(
            "%s. Worker %s joins again and goes on from the servers' model; the update that was "
            "on its way may be lost, the rest of the velocity is kept",
            cause,
            self.name,
        )
        self._join()

    def _land(self) -> None:
        if self._worker.dialog.pending is not None:
            self._finish()

    def _restart(self) -> None:
        """Set the user's tensors to where the next round starts."""
        for unit, part in enumerate(self._worker.ranges):
            start = self._worker.start(unit) if self._start is None else self._start[part]
            self._binding.write(unit, start)
        self._binding.write_buffers(self._worker.buffers)

    def _refuse(self) -> None:
        self.stats.refused += 1
        self._restart()

    def _join(self) -> None:
        """Open sessions and start from the servers' model, or give them this worker's."""
        joined = self._client.join(self._binding.read_model)
        self._count_bytes()
        self._begin(joined)

    def _begin(self, joined: Joined) -> None:
        """Start from the records of fresh sessions."""
        assert joined.models is not None
        self._worker.join(joined.tickets, joined.models)
        if self._start is not None:
            for unit, part in enumerate(self._worker.ranges):
                self._start[part] = self._worker.start(unit)
        self._restart()

    def _count_bytes(self) -> None:
        self.stats.bytes_up = self._client.bytes_up
        self.stats.bytes_down = self._client.bytes_down
        self.stats.setup_bytes = self._client.setup_bytes

    def pull_model(self) -> dict[str, Tensor]:
        """Fetch the servers' model; float32 on the CPU."""
        model = {n: torch.from_numpy(v) for n, v in self._client.pull_model().items()}
        self._count_bytes()
        return model

    def state(self) -> dict[str, Any]:
        """Return everything that later exchanges depend on, as copies.

        Waits for an exchange in flight; if its server does not answer, the state holds the update,
        to be sent again.
        """
        if self._outgoing is not None:
            try:
                self._land()
            except ServerUnavailableError as e:
                logger.warning("saved with an exchange in flight: %s", e)
        return {
            "worker": self.name,
            "worker_state": self._worker.state(),
            "local": [self._local(i).clone() for i in range(self._binding.num_tensors)],
            "local_buffers": torch.from_numpy(self._binding.read_buffers().copy()),
            "start": None if self._start is None else self._start.clone(),
            "steps": self.stats.steps,
            "exchanges": self.stats.exchanges,
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Check that a saved state fits.

        Raises:
            ConfigError: it is of another model, rule, number of shards or setting of overlap.
        """
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
            logger.warning(
                "worker %s was given the state of worker %s: it takes the optimizer's state from "
                "it, but goes on in its own session, from the servers' model",
                self.name,
                state["worker"],
            )
            return False
        saved = state["worker_state"]
        self.stats.steps, self.stats.exchanges = state["steps"], state["exchanges"]
        tickets = self._worker.dialog.tickets
        is_new = [run != t.run for run, t in zip(saved["runs"], tickets, strict=True)]
        joined = self._client.join(
            lambda: self._worker.saved_model(saved), _sessions_of(saved), restore=is_new
        )
        self._count_bytes()
        self._worker.load_velocity(saved)
        if joined.models is None:
            self._go_on(state, joined)
            return True
        ahead = [
            shard
            for shard, known in enumerate(zip(is_new, joined.unchanged, strict=True))
            if not any(known)
        ]  # these have applied some of it since, nobody knows which: never apply twice
        self._worker.forget_velocity(ahead)
        self._begin(joined)
        self.stats.rejoins += 1
        logger.warning(
            "worker %s could not go on with its saved session: of %d server(s), %d are new and %d "
            "have answered it since, or dropped it. It starts from the servers' model%s, and "
            "keeps its saved velocity%s",
            self.name,
            len(is_new),
            sum(is_new),
            len(ahead),
            ", having given them its saved one" if joined.gave_model else "",
            ", except where it may have been applied since" if ahead else "",
        )
        return False

    def _go_on(self, state: dict[str, Any], joined: Joined) -> None:
        """Set everything to where the state was saved; the sessions are still those."""
        self._worker.load_state(state["worker_state"])
        self._worker.dialog.resume(joined.tickets)
        if self._start is not None:
            self._start.copy_(state["start"])
        for unit, values in enumerate(state["local"]):
            self._binding.write(unit, values)
        self._binding.write_buffers(state["local_buffers"].cpu().numpy())

    def close(self, *, leave: bool) -> None:
        """Land the exchange in flight and close the connections."""
        try:
            if self._outgoing is not None:
                self._land()
        except ServerUnavailableError as e:
            logger.warning("closed with an exchange in flight: %s", e)
        finally:
            self._client.close(leave=leave)


def _sessions_of(saved: dict[str, Any]) -> list[Resume]:
    in_flight = bool(saved["in_flight"])
    return [
        Resume(incarnation=i, seq=saved["sequence"] - in_flight, in_flight=in_flight)
        for i in saved["incarnations"]
    ]
