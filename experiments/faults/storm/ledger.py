"""What came of a run: whose updates were applied when, what was computed for nothing, the loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from experiments.faults.storm.schedule import SERVER, Storm
from experiments.faults.storm.setting import Setting
from experiments.faults.storm.task import Score

__all__ = ["Ledger", "Look"]

Report = dict[str, Any]

LAST_LOOKS = 5
"""Final loss and accuracy are means of so many: with a fixed learning rate single ones vary."""


@dataclass(frozen=True, slots=True)
class Look:
    """The loss at some time."""

    at_s: float
    samples: int
    """Applied by then."""
    score: Score


@dataclass
class Ledger:
    """The record of one run.

    Args:
        setting: of the run.
        storm: who was up when.
    """

    setting: Setting
    storm: Storm
    applied: list[tuple[float, int]] = field(default_factory=list)
    """Time and worker of each update that stayed; one is `Setting.batch` samples."""
    lost_steps: int = 0
    """Steps computed to their end whose update was never applied, or was undone."""
    broken_s: float = 0.0
    """Computing time of steps that a kill has broken off."""
    joining_s: float = 0.0
    """Worker time from a ready process to its first step, beyond the first start of all."""
    looks: list[Look] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    """Contributors of each applied step of a synchronous group."""
    notes: Report = field(default_factory=dict)
    """What only one method has."""

    def apply(self, at_s: float, worker: int) -> None:
        """Note that an update of a worker is in the model."""
        self.applied.append((at_s, worker))

    def look(self, at_s: float, score: Score) -> None:
        """Note the loss."""
        self.looks.append(Look(at_s, len(self.applied) * self.setting.batch, score))

    def participation(self, window_s: float) -> tuple[float, float]:
        """Return the share of workers with an applied update, averaged over windows.

        Returns:
            Of the workers whose process was ready throughout the window, over the windows that had
            any; and of all workers.
        """
        gave, whole = self._grid(window_s)
        ready = whole.sum(0)
        shares = (gave & whole).sum(0)[ready > 0] / ready[ready > 0]
        return float(shares.mean()) if shares.size else 1.0, float(gave.mean())

    def _grid(self, window_s: float) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Return by worker and window whether it gave an update, and whether it was ready."""
        count = int(self.setting.horizon_s / window_s + 1e-9)
        gave = np.zeros((self.setting.workers, count), dtype=bool)
        whole = np.ones_like(gave)
        for at_s, worker in self.applied:
            if at_s < count * window_s:
                gave[worker, int(at_s / window_s)] = True
        for kill in self.storm.kills:
            if kill.victim != SERVER:
                first, last = int(kill.at_s / window_s), int(kill.back_s / window_s)
                whole[kill.victim, first : last + 1] = False
        return gave, whole

    def report(self) -> Report:
        """Return everything, for JSON."""
        s, storm = self.setting, self.storm
        up_s = sum(storm.up_s(w) for w in range(s.workers))
        ready, everyone = self.participation(s.window_s)
        on_servers = len(storm.of(SERVER))
        return {
            "seed": s.seed,
            "kills": len(storm.kills),
            "kills_of_server": on_servers,
            "samples": len(self.applied) * s.batch,
            "throughput_samples_per_s": len(self.applied) * s.batch / s.horizon_s,
            "up_share": up_s / (s.workers * s.horizon_s),
            "participation_of_ready": ready,
            "participation_of_all": everyone,
            "participation_by_window": {
                f"{w:g}": self.participation(w) for w in (s.window_s / 2, 2 * s.window_s)
            },
            "group_share": float(np.mean(self.groups)) / s.workers if self.groups else None,
            "lost_steps": self.lost_steps,
            "lost_steps_per_kill": self.lost_steps / max(1, len(storm.kills)),
            "broken_s": self.broken_s,
            "joining_s": self.joining_s,
            "loss": float(np.mean([k.score.loss for k in self.looks[-LAST_LOOKS:]])),
            "accuracy": float(np.mean([k.score.accuracy for k in self.looks[-LAST_LOOKS:]])),
            "curve": [[round(k.at_s, 3), k.samples, *k.score] for k in self.looks],
            **self.notes,
        }
