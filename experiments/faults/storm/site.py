"""The server of a storm: the real core, log and recovery, in virtual time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dgs.config import ServerConfig
from dgs.durable import Durable
from dgs.errors import DgsError
from dgs.frame import decode_frame
from experiments.faults.simulation.clock import Clock
from experiments.faults.storm.ledger import Ledger
from experiments.faults.storm.memory import MemoryDisk
from experiments.faults.storm.setting import Setting
from experiments.faults.storm.task import Digits, Floats

__all__ = ["Answer", "Site"]

Answer = Callable[[bytes | DgsError | None], None]
"""Called with the reply, with a refusal, or with None where the connection breaks."""


class _Held(NamedTuple):
    """A reply that waits for the log."""

    reply: bytes
    answer: Answer
    update: bytes | None
    """The cursor of the update that was applied, if one was."""


class Site:
    """Serve, be killed, recover.

    Args:
        setting: times.
        clock: of the run.
        task: gives the model to start from.
        ledger: gets every update once it is durable.

    Attributes:
        positions: last position in its data that each worker's durable updates have reached; they
            must come one after the other.
        replayed: requests that recoveries have carried out again.
    """

    def __init__(self, setting: Setting, clock: Clock, task: Digits, ledger: Ledger) -> None:
        """Listen from the start."""
        self._setting = setting
        self._clock = clock
        self._ledger = ledger
        self._disk = MemoryDisk()
        init = task.space.unflatten(task.start())
        self._durable: Durable | None = Durable.open(
            self._disk, ServerConfig(hash_interval=16), init=init, run=1
        )
        self._held: list[_Held] = []
        self._syncs = False
        self._life = 0
        self._model = task.start()
        self.positions: dict[int, int] = {}
        self.replayed = 0
        clock.after(setting.snapshot_s, self._snapshot)

    @property
    def model(self) -> Floats:
        """The model; where the server is down, the one that it had."""
        durable = self._durable
        if durable is not None and durable.core.state.shard is not None:
            return durable.core.state.shard.model
        return self._model

    def receive(self, method: str, request: bytes, answer: Answer) -> None:
        """Carry out a request; its reply leaves once the log has it."""
        durable = self._durable
        if durable is None:
            answer(None)
            return
        before = durable.core.version
        try:
            reply = durable.handle(method, request)
        except DgsError as refusal:
            answer(refusal)
            return
        is_new = durable.core.version > before
        update = bytes(decode_frame(request).cursor) if is_new else None
        self._held.append(_Held(reply, answer, update))
        if not self._syncs:
            self._commit(self._life)

    def _commit(self, life: int) -> None:
        """Write all that is held; another batch gathers meanwhile."""
        if life != self._life or self._durable is None:
            return
        batch, self._held = self._held, []
        self._syncs = bool(batch)
        if not batch:
            return
        self._durable.commit()
        for held in batch:
            if held.update is not None:
                self._note(held.update)

        def synced() -> None:
            for held in batch:
                held.answer(held.reply if life == self._life else None)
            self._commit(life)

        self._clock.after(self._setting.sync_s, synced)

    def _note(self, cursor: bytes) -> None:
        worker, position = (int(n) for n in cursor.split())
        if position != self.positions.get(worker, 0) + 1:
            raise RuntimeError(
                f"worker {worker}: data {position} follows {self.positions.get(worker, 0)}"
            )
        self.positions[worker] = position
        self._ledger.apply(self._clock.now, worker)

    def _snapshot(self) -> None:
        if self._durable is not None:
            self._durable.finish_snapshot(self._durable.begin_snapshot())
        self._clock.after(self._setting.snapshot_s, self._snapshot)

    def kill(self) -> None:
        """End the process, at once: what is not written is gone, all connections break."""
        self._model = np.array(self.model)
        self._durable = None
        self._life += 1
        held, self._held, self._syncs = self._held, [], False
        for one in held:
            one.answer(None)

    def restart(self) -> None:
        """Recover, and listen."""
        self._durable = Durable.open(self._disk)
        self.replayed += self._durable.recovery.replayed
        if self._durable.recovery.dropped or self._durable.recovery.torn:
            raise RuntimeError(f"not all was recovered: {self._durable.recovery}")
