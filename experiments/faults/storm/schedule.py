"""Who is killed when, and when it is back: drawn once, and the same for every method."""

from __future__ import annotations

import bisect
import math
from random import Random
from typing import NamedTuple

from experiments.faults.storm.setting import Setting

__all__ = ["SERVER", "Kill", "Storm"]

SERVER = -1
"""The victim that is no worker: the server, or a synchronous group's coordinator."""


class Kill(NamedTuple):
    """One SIGKILL."""

    at_s: float
    victim: int
    back_s: float
    """When its new process is ready."""


class Storm:
    """A Poisson process of kills.

    Args:
        setting: how many, and how long victims are away.

    Example:
        >>> one, same = (Storm(Setting(seed=3, kills_per_hour=200)) for _ in range(2))
        >>> one.kills == same.kills, abs(len(one.kills) - 200) < 60
        (True, True)
    """

    def __init__(self, setting: Setting) -> None:
        """Draw them all."""
        self.workers = setting.workers
        self.horizon_s = setting.horizon_s
        self.kills = _draw(setting)
        self._of: dict[int, list[Kill]] = {v: [] for v in range(SERVER, setting.workers)}
        for kill in self.kills:
            self._of[kill.victim].append(kill)
        self._at = [k.at_s for k in self.kills]

    def of(self, victim: int) -> list[Kill]:
        """Return the kills of one victim, in order."""
        return self._of[victim]

    def last(self, victim: int, at_s: float) -> Kill | None:
        """Return the newest kill of a victim at a time or before it."""
        place = bisect.bisect_right(self._of[victim], at_s, key=lambda k: k.at_s)
        return self._of[victim][place - 1] if place else None

    def is_up(self, victim: int, at_s: float) -> bool:
        """Tell whether a process is ready at a time."""
        kill = self.last(victim, at_s)
        return kill is None or kill.back_s <= at_s

    def up_from(self, victim: int, at_s: float) -> float:
        """Return when a process is ready, at a time or after it, if it is not killed again."""
        kill = self.last(victim, at_s)
        return at_s if kill is None else max(at_s, kill.back_s)

    def up_since(self, victim: int, at_s: float) -> float:
        """Return when the process that is ready at a time became so; 0 for the first of all."""
        kill = self.last(victim, at_s)
        return 0.0 if kill is None else kill.back_s

    def between(self, after_s: float, until_s: float) -> list[Kill]:
        """Return the kills of workers in ``(after_s, until_s]``, in order."""
        first = bisect.bisect_right(self._at, after_s)
        last = bisect.bisect_right(self._at, until_s)
        return [k for k in self.kills[first:last] if k.victim != SERVER]

    def up_s(self, worker: int) -> float:
        """Return how long a worker's processes are ready, of the horizon."""
        away_s = sum(min(k.back_s, self.horizon_s) - k.at_s for k in self._of[worker])
        return self.horizon_s - away_s


def _draw(setting: Setting) -> list[Kill]:
    random = Random(f"storm {setting.seed}")
    kills: list[Kill] = []
    back_s = dict.fromkeys(range(SERVER, setting.workers), 0.0)
    at_s = 0.0
    while setting.kills_per_hour > 0:
        at_s += random.expovariate(setting.kills_per_hour / 3600.0)
        if at_s >= setting.horizon_s:
            break
        up = [w for w in range(setting.workers) if back_s[w] <= at_s]
        hits_server = random.random() < setting.server_share and back_s[SERVER] <= at_s
        if not hits_server and not up:
            continue
        victim = SERVER if hits_server else random.choice(up)
        away_s = setting.server_restart_s
        if victim != SERVER:
            away_s = setting.restart_s * math.exp(random.gauss(0.0, setting.restart_spread))
        back_s[victim] = at_s + away_s
        kills.append(Kill(at_s, victim, back_s[victim]))
    return kills
