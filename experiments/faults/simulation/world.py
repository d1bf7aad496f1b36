"""One history: servers, workers and faults from a seed, until everything that must hold has been.

The last part of a history is calm. In it every worker that lives must get further answers, within
a bounded time; then each server loses its power once more, and what comes back is compared with the
sum of what was ever acknowledged.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dgs.errors import DgsError
from dgs.frame import decode_frame
from dgs.kernels import kernels
from dgs.server import ParameterServer
from dgs.state import fingerprint
from experiments.faults.simulation.checks import Violation
from experiments.faults.simulation.chores import Chores
from experiments.faults.simulation.site import RUN, Site
from experiments.faults.simulation.stage import Stage, Tally
from experiments.faults.simulation.worker import WorkerProcess

__all__ = ["World", "simulate"]

_STORM_S = 20.0
_CALM_S = 60.0
_MOST_STEPS = 200_000
_FURTHER = (1, 1, 2)
"""Exchanges that every worker must get answered once faults have stopped."""

_BACK_S = 0.5
_FOLD_SHARE = 0.1
"""Share of histories whose requests are all carried out again, one after the other."""


class World:
    """Run one history.

    Args:
        seed: decides everything.
    """

    def __init__(self, seed: int) -> None:
        self._stage = Stage(seed)
        weather = self._stage.weather
        self._sites = [Site(i, self._stage, Chores(self._stage)) for i in range(weather.num_shards)]
        self._produced: dict[str, np.ndarray[Any, np.dtype[np.float64]]] = {}
        self._workers: list[WorkerProcess] = []
        for i in range(weather.num_workers):
            self._begin_worker(f"w{i}")

    @property
    def tally(self) -> Tally:
        """What the history contained so far."""
        self._stage.tally.events = self._stage.clock.steps
        return self._stage.tally

    def lines(self) -> list[str]:
        """Return what has happened, in words."""
        return [str(self._stage.weather), *self._stage.trace.lines()]

    def digest(self) -> str:
        """Hash what has happened."""
        return self._stage.trace.digest()

    def run(self) -> None:
        """Carry out the history.

        Raises:
            Violation: a promise was broken.
        """
        stage = self._stage
        while stage.tally.acknowledged < stage.weather.exchanges and stage.clock.now < _STORM_S:
            self._step()
        stage.weather.calm()
        stage.trace.add("calm")
        for site in self._sites:
            site.empty()
        further = stage.rng.choice(_FURTHER)
        for worker in self._workers:
            worker.goal = worker.answered + further
        deadline = stage.clock.now + _CALM_S
        while any(w.lags for w in self._workers):
            self._step()
            if stage.clock.now > deadline:
                late = [w.name for w in self._workers if w.lags]
                raise Violation(f"no progress of {', '.join(late)} within {_CALM_S} calm seconds")
        for site in self._sites:
            site.restart()
        self._check_mass()
        if stage.rng.random() < _FOLD_SHARE:
            self._check_fold()

    def _step(self) -> None:
        if not self._stage.clock.step() or self._stage.clock.steps > _MOST_STEPS:
            raise Violation("the history does not end")

    # ---- workers

    def _begin_worker(self, name: str, before: WorkerProcess | None = None) -> None:
        """Start a process under a name, from the checkpoint of the one before if there is one."""
        stage = self._stage
        produced = self._produced.setdefault(name, np.zeros(stage.view.num_parameters))
        saved = None
        for other in self._workers:  # it may have been replaced, and killed before that
            other.is_newest &= other.name != name
        kept = before.saved if before is not None else None
        if kept is not None and stage.rng.random() < stage.weather.keeps_state:
            saved = kept
        worker = WorkerProcess(name, self._sites, stage, produced, saved, self._end_worker)
        worker.yields = self._yields
        if stage.weather.is_calm:
            worker.goal = 1
        self._workers.append(worker)

    def _yields(self, worker: WorkerProcess) -> bool:
        """Tell whether another process of the same name has taken over; that one is newest then."""
        for other in self._workers:
            if other is not worker and other.name == worker.name and other.is_alive:
                worker.is_newest, other.is_newest = False, True
                return True
        return False

    def _end_worker(self, worker: WorkerProcess) -> None:
        """End a process, and start another one in its place."""
        stage = self._stage
        if stage.weather.is_calm or not worker.is_alive or not worker.is_newest:
            return
        luck = stage.rng.random()
        stage.tally.worker_crashes += 1
        if luck < 0.2:  # it goes on, and does not know that it was replaced
            stage.trace.add("replaced", worker.name)
        elif luck < 0.4:
            stage.trace.add("leaves", worker.name)
            worker.leave()
        else:
            stage.trace.add("worker killed", worker.name)
            worker.stop()
        others = sum(w.is_alive and w.is_newest and w is not worker for w in self._workers)
        if luck > 0.9 and others:
            return  # for good
        stage.clock.after(stage.soon(_BACK_S), lambda: self._begin_worker(worker.name, worker))

    # ---- the end

    def _check_mass(self) -> None:
        """Compare each model with what it began with, less all updates in their order."""
        stage = self._stage
        given = {name: np.zeros_like(p) for name, p in self._produced.items()}
        for site, part in zip(self._sites, stage.parts, strict=True):
            core = site.core
            if core is None or core.state.shard is None:
                continue
            model: np.ndarray[Any, np.dtype[np.float32]] | None = None
            for entry in site.history:
                if entry.method == "PutModel":
                    model = np.frombuffer(entry.essence[1], np.float32).copy()
                if entry.update is None:
                    continue
                assert model is not None
                frame = decode_frame(entry.request)
                decode = kernels(part.size).decode_body
                kind, count = frame.header.values, frame.header.nnz
                where, what = decode(frame.body, part.segment_sizes, kind, count)
                model[where] -= what
                given[entry.update.worker][where + part.local.start] += what
            end = core.state.shard.model
            if model is not None and model[: part.size].tobytes() != end[: part.size].tobytes():
                raise Violation(f"the model of shard {site.shard} is not the sum of its updates")
        if stage.weather.exact:
            for name, produced in self._produced.items():
                if (given[name] > produced).any():
                    raise Violation(f"more of {name} was applied than it ever produced")

    def _check_fold(self) -> None:
        """Carry out everything again on servers without a disk, and compare all that they know."""
        for site in self._sites:
            assert site.core is not None
            fresh = ParameterServer(site.core.state.config, run=RUN)
            for position, entry in enumerate(site.history, 1):
                try:
                    fresh.handle(entry.method, entry.request)
                except DgsError as error:
                    raise Violation(f"request {position} is refused when repeated") from error
            if fingerprint(fresh.state) != fingerprint(site.core.state):
                raise Violation(f"shard {site.shard} is not the fold of its requests")


def simulate(seed: int) -> World:
    """Run the history of a seed to its end.

    Raises:
        Violation: a promise was broken.
    """
    world = World(seed)
    world.run()
    return world
