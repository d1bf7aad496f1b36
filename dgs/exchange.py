"""The rounds of one worker: progress out, difference in, parameters set to where to go on.

An `Exchanger` joins what the other modules keep apart: the user's tensors (`Binding`), the
exchange's arithmetic (`Worker`) and the servers (`Client`). It knows nothing of optimizers.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from dgs.binding import Binding
from dgs.client import Client, Resume
from dgs.config import WorkerConfig
from dgs.errors import ConfigError, NonFiniteError, ServerUnavailableError
from dgs.metrics import Histogram, Stats
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
        self._future: Future[list[bytes]] | None = None
        self._join()

    @property
    def name(self) -> str:
        """The worker's name."""
        return self._client.name

    def begin_step(self) -> None:
        """Finish an exchange whose server did not answer last time, before the next step.

        Raises:
            ServerUnavailableError: it still does not.
        """
        if self._worker.pending is not None and self._start is None:
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
            self._worker.collect(lambda i: self._worker.start(i) - self._local(i))
            self._finish()
        else:
            self._overlap(self._start)
        self._restart()

    def _overlap(self, start: Tensor) -> None:
        """Land the last exchange, send the next, and go on from ahead of the base."""
        buffers = self._binding.read_buffers()
        self._land()
        averaged = self._worker.buffers.copy() if self.stats.exchanges else buffers
        for unit, part in enumerate(self._worker.ranges):
            start[part] -= self._local(unit)
        self._worker.buffers[:] = buffers
        frames = self._worker.collect(lambda i: start[self._worker.ranges[i]])
        self._worker.start_in_flight(start)
        self._future = self._client.exchange_later(frames)
        self._worker.buffers[:] = averaged

    def _local(self, unit: int) -> Tensor:
        return self._binding.local(unit).to(self._worker.base.device)

    def _finish(self) -> None:
        """Wait for the exchange that is pending, and take its difference."""
        pending = self._worker.pending
        assert pending is not None
        refusal: NonFiniteError | None = None
        try:
            future, self._future = self._future, None
            replies = future.result() if future is not None else self._client.exchange(pending)
        except NonFiniteError as e:
            refusal = e
            replies = self._client.exchange(self._worker.blank())
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
        if refusal is not None:
            self._refuse()
            raise refusal

    def _land(self) -> None:
        if self._worker.pending is not None:
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

    def _join(self, resume: Sequence[Resume] | None = None) -> bool:
        """Open sessions; return whether earlier ones go on."""
        joined = self._client.join(self._binding.read_model, resume)
        self._count_bytes()
        if joined.models is None:
            self._worker.resume(joined.tickets)
            return True
        self._worker.join(joined.tickets, joined.models)
        if self._start is not None:
            for unit, part in enumerate(self._worker.ranges):
                self._start[part] = self._worker.start(unit)
        self._restart()
        return False

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
        if self._future is not None:
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
            Whether the session goes on bit for bit. If not, the base is the server's model and
            only the velocity is the saved one.
        """
        if rename:
            self._client.rename(state["worker"])
        saved = state["worker_state"]
        in_flight = bool(saved["in_flight"])
        resume = [
            Resume(incarnation=i, seq=saved["sequence"] - in_flight, in_flight=in_flight)
            for i in saved["incarnations"]
        ]
        self.stats.steps, self.stats.exchanges = state["steps"], state["exchanges"]
        self._worker.load_velocity(saved)
        if not self._join(resume):
            self.stats.rejoins += 1
            logger.warning(
                "worker %s could not go on with its saved session (the server has answered it "
                "since, or has dropped its record). It starts from the server's model, not from "
                "its saved parameters, and keeps its saved velocity. If the server was started "
                "anew, give it the model to go on from: dgs server --init FILE.safetensors",
                self.name,
            )
            return False
        tickets = self._worker.tickets
        self._worker.load_state(saved)
        self._worker.resume(tickets)
        if self._start is not None:
            self._start.copy_(state["start"])
        for unit, values in enumerate(state["local"]):
            self._binding.write(unit, values)
        self._binding.write_buffers(state["local_buffers"].cpu().numpy())
        return True

    def close(self, *, leave: bool) -> None:
        """Land the exchange in flight and close the connections."""
        try:
            if self._future is not None:
                self._land()
        except ServerUnavailableError as e:
            logger.warning("closed with an exchange in flight: %s", e)
        finally:
            self._client.close(leave=leave)
