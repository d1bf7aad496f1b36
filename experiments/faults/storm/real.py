"""The same in real processes: one server and a few workers, calm and under a storm, in turn.

The kills are those of a drawn storm; what one costs is not assumed here:
a process is started again at once, and is away until it has joined. All times are real.
"""

from __future__ import annotations

import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from experiments.faults.children import Children, Shard, Trainee
from experiments.faults.proxy import FaultProxy
from experiments.faults.served import ON_DISK
from experiments.faults.storm.ledger import Report
from experiments.faults.storm.schedule import SERVER, Storm
from experiments.faults.storm.setting import Setting
from experiments.faults.witness import parse_acks

__all__ = ["measure", "told"]

PAUSE_S = 0.25
"""Of a worker between two exchanges: it, not the machine's load, decides the calm rate."""
START_S = 90.0
LOOK_EVERY_S = 0.05


def measure(
    seconds: float = 120.0, workers: int = 8, kills_per_hour: float = 450.0, seed: int = 1
) -> Report:
    """Run once without and once with kills.

    Args:
        seconds: of each, counted from the moment that all workers train.
        workers: processes besides the server.
        kills_per_hour: of all processes together.
        seed: of the storm.

    Raises:
        RuntimeError: a process ended that nobody has killed, or there was no start.
    """
    setting = Setting(
        seed=seed, workers=workers, horizon_s=seconds, kills_per_hour=kills_per_hour, restart_s=8.0
    )
    calm = _measure_one(replace(setting, kills_per_hour=0.0))
    storm = _measure_one(setting)
    goodput = storm["real_exchanges_per_s"] / calm["real_exchanges_per_s"]
    return {
        "workers": workers,
        "kills_per_hour": kills_per_hour,
        "real_seconds": seconds,
        "calm": calm,
        "storm": storm,
        "real_goodput_of_calm": goodput,
        "real_goodput_of_available": goodput / storm["real_up_share"],
    }


def told(report: Report) -> str:
    """Say in a few lines what has happened."""
    calm, storm = report["calm"], report["storm"]
    away = sorted(storm["real_away_s"]) or [0.0]
    return (
        f"real processes: {storm['kills']} kills ({storm['kills_of_server']} of the server) in "
        f"{report['real_seconds']:g} s, {report['workers']} workers; a worker was away for "
        f"{away[len(away) // 2]:.1f} s (median)\n"
        f"exchanges/s {calm['real_exchanges_per_s']:.1f} calm, "
        f"{storm['real_exchanges_per_s']:.1f} in the storm; goodput "
        f"{report['real_goodput_of_calm']:.1%} of calm, "
        f"{report['real_goodput_of_available']:.1%} of available worker time\n"
        f"participation {storm['real_participation_of_ready']:.1%} of those that are up "
        f"(calm {calm['real_participation_of_ready']:.1%}), "
        f"{storm['real_participation_of_all']:.1%} of all"
    )


def _measure_one(setting: Setting) -> Report:
    folder = Path(tempfile.mkdtemp(dir=ON_DISK, prefix="dgs-storm-"))
    try:
        with ExitStack() as stack:
            return _Run(setting, folder, stack).run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Joins(Children):
    """Children whose joining is timed by what they say."""

    def __init__(self, logs: Path) -> None:
        super().__init__(logs)
        self.joined_s: dict[str, float] = {}

    def write(self, label: str, text: str) -> None:
        """Keep a line; the one that says that a worker has joined, with its time."""
        if ", pid " in text:
            self.joined_s.setdefault(label, time.monotonic())
        super().write(label, text)


class _Run:
    def __init__(self, setting: Setting, folder: Path, stack: ExitStack) -> None:
        self._setting = setting
        self._folder = folder
        self._acks = folder / "acks"
        self._acks.mkdir()
        way = stack.enter_context(FaultProxy(None, seed=setting.seed))
        state = str(folder / "state")
        self._shard = Shard(0, ["--state-dir", state, "--snapshot-interval", "20"], [way])
        self._trainees = [
            Trainee(w, self._arguments(way.address, w)) for w in range(setting.workers)
        ]
        self._children = stack.enter_context(_Joins(folder / "logs"))
        self._killed: set[str] = set()
        self._away: list[tuple[int, float, str]] = []
        """Worker, when it was killed, label of the life after."""

    def _arguments(self, address: str, worker: int) -> list[str]:
        return [
            *("--server", address, "--acks", str(self._acks / f"{worker}.acks")),
            *("--seed", str(self._setting.seed), "--pause-s", str(PAUSE_S), "--stay"),
        ]

    def run(self) -> Report:
        """Start everything, kill by plan, and count."""
        self._shard.start(self._children)
        for trainee in self._trainees:
            trainee.start(self._children)
        limit_s = time.monotonic() + START_S
        while len(self._children.joined_s) < len(self._trainees):
            self._look(limit_s)
            if time.monotonic() > limit_s:
                raise RuntimeError("not all workers have begun in time")
        start_s = time.monotonic()
        storm = Storm(self._setting)
        for kill in storm.kills:
            self._wait_until(start_s + kill.at_s)
            self._kill(kill.victim)
        self._wait_until(start_s + self._setting.horizon_s)
        return self._counted(start_s)

    def _kill(self, victim: int) -> None:
        """Kill the server, or a worker; where that is not up, the next one that is."""
        if victim == SERVER:
            if self._shard.address:
                self._end(self._shard.label)
            return
        order = self._trainees[victim:] + self._trainees[:victim]
        up = (t for t in order if t.label in self._children.joined_s.keys() - self._killed)
        trainee = next(up, None)
        if trainee is not None:
            after = trainee.label_of(trainee.lives + 1)
            self._away.append((trainee.index, time.monotonic(), after))
            self._end(trainee.label)

    def _end(self, label: str) -> None:
        self._killed.add(label)
        self._children.signal(label, signal.SIGKILL)

    def _wait_until(self, until_s: float) -> None:
        while time.monotonic() < until_s:
            self._look(until_s)

    def _look(self, until_s: float) -> None:
        wait_s = min(LOOK_EVERY_S, until_s - time.monotonic())
        for label, code in self._children.wait_any(max(0.0, wait_s)):
            if label not in self._killed:
                said = self._children.tail(label)
                raise RuntimeError(f"{label} ended with code {code}; its last words:\n{said}")
            if label == self._shard.label:
                self._killed.discard(label)  # its next life has the same name
                self._shard.ended()
                self._shard.start(self._children)
            else:
                next(t for t in self._trainees if t.label == label).start(self._children)

    def _counted(self, start_s: float) -> Report:
        s = self._setting
        window_s = s.window_s
        gave = np.zeros((s.workers, int(s.horizon_s / window_s)), dtype=bool)
        whole = np.ones_like(gave)
        exchanges = 0
        for worker in range(s.workers):
            for at_s in self._ack_times(worker, start_s):
                exchanges += 1
                gave[worker, min(int(at_s / window_s), gave.shape[1] - 1)] = True
        away_s: list[float] = []
        for worker, killed_s, life in self._away:
            back_s = self._children.joined_s.get(life, start_s + s.horizon_s)
            away_s.append(min(back_s, start_s + s.horizon_s) - killed_s)
            first, last = ((t - start_s) / window_s for t in (killed_s, back_s))
            whole[worker, int(first) : int(last) + 1] = False
        ready = whole.sum(0)
        shares = (gave & whole).sum(0)[ready > 0] / ready[ready > 0]
        return {
            "kills": len(self._away) + self._shard.lives - 1,
            "kills_of_server": self._shard.lives - 1,
            "real_exchanges_per_s": exchanges / s.horizon_s,
            "real_participation_of_ready": float(shares.mean()),
            "real_participation_of_all": float(gave.mean()),
            "real_up_share": 1.0 - sum(away_s) / (s.workers * s.horizon_s),
            "real_away_s": [round(t, 2) for t in away_s],
            "real_server_back_s": [round(t, 2) for t in self._shard.back_s[1:]],
        }

    def _ack_times(self, worker: int, start_s: float) -> Sequence[float]:
        text = (self._acks / f"{worker}.acks").read_bytes()
        whole: Any = text[: text.rfind(b"\n") + 1]
        times = (ack.at_us / 1e6 - start_s for ack in parse_acks(whole))
        return [t for t in times if 0 <= t < self._setting.horizon_s]
