"""A storm of kills does to each method what its record says, and the same each time."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.faults.storm import asynchronous, run
from experiments.faults.storm.ledger import Ledger
from experiments.faults.storm.run import METHODS, Job
from experiments.faults.storm.schedule import SERVER, Storm
from experiments.faults.storm.setting import Setting
from experiments.faults.storm.task import SHAPES, Digits, Floats

SMALL = Setting(seed=1, workers=4, horizon_s=40.0, restart_s=5.0, looks=4)
STORM = replace(SMALL, kills_per_hour=900.0, server_share=0.2)
ONE_STEP_S = 3.0
"""Longer than any step and its exchange."""


@pytest.mark.parametrize("method", METHODS)
def test_equal_seeds_give_equal_numbers(method: str) -> None:
    one, same, other = (
        METHODS[method](setting).report() for setting in (STORM, STORM, replace(STORM, seed=2))
    )
    assert one == same != other
    assert one["kills"] > 5


@pytest.mark.parametrize("method", METHODS)
def test_without_kills_all_take_part_and_nothing_is_lost(method: str) -> None:
    report = METHODS[method](SMALL).report()
    assert report["participation_of_ready"] == report["participation_of_all"] == 1.0
    assert (report["lost_steps"], report["broken_s"], report["up_share"]) == (0, 0.0, 1.0)
    assert report["loss"] < report["curve"][0][2]
    compared = run.compared(report, report)
    assert compared["goodput_of_calm"] == compared["goodput_of_available"] == 1.0


def test_all_methods_meet_the_same_kills() -> None:
    kills = [METHODS[method](STORM).storm.kills for method in METHODS]
    assert all(k == kills[0] for k in kills)
    assert {k.victim for k in kills[0]} >= {SERVER, 0, 1}


def test_a_kill_costs_one_update_at_most_and_only_its_own_worker() -> None:
    ledger = asynchronous.run_asynchronous(STORM)  # raises where data is skipped or used twice
    on_workers = [k for k in ledger.storm.kills if k.victim != SERVER]
    assert ledger.lost_steps <= len(on_workers)
    assert ledger.broken_s <= len(on_workers) * ONE_STEP_S
    assert ledger.notes["replayed_requests"] > 0
    for worker in range(STORM.workers):
        at_s = [t for t, w in ledger.applied if w == worker]
        gaps = [(a, b) for a, b in pairwise(at_s) if b - a > ONE_STEP_S]
        mine = [*ledger.storm.of(worker), *ledger.storm.of(SERVER)]
        assert all(any(a - ONE_STEP_S <= k.at_s <= b for k in mine) for a, b in gaps)


def test_dead_workers_push_nothing() -> None:
    # with 200 ms each way, many are killed while a request or its reply is on the wire
    setting = replace(STORM, horizon_s=80.0, round_trip_s=0.4)
    ledger = asynchronous.run_asynchronous(setting)
    kills = [k for k in ledger.storm.kills if k.victim != SERVER]
    assert len(kills) > 10
    for kill in kills:
        late_s = kill.at_s + setting.round_trip_s  # what was on the wire has arrived
        assert not any(late_s < t < kill.back_s for t, w in ledger.applied if w == kill.victim)


def _far(one: Floats, other: Floats) -> float:
    return float(np.abs(one - other).sum())


def test_a_killed_worker_comes_back_with_the_model_but_without_velocity(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waiting: dict[bool, list[float]] = {True: [], False: []}
    begin = asynchronous._Trainee._begin

    def watched(self: asynchronous._Trainee, joined: asynchronous.Joined) -> None:
        begin(self, joined)
        held = max(float(t.abs().max()) for t in self._worker._rule.state().values())
        waiting[joined.earlier > 0].append(held)
        base = self._worker.base.numpy()  # others have pushed while it was on its way
        assert joined.earlier == 0 or _far(base, self._site.model) < _far(base, self._task.start())

    monkeypatch.setattr(asynchronous._Trainee, "_begin", watched)
    storm = replace(STORM, server_share=0.0)
    kills = Storm(storm).kills
    asynchronous.run_asynchronous(storm)
    assert len(waiting[True]) >= len([k for k in kills if k.back_s < 39.0]) > 2
    assert set(waiting[True]) == {0.0}


def test_a_static_group_stands_still_until_the_killed_one_is_back() -> None:
    ledger = METHODS["static"](replace(STORM, server_share=0.0))
    assert ledger.storm.kills
    for kill in ledger.storm.kills:
        assert not any(kill.at_s < t < kill.back_s for t, _ in ledger.applied)


def test_an_elastic_group_goes_on_with_the_others_once_it_has_noticed() -> None:
    setting = replace(SMALL, seed=5, kills_per_hour=100.0, server_share=0.0, restart_s=20.0)
    ledger = METHODS["elastic"](setting)
    (kill, *_) = ledger.storm.kills
    away = [(t, w) for t, w in ledger.applied if kill.at_s < t < kill.back_s]
    assert away
    assert min(t for t, _ in away) > kill.at_s + setting.heartbeat_s
    assert kill.victim not in {w for _, w in away}
    assert set(ledger.groups) >= {setting.workers, setting.workers - 1}


def test_checkpoints_of_a_static_group_undo_what_came_after() -> None:
    kept, undone = (METHODS[m](STORM) for m in ("static", "static, checkpoints"))
    assert len(undone.applied) < len(kept.applied)
    assert undone.lost_steps > kept.lost_steps


def test_participation_counts_whoever_gave_an_update_in_a_window() -> None:
    setting = replace(SMALL, workers=2, horizon_s=10.0)
    ledger = Ledger(setting, Storm(setting), applied=[(1.0, 0), (2.0, 0), (6.0, 0), (7.0, 1)])
    assert ledger.participation(5.0) == (0.75, 0.75)


def test_gradient_of_the_task_is_that_of_its_loss() -> None:
    task = Digits(3)
    flat, (x, y) = task.start(), task.batch(0, 1, 8)
    leaf = torch.tensor(flat, requires_grad=True)
    pieces = torch.split(leaf, [int(np.prod(s)) for s in SHAPES.values()])
    w1, b1, w2, b2 = (p.reshape(s) for p, s in zip(pieces, SHAPES.values(), strict=True))
    scores = torch.relu(torch.from_numpy(x) @ w1 + b1) @ w2 + b2
    torch.nn.functional.cross_entropy(scores, torch.from_numpy(y)).backward()
    assert leaf.grad is not None
    np.testing.assert_allclose(task.gradient(flat, x, y), leaf.grad.numpy(), atol=1e-6)


def test_cases_hold_median_and_range_over_seeds() -> None:
    calm = [Job("elastic", replace(SMALL, seed=s)) for s in range(3)]
    stormy = [Job("elastic", replace(STORM, seed=s)) for s in range(3)]
    cases = run.together({job: METHODS["elastic"](job.setting).report() for job in calm + stormy})
    one, two = cases.values()
    assert one["figures"]["goodput_of_calm"] == [1.0, 1.0, 1.0]
    middle, least, most = two["figures"]["goodput_of_calm"]
    assert least <= middle <= most < 1.0
    assert len(two["runs"]) == 3


def test_command_writes_its_report_and_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    out = tmp_path / "storm.json"
    given = ["--workers", "2", "--hours", "0.01", "--seeds", "1", "--kills-per-hour", "0,900"]
    arguments = parser.parse_args([*given, "--restart-s", "2", "--jobs", "1", "--json", str(out)])
    assert run.main(arguments) == 0
    assert len(json.loads(out.read_text())["virtual"]) == 2 * len(METHODS)
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["storm-figures.png", "storm-loss.png"]
