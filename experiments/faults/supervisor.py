"""Train with real processes while faults are thrown at them, and see that it goes on.

Shards and workers are killed, stopped, told to end, cut off and started again by a seeded plan.
That no exchange at all is acknowledged for `IDLE_S` is a failure, and so is every end of a process
that nobody has caused. `experiments.faults.audit` judges afterwards what the servers have kept.
"""

from __future__ import annotations

import heapq
import itertools
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from dgs.client import pull_model
from dgs.config import RetryConfig
from dgs.transport.connect import connect
from experiments.faults.children import Children, Shard, Trainee
from experiments.faults.plan import ON_SERVERS, WEIGHTS, Fault, Kind, faults
from experiments.faults.progress import Archive, Progress
from experiments.faults.proxy import FaultProxy, Link
from experiments.faults.trainee import Ended

__all__ = ["Outcome", "RunFailed", "Setting", "supervise", "told"]

IDLE_S = 30.0
"""Without an acknowledgement for so long, the run has failed."""

START_S = 90.0
"""Within so many seconds the first must have come: processes import torch, all at once."""

END_S = 45.0
"""Bound of each step of ending."""

LOOK_EVERY_S = 0.1
FAULTS_AT_A_TIME = 3
"""After so many, the next one waits until there was progress with all processes up."""

CALM_EXCHANGES = 20
"""Made by every worker with every shard once the faults have stopped."""

WEAK = Link(latency_s=0.02, jitter_s=0.03, bytes_per_s=50e3, longest_write_bytes=200)


class RunFailed(Exception):
    """What must not happen has happened; the text says what and where to look."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What to run."""

    seed: int
    seconds: float
    """Of faults; starting and ending come on top."""
    shards: int = 2
    workers: int = 3
    durable: bool = True
    """Whether servers keep their state; if not, no fault is aimed at them."""
    snapshot_interval_s: float = 2.0
    mean_gap_s: float = 1.5
    """Mean seconds between two faults."""
    weights: Mapping[Kind, float] = field(default_factory=lambda: WEIGHTS)
    kills: int | None = None
    """End as soon as servers were killed so often, even if time is left."""
    size: int = 64
    """Parameters of the problem."""
    pause_s: float = 0.0
    """Of each worker between two exchanges."""


@dataclass
class Outcome:
    """What has happened."""

    faults: Counter[str] = field(default_factory=Counter)
    """Faults by kind."""
    kills: int = 0
    """Servers that ended by SIGKILL, the last ends included."""
    lives: dict[str, int] = field(default_factory=dict)
    """How often each process was started."""
    acks: int = 0
    seconds: float = 0.0
    longest_silence_s: float = 0.0
    """Without an acknowledgement, whoever it is for."""
    back_s: list[float] = field(default_factory=list)
    """From each start of a server to the moment that it listened."""


def supervise(setting: Setting, folder: Path) -> Outcome:
    """Run under faults.

    Args:
        setting: what to run.
        folder: new or empty; gets ``acks/``, ``logs/``, ``state/<shard>/``, ``archive/<shard>/``
            and the servers' last model, ``model.npy``.

    Raises:
        RunFailed: there was no progress, or a process ended by itself.
    """
    with ExitStack() as stack:
        run = _Run(setting, folder, stack)
        run.start()
        run.chaos()
        run.calm()
        run.finish()
        return run.outcome


class _Run:
    def __init__(self, setting: Setting, folder: Path, stack: ExitStack) -> None:
        self.outcome = Outcome()
        self._setting = setting
        self._folder = folder
        self._random = Random(setting.seed)
        acks = folder / "acks"
        acks.mkdir(parents=True, exist_ok=True)
        self._progress = Progress(acks)
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._started_s = time.monotonic()
        ways = [
            [stack.enter_context(FaultProxy(None, seed=s)) for _ in range(setting.workers)]
            for s in range(setting.shards)
        ]
        self._shards = [Shard(s, self._server_arguments(s), w) for s, w in enumerate(ways)]
        self._workers = [
            Trainee(w, self._worker_arguments([row[w] for row in ways], acks / f"worker-{w}.acks"))
            for w in range(setting.workers)
        ]
        self._archives = [
            Archive(folder / "state" / str(s), folder / "archive" / str(s))
            for s in range(setting.shards if setting.durable else 0)
        ]
        self._children = stack.enter_context(Children(folder / "logs"))

    def _server_arguments(self, shard: int) -> list[str]:
        arguments = ["--hash-interval", "8", "--verbose"]
        if self._setting.durable:
            arguments += ["--state-dir", str(self._folder / "state" / str(shard))]
            arguments += ["--snapshot-interval", str(self._setting.snapshot_interval_s)]
        return arguments

    def _worker_arguments(self, ways: list[FaultProxy], acks: Path) -> list[str]:
        return [
            *("--server", ",".join(way.address for way in ways), "--acks", str(acks)),
            *("--seed", str(self._setting.seed), "--size", str(self._setting.size)),
            *("--pause-s", str(self._setting.pause_s)),
            *("--checkpoint", f"{self._folder / 'checkpoints'}/"),
        ]

    def start(self) -> None:
        """Start everything and wait until every worker trains."""
        for shard in self._shards:
            shard.start(self._children)
        for worker in self._workers:
            worker.start(self._children)
        self._until(lambda: self._all_at_least(1, Counter()), START_S, "every worker trains")

    def chaos(self) -> None:
        """Throw faults until the time is over."""
        setting = self._setting
        plan = faults(
            setting.seed,
            setting.shards,
            setting.workers,
            mean_gap_s=setting.mean_gap_s,
            weights={
                k: w for k, w in setting.weights.items() if setting.durable or k not in ON_SERVERS
            },
        )
        until_s = time.monotonic() + setting.seconds
        for number, fault in enumerate(plan, start=1):
            next_s = time.monotonic() + fault.after_s
            while time.monotonic() < min(next_s, until_s):
                self._look(next_s)
            if time.monotonic() >= until_s or self.outcome.kills == setting.kills:
                return
            if self._begin(fault):
                self.outcome.faults[fault.kind] += 1
            if number % FAULTS_AT_A_TIME == 0:
                self._recover()

    def calm(self) -> None:
        """Let every worker exchange once nothing is wrong any more."""
        self._recover()
        before = self._progress.counts.copy()
        self._until(
            lambda: self._all_at_least(CALM_EXCHANGES, before), 2 * IDLE_S, "every worker goes on"
        )

    def finish(self) -> None:
        """Tell the workers to end, fetch the model, and end the servers one way or the other."""
        for label in [label for w in self._workers for label in w.labels]:
            self._children.signal(label, signal.SIGTERM)
        self._until(lambda: not self._alive("worker"), END_S, "every worker ends")
        addresses = [shard.address for shard in self._shards]
        transports = connect(addresses, RetryConfig())
        try:
            model = pull_model(transports, timeout_s=END_S)
        finally:
            for transport in transports:
                transport.close()
        np.save(self._folder / "model.npy", model["x"], allow_pickle=False)
        for shard in self._shards:
            shard.restart_after_s = float("inf")
            self._end(shard, kill=self._random.random() < 0.5)
        self._until(lambda: not self._alive("server"), END_S, "every server ends")
        self._look(0.0)
        self.outcome.lives = {s.label: s.lives for s in self._shards}
        self.outcome.lives |= {f"worker {w.index}": w.lives for w in self._workers}
        self.outcome.back_s = [round(s, 3) for shard in self._shards for s in shard.back_s]
        self.outcome.acks = self._progress.total
        self.outcome.longest_silence_s = self._progress.longest_silence_s
        self.outcome.seconds = time.monotonic() - self._started_s

    # what happens all the time

    def _look(self, until_s: float) -> None:
        """Wait a little, then act on what has ended, what is due, and what is new."""
        now_s = time.monotonic()
        next_s = min(until_s, self._due[0][0] if self._due else until_s, now_s + LOOK_EVERY_S)
        for label, code in self._children.wait_any(max(0.0, next_s - now_s)):
            self._ended(label, code)
        while self._due and self._due[0][0] <= time.monotonic():
            heapq.heappop(self._due)[2]()
        for archive in self._archives:
            archive.look()
        self._progress.look()
        silent_s = time.monotonic() - self._progress.last_s
        if self._progress.last_s and silent_s > IDLE_S and self._alive("worker"):
            raise self._failure(f"no exchange was acknowledged for {silent_s:.0f} s")

    def _until(self, done: Callable[[], bool], limit_s: float, what: str) -> None:
        until_s = time.monotonic() + limit_s
        while not done():
            if time.monotonic() > until_s:
                raise self._failure(f"within {limit_s:g} s it was not reached that {what}")
            self._look(until_s)

    def _recover(self) -> None:
        """Wait until nothing is wrong, and an exchange was acknowledged since."""
        self._until(self._is_whole, 2 * IDLE_S, "all processes run")
        since_s = time.monotonic()
        self._until(lambda: self._progress.last_s > since_s, IDLE_S + 1, "there is progress")

    def _is_whole(self) -> bool:
        workers = all(w.label in self._children.running for w in self._workers)
        return not self._due and workers and all(s.address for s in self._shards)

    def _all_at_least(self, count: int, before: Counter[tuple[str, int]]) -> bool:
        return all(
            self._progress.counts[key] - before[key] >= count
            for w in self._workers
            for key in [(f"worker-{w.index}", s.index) for s in self._shards]
        )

    def _alive(self, kind: str) -> list[str]:
        return [label for label in self._children.running if label.startswith(kind)]

    def _later(self, delay_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._due, (time.monotonic() + delay_s, next(self._numbers), action))

    def _failure(self, what: str) -> RunFailed:
        return RunFailed(f"{what} (seed {self._setting.seed}; see {self._folder})")

    # what ends, and what becomes of it

    def _ended(self, label: str, code: int) -> None:
        shard = next((s for s in self._shards if s.label == label), None)
        if shard is not None:
            self._server_ended(shard, code)
            return
        worker = next(w for w in self._workers if label in w.labels)
        killed = label in worker.killed and code == -signal.SIGKILL
        fenced = worker.replaced and code == Ended.FENCED
        told = code in (Ended.TOLD, -signal.SIGTERM)  # the latter: before it had begun
        if not (killed or fenced or told):
            said = self._children.tail(label)
            raise self._failure(f"{label} ended with code {code}; its last words:\n{said}")
        if not told and not any(other in self._children.running for other in worker.labels):
            self._later(worker.restart_after_s, lambda: worker.start(self._children))

    def _server_ended(self, shard: Shard, code: int) -> None:
        shard.ended()
        self.outcome.kills += code == -signal.SIGKILL
        if code not in shard.allowed:
            said = self._children.tail(shard.label)
            raise self._failure(f"{shard.label} ended with code {code}; its last words:\n{said}")
        if shard.restart_after_s < float("inf"):
            self._later(shard.restart_after_s, lambda: shard.start(self._children))

    # faults

    def _begin(self, fault: Fault) -> bool:
        """Begin a fault; return whether there was anything to do it to."""
        shard, worker = self._shards[fault.shard], self._workers[fault.worker]
        if fault.kind in ON_SERVERS:
            return self._trouble_server(fault, shard)
        if fault.kind.endswith("worker"):
            return self._trouble_worker(fault, worker)
        way = shard.ways[fault.worker]
        start, end = {
            "cut": (way.cut, None),
            "reset": (way.reset, None),
            "black hole": (way.black_hole, way.heal),
            "refuse": (way.refuse, way.heal),
            "weak link": (lambda: way.set_link(WEAK), lambda: way.set_link(Link())),
        }[fault.kind]
        start()
        if end is not None:
            self._later(fault.lasts_s, end)
        return True

    def _trouble_server(self, fault: Fault, shard: Shard) -> bool:
        if shard.label not in self._children.running:
            return False
        if fault.kind == "stop server":
            self._pause(shard.label, fault.lasts_s)
        else:
            shard.restart_after_s = fault.lasts_s
            self._end(shard, kill=fault.kind == "kill server")
        return True

    def _end(self, shard: Shard, *, kill: bool) -> None:
        if kill:
            shard.allowed.add(-signal.SIGKILL)
            self._children.signal(shard.label, signal.SIGKILL)
            return
        if 0 in shard.allowed:  # told twice, it ends at once
            shard.allowed |= {128 + signal.SIGTERM, -signal.SIGTERM}
        # told before it listens, it may not have its handler yet
        shard.allowed |= {0} if shard.address else {0, -signal.SIGTERM}
        self._children.signal(shard.label, signal.SIGTERM)

    def _trouble_worker(self, fault: Fault, worker: Trainee) -> bool:
        label = worker.label
        if label not in self._children.running:
            return False
        # two processes must not share a checkpoint: workers that have one are killed instead
        if fault.kind == "kill worker" or (fault.kind == "replace worker" and worker.index % 2):
            worker.killed.add(label)
            worker.restart_after_s = fault.lasts_s
            self._children.signal(label, signal.SIGKILL)
            return True
        self._pause(label, fault.lasts_s)
        if fault.kind == "replace worker":
            worker.replaced = True
            worker.start(self._children)
        return True

    def _pause(self, label: str, seconds: float) -> None:
        self._children.signal(label, signal.SIGSTOP)
        self._later(seconds, lambda: self._children.signal(label, signal.SIGCONT))


def told(report: Mapping[str, Any]) -> str:
    """Say in a few lines what has happened.

    Args:
        report: as `experiments.faults.real.run` returns it.
    """
    if "failure" in report:
        return str(report["failure"])
    faults_by_kind = ", ".join(f"{k}: {n}" for k, n in sorted(report["faults"].items()))
    back = sorted(report["back_s"]) or [0.0]
    return "\n".join(
        [
            f"{report['acks']} acknowledged exchanges in {report['seconds']:.0f} s, "
            f"{report['lost']} lost; the model is at {report['distance']:.3f} of its start",
            f"{report['kills']} servers killed; a started server listened after "
            f"{back[len(back) // 2]:.1f} s (median), {back[-1]:.1f} s at most",
            f"longest silence {report['longest_silence_s']:.1f} s",
            faults_by_kind,
        ]
    )
