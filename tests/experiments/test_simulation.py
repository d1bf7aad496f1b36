"""Simulated histories keep every promise, and a harness that says so notices every mistake."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from experiments.faults.simulation.clock import Clock, Trace
from experiments.faults.simulation.command import hunt, prepared, run_command
from experiments.faults.simulation.disk import Crashed, SimDisk
from experiments.faults.simulation.mutants import MUTANTS
from experiments.faults.simulation.weather import Weather
from experiments.faults.simulation.world import World

FOUND = (122, 356, 427)
"""Seeds that have found a defect of this library at some time; none may come back."""

MOST_SEEDS = 1500
"""Histories within which every mistake must be noticed; the rarest takes some hundreds."""


def make_disk(seed: int = 0) -> SimDisk:
    weather = Weather.draw(Random(0))
    weather.calm()
    return SimDisk("disk", weather, Random(seed), Trace(Clock()))


@pytest.mark.slow
def test_three_thousand_histories_keep_every_promise(tmp_path: Path) -> None:
    out = tmp_path / "simulation.json"
    assert run_command(["--seeds", "3000", "--out", str(out)]) == 0
    record = json.loads(out.read_text())["histories"]
    assert (record["seeds"], record["violations"]) == (3000, 0)
    assert record["recoveries"] > 3000
    assert record["snapshots"] > 1000
    assert record["rejoins"] > 100
    assert record["worker_resumes"] > 30


def test_some_histories_keep_every_promise() -> None:
    report = hunt(10_000, 150)
    assert report.failure is None, report.failure


@pytest.mark.parametrize("seed", FOUND)
def test_defects_that_were_found_do_not_come_back(seed: int) -> None:
    report = hunt(seed, 1)
    assert report.failure is None, report.failure


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS)
def test_every_mistake_is_noticed(mutant: str) -> None:
    report = hunt(0, MOST_SEEDS, mutant)
    assert report.failure is not None, f"{MOST_SEEDS} histories did not notice {mutant}"


def test_a_seed_decides_all_that_happens() -> None:
    digests = []
    for _ in range(2):
        with prepared():
            worlds = [World(seed) for seed in (3, 5, 8)]
            for world in worlds:
                world.run()
        digests.append([world.digest() for world in worlds])
    assert digests[0] == digests[1]
    assert len(set(digests[0])) == 3


def test_plain_and_compiled_kernels_give_the_same_history() -> None:
    plain = [World(seed) for seed in range(3)]
    for world in plain:
        world.run()
    with prepared():
        compiled = [World(seed) for seed in range(3)]
        for world in compiled:
            world.run()
    assert [w.digest() for w in plain] == [w.digest() for w in compiled]


def test_a_failing_seed_is_told_and_can_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    report = hunt(0, 50, "no-dedup")
    assert report.failure is not None
    seed = report.failure.seed
    assert run_command(["--from", str(seed), "--trace", "--mutant", "no-dedup"]) == 1
    told = capsys.readouterr()
    assert "acknowledged" in told.out
    assert "Violation" in told.err


def test_what_is_not_synced_may_be_lost_and_what_is_never_is() -> None:
    left = set()
    for seed in range(60):
        disk = make_disk(seed)
        file = disk.open("log")
        file.write(b"synced")
        file.sync()
        disk.sync()
        file.write(b" not synced")
        disk.die(power=True)
        left.add(disk.open("log").read())
    assert all(one.startswith(b"synced") for one in left)
    assert b"synced" in left
    assert b"synced not synced" in left
    assert len(left) > 2  # torn, too


def test_a_killed_process_loses_nothing_that_it_has_written() -> None:
    disk = make_disk()
    disk.open("log").write(b"written")
    disk.die(power=False)
    assert disk.open("log").read() == b"written"


def test_names_may_be_lost_until_the_folder_is_synced() -> None:
    found = set()
    for seed in range(40):
        disk = make_disk(seed)
        disk.open("a").sync()
        disk.sync()
        disk.rename("a", "b")
        disk.die(power=True)
        found.add(tuple(disk.names()))
    assert found == {("a",), ("b",)}


def test_the_files_of_a_dead_process_do_nothing_any_more() -> None:
    disk = make_disk()
    file = disk.open("log")
    disk.die(power=False)
    with pytest.raises(Crashed):
        file.write(b"late")
    assert disk.open("log").read() == b""


def test_a_failed_sync_is_not_made_good_by_the_next_one() -> None:
    left = set()
    for seed in range(40):
        disk = make_disk(seed)
        file = disk.open("log")
        disk.sync()
        file.write(b"lost?")
        disk._weather.bad_sync = 1.0
        with pytest.raises(OSError, match="input/output"):
            file.sync()
        disk._weather.bad_sync = 0.0
        file.sync()
        disk.die(power=True)
        left.add(disk.open("log").read())
    assert any(one != b"lost?" for one in left)
