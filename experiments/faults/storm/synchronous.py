"""Synchronous groups under the same storm: mean gradients, one step at a time.

What torch's elastic launcher and torchft do is modelled, not run; where a time is not known, the
one that favours them is taken: a broken connection is noticed at once, checkpoints cost nothing,
the coordinator is asked for nothing while nothing changes, and joining never waits for a timeout.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np

from experiments.faults.storm.ledger import Ledger
from experiments.faults.storm.schedule import SERVER, Storm
from experiments.faults.storm.setting import Setting
from experiments.faults.storm.task import Digits

__all__ = ["MOMENTUM", "RATE", "run_elastic", "run_static"]

RATE = 0.3
"""Of 0.03, 0.1, 0.3 and 0.6 the one with the least loss of a calm run after 600 s."""
MOMENTUM = 0.7


class _Group:
    """The model that all members of a group hold, and their steps."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.storm = Storm(setting)
        self.ledger = Ledger(setting, self.storm)
        self._task = Digits(setting.seed)
        self._random = Random(f"group {setting.seed}")
        self.params = self._task.start()
        self.velocity = np.zeros_like(self.params)
        self.positions = [0] * setting.workers
        self.bytes = self.params.nbytes
        self.collective_s = setting.collective_s(self.bytes)
        self._next_look = 1

    def draw_s(self, members: Sequence[int]) -> dict[int, float]:
        """Draw how long each member computes."""
        return {w: self.setting.draw_compute_s(self._random) for w in members}

    def apply(self, members: Sequence[int], at_s: float) -> None:
        """Carry out a step with the mean gradient of some members, ending at a time."""
        s = self.setting
        self.look_until(at_s)
        batches = [self._task.batch(w, self.positions[w] + 1, s.batch) for w in members]
        x = np.concatenate([b[0] for b in batches])
        y = np.concatenate([b[1] for b in batches])
        self.velocity *= np.float32(MOMENTUM)
        self.velocity += self._task.gradient(self.params, x, y)
        self.params = self.params - np.float32(s.rate or RATE) * self.velocity
        for w in members:
            self.positions[w] += 1
            self.ledger.apply(at_s, w)
        self.ledger.groups.append(len(members))

    def look_until(self, at_s: float) -> None:
        """Measure the loss at the times before a step ends."""
        s = self.setting
        while self._next_look <= s.looks and s.horizon_s * self._next_look / s.looks < at_s:
            when_s = s.horizon_s * self._next_look / s.looks
            self.ledger.look(when_s, self._task.score(self.params))
            self._next_look += 1

    def break_off(self, drawn: dict[int, float], start_s: float, end_s: float) -> None:
        """Note a step that came to nothing: its kills, and what the others have computed."""
        gone = {k.victim: k.at_s for k in self.storm.between(start_s, end_s)}
        for w, need_s in drawn.items():
            had_s = gone.get(w, end_s) - start_s
            self.ledger.lost_steps += had_s >= need_s
            self.ledger.broken_s += had_s if had_s < need_s else 0.0

    def finish(self) -> Ledger:
        """Look to the end."""
        self.look_until(self.setting.horizon_s + 1.0)
        return self.ledger


def run_static(setting: Setting, *, checkpoints: bool) -> Ledger:
    """Train with a group that needs all its members.

    After a kill all wait for the replacement. It takes the model from the others; or, with
    checkpoints, everybody goes on from the last one.

    Args:
        setting: of the storm.
        checkpoints: which of the two.
    """
    group = _Group(setting)
    everyone = range(setting.workers)
    saved = (group.params, group.velocity, list(group.positions))
    saved_s, kept_steps, now_s = 0.0, 0, 0.0
    while now_s < setting.horizon_s:
        drawn = group.draw_s(everyone)
        end_s = now_s + max(drawn.values()) + group.collective_s
        kills = group.storm.between(now_s, end_s)
        if not kills:
            if end_s <= setting.horizon_s:
                group.apply(everyone, end_s)
            now_s = end_s
            if checkpoints and end_s - saved_s >= setting.checkpoint_s:
                saved = (group.params.copy(), group.velocity.copy(), list(group.positions))
                saved_s, kept_steps = end_s, len(group.ledger.groups)
            continue
        group.look_until(kills[0].at_s)
        group.break_off(drawn, now_s, kills[0].at_s)
        if checkpoints:
            _undo(group, kept_steps)
            group.params, group.velocity = saved[0].copy(), saved[1].copy()
            group.positions = list(saved[2])
        now_s = _all_back_s(group, kills[0].at_s)
        saved_s = now_s if checkpoints else saved_s
    return group.finish()


def _undo(group: _Group, kept_steps: int) -> None:
    """Take back the steps since a checkpoint."""
    ledger, workers = group.ledger, group.setting.workers
    undone = len(ledger.groups) - kept_steps
    ledger.lost_steps += undone * workers
    del ledger.groups[kept_steps:]
    del ledger.applied[kept_steps * workers :]


def _all_back_s(group: _Group, at_s: float) -> float:
    """Return when all members are connected again, after a kill."""
    setting, storm = group.setting, group.storm
    now_s = at_s
    while now_s < setting.horizon_s:
        back_s = max(storm.up_from(w, now_s) for w in (SERVER, *range(setting.workers)))
        if back_s > now_s:
            now_s = back_s
            continue
        done_s = now_s + setting.regroup_s + setting.carry_s(group.bytes)
        kills = storm.between(now_s, done_s)
        if not kills:
            return done_s
        now_s = kills[0].at_s
    return now_s


def run_elastic(setting: Setting) -> Ledger:
    """Train with a group that goes on with whoever is there, as torchft does.

    A step in which a member is killed is dropped by all. The next quorum waits until the dead
    member's heartbeat has run out, and forms while the next step is computed; so does a quorum that
    takes in who has come back. Newcomers take the model during their first step and give their
    first gradient with their second.

    Args:
        setting: of the storm.
    """
    group = _Group(setting)
    storm, horizon_s = group.storm, setting.horizon_s
    members = dict.fromkeys(range(setting.workers), 0.0)
    """When each member's process became ready."""
    now_s = 0.0
    while now_s < horizon_s:
        up = [w for w in range(setting.workers) if storm.is_up(w, now_s)]
        ready = {w: storm.up_since(w, now_s) for w in up}
        if not ready:
            now_s = min(storm.up_from(w, now_s) for w in range(setting.workers))
            continue
        present = [w for w in ready if members.get(w) == ready[w]] or list(ready)
        gone = [w for w in members if w not in present]
        joiners = [w for w in ready if w not in present]
        quorum_s = _quorum_s(group, now_s, gone, bool(gone or joiners))
        drawn = group.draw_s(present)
        healed_s = quorum_s + setting.carry_s(group.bytes) if joiners else now_s
        reached_s = max(now_s + max(drawn.values()), quorum_s, healed_s)
        end_s = reached_s + group.collective_s
        members = ready
        kills = [k for k in storm.between(now_s, end_s) if k.victim in ready]
        for w in joiners:
            group.ledger.joining_s += min(end_s, horizon_s) - ready[w]
        if kills:
            group.break_off(drawn, now_s, min(reached_s, horizon_s))
            now_s = max(reached_s, kills[0].at_s)
            continue
        if end_s <= horizon_s:
            group.apply(present, end_s)
        now_s = end_s
    return group.finish()


def _quorum_s(group: _Group, now_s: float, gone: Sequence[int], changes: bool) -> float:
    """Return when the members of the next step are agreed on and connected."""
    setting, storm = group.setting, group.storm
    if not changes:
        return now_s
    noticed_s = storm.up_from(SERVER, now_s)
    for w in gone:
        kill = storm.last(w, now_s)
        if kill is not None:
            noticed_s = max(noticed_s, kill.at_s + setting.heartbeat_s)
    return noticed_s + setting.round_trip_s + setting.regroup_s
