"""This library under a storm: real workers and a real server, events instead of threads."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import numpy as np
import torch

from dgs.client import Client, Joined
from dgs.config import RetryConfig, WorkerConfig
from dgs.errors import DgsError
from dgs.view import View
from dgs.worker import Worker
from experiments.faults.simulation.clock import Clock
from experiments.faults.simulation.script import Asked, Call, Script, ScriptedTransport
from experiments.faults.simulation.site import FIRST_INCARNATION
from experiments.faults.storm.ledger import Ledger
from experiments.faults.storm.schedule import SERVER, Kill, Storm
from experiments.faults.storm.setting import Setting
from experiments.faults.storm.site import Site
from experiments.faults.storm.task import Digits, Floats

__all__ = ["CONFIG", "RATE", "run_asynchronous"]

RATE = 0.005
"""Of 0.0025, 0.005, 0.01 and 0.02 the one with the least loss of a calm run after 600 s."""
CONFIG = WorkerConfig(momentum=0.7, density=0.05, download_density=0.05)
RETRY = RetryConfig()


class _Trainee:
    """One worker through all its lives.

    Args:
        number: which.
        setting: times and sizes.
        clock: of the run.
        site: the server.
        task: what is learnt.
        ledger: gets what is lost.
    """

    def __init__(
        self,
        number: int,
        setting: Setting,
        clock: Clock,
        site: Site,
        task: Digits,
        ledger: Ledger,
    ) -> None:
        self._number = number
        self._setting = setting
        self._clock = clock
        self._site = site
        self._task = task
        self._ledger = ledger
        self._random = Random(f"worker {setting.seed} {number}")
        self._rate = setting.rate or RATE
        self._view = View.whole(task.space)
        self._zeros = torch.zeros(self._view.num_parameters)
        self._life = 0
        self._up_at_s = 0.0
        self._computes_since_s: float | None = None
        self.in_flight: int | None = None
        """Position of the update that was made and is not answered."""
        self._position = 0

    # ---- life

    def start(self) -> None:
        """Begin a new process: no base, no velocity, no position."""
        self._life += 1
        self._up_at_s = self._clock.now
        self._script = Script()
        self._client = Client(
            [ScriptedTransport(0, self._script)], CONFIG, f"worker-{self._number}", [self._view]
        )
        self._worker = Worker(self._view, 1, CONFIG)
        self._incarnation = FIRST_INCARNATION + int(self._clock.now * 1e9)
        self._join()

    def kill(self) -> None:
        """End the process."""
        self._life += 1
        if self._computes_since_s is not None:
            self._ledger.broken_s += self._clock.now - self._computes_since_s
        self._computes_since_s = None
        if self.in_flight is not None:
            self._clock.after(self._setting.restart_s / 10, self._count_lost(self.in_flight))
        self.in_flight = None

    def _count_lost(self, position: int) -> Callable[[], None]:
        """Look, when the wire is empty, whether a dead process's last update was applied."""

        def look() -> None:
            self._ledger.lost_steps += self._site.positions.get(self._number, 0) < position

        return look

    def _alive(self, action: Callable[[], None], life: int) -> Callable[[], None]:
        """Return an action that only the process of this life carries out."""

        def act() -> None:
            if life == self._life:
                action()

        return act

    # ---- requests

    def _send(self, call: Call, take: Callable[[bytes], None], attempt: int = 0) -> None:
        """Send a request until it is answered; see `dgs.transport.retry`."""
        clock, setting, life = self._clock, self._setting, self._life
        pause_s = min(RETRY.first_wait_s * 2**attempt, RETRY.longest_wait_s)
        pause_s *= 0.5 + 0.5 * self._random.random()
        again = self._alive(lambda: self._send(call, take, attempt + 1), life)

        def answer(outcome: bytes | DgsError | None) -> None:
            if outcome is None:
                clock.after(setting.round_trip_s / 2 + pause_s, again)
                return
            size = len(outcome) if isinstance(outcome, bytes) else 0
            arrive = self._alive(lambda: take(_checked(outcome)), life)
            clock.after(setting.carry_s(size), arrive)

        # what is on the wire arrives, whatever becomes of who has sent it
        arrive = lambda: self._site.receive(call.method, call.request, answer)  # noqa: E731
        clock.after(setting.carry_s(len(call.request)), arrive)

    def _join(self) -> None:
        """Let the client ask on, from the beginning, with the replies that have come."""
        self._client._incarnation = self._incarnation
        self._script.rewind()
        try:
            joined = self._client.join(self._task.start)
        except Asked as asked:
            self._send(asked.call, self._go_on)
        else:
            self._begin(joined)

    def _go_on(self, reply: bytes) -> None:
        self._script.replies.append(reply)
        self._join()

    def _begin(self, joined: Joined) -> None:
        assert joined.models is not None
        self._worker.join(joined.tickets, joined.models)
        if self._up_at_s > 0:
            self._ledger.joining_s += self._clock.now - self._up_at_s
        self._position = int(joined.cursor.split()[1]) if joined.cursor else 0
        self._compute()

    # ---- steps

    def _compute(self) -> None:
        self._computes_since_s = self._clock.now
        push = self._alive(self._push, self._life)
        self._clock.after(self._setting.draw_compute_s(self._random), push)

    def _push(self) -> None:
        """End a step: make an update of its gradient, and send it."""
        self._computes_since_s = None
        self._position += 1
        x, y = self._task.batch(self._number, self._position, self._setting.batch)
        gradient = self._task.gradient(self._worker.base.numpy(), x, y)
        progress = torch.from_numpy(gradient * np.float32(self._rate))
        ranges, zeros = self._worker.ranges, self._zeros
        self._worker.dialog.cursor = f"{self._number} {self._position}".encode()
        self._worker.collect(lambda unit: (progress[ranges[unit]], zeros[ranges[unit]]))
        self.in_flight = self._position
        assert self._worker.dialog.pending is not None
        self._send(Call(0, "Exchange", self._worker.dialog.pending[0]), self._take)

    def _take(self, reply: bytes) -> None:
        if self._worker.absorb([reply]).diverged:
            raise RuntimeError(f"worker {self._number}: base and record differ")
        self.in_flight = None
        self._compute()


def _checked(outcome: bytes | DgsError) -> bytes:
    if isinstance(outcome, DgsError):
        raise outcome  # nothing in a storm of kills explains a refusal
    return outcome


def run_asynchronous(setting: Setting) -> Ledger:
    """Train with this library under a storm.

    Args:
        setting: of the storm.

    Raises:
        RuntimeError: data was skipped or used twice, a base differs from its record, or a recovery
            was not complete.
    """
    storm = Storm(setting)
    clock, task, ledger = Clock(), Digits(setting.seed), Ledger(setting, storm)
    site = Site(setting, clock, task, ledger)
    trainees = [_Trainee(w, setting, clock, site, task, ledger) for w in range(setting.workers)]
    for trainee in trainees:
        clock.after(0.0, trainee.start)
    for kill in storm.kills:
        _plan(clock, site if kill.victim == SERVER else trainees[kill.victim], kill)
    for look in range(1, setting.looks + 1):
        at_s = setting.horizon_s * look / setting.looks
        clock.after(at_s, lambda: ledger.look(clock.now, task.score(_flat(site.model))))
    while clock.now < setting.horizon_s and clock.step():
        pass
    ledger.applied = [(at_s, w) for at_s, w in ledger.applied if at_s <= setting.horizon_s]
    ledger.notes["replayed_requests"] = site.replayed
    return ledger


def _plan(clock: Clock, victim: Site | _Trainee, kill: Kill) -> None:
    clock.after(kill.at_s, victim.kill)
    back = victim.restart if isinstance(victim, Site) else victim.start
    clock.after(kill.back_s, back)


def _flat(model: Floats) -> Floats:
    return np.asarray(model, dtype=np.float32)
