"""A repair loses no more than the damage did, deletes nothing, and may be interrupted."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from dgs.durable import Durable
from dgs.errors import StateError
from dgs.state import fingerprint
from dgs.storage.repair import carry_out, plan_repair
from dgs.storage.scratch import ScratchDisk
from tests.helpers.disks import ForgetfulDisk, PowerLossError
from tests.helpers.states import Made, fill

SNAPSHOTS = (3, 6)
NEWEST, OLDER, END = 18, 12, 28
"""Requests: the two workers join, one gives the model and joins again, and exchange in turn."""

Harm = Callable[[ForgetfulDisk, str, random.Random], None]


@pytest.fixture(scope="module")
def made() -> tuple[ForgetfulDisk, Made]:
    disk = ForgetfulDisk()
    return disk, fill([disk], SNAPSHOTS)


def contents(disk: ForgetfulDisk) -> dict[str, bytes]:
    return {name: disk.open(name).read() for name in disk.names()}


def start(disk: ForgetfulDisk) -> tuple[int, str]:
    """Start on a copy; return position and fingerprint."""
    durable = Durable.open(disk.after_kill())
    return durable.position, fingerprint(durable.core.state)


def flip(disk: ForgetfulDisk, name: str, rng: random.Random) -> None:
    def change(data: bytearray) -> None:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)

    disk.damage(name, change)


def truncate(disk: ForgetfulDisk, name: str, rng: random.Random) -> None:
    def change(data: bytearray) -> None:
        del data[rng.randrange(len(data)) :]

    disk.damage(name, change)


def remove(disk: ForgetfulDisk, name: str, rng: random.Random) -> None:
    disk.remove(name)


def scramble(disk: ForgetfulDisk, name: str, rng: random.Random) -> None:
    def change(data: bytearray) -> None:
        at = rng.randrange(len(data))
        data[at : at + 200] = rng.randbytes(min(200, len(data) - at))

    disk.damage(name, change)


def test_sound_state_needs_no_repair(made: tuple[ForgetfulDisk, Made]) -> None:
    disk = made[0].after_kill()
    before = contents(disk)
    plan = plan_repair(disk)
    assert plan.is_empty
    assert [entry.position for entry in plan.sound] == [NEWEST, OLDER]
    assert carry_out(disk, plan) == []
    assert contents(disk) == before


@pytest.mark.parametrize("harm", [flip, truncate, remove, scramble])
@pytest.mark.parametrize("seed", range(12))
def test_after_any_damage_a_repaired_server_starts_from_a_state_that_was(
    made: tuple[ForgetfulDisk, Made], harm: Harm, seed: int
) -> None:
    rng = random.Random(seed)
    disk, history = made[0].after_kill(), made[1].history[0]
    harmed = rng.sample(disk.names(), rng.choice([1, 1, 2]))
    for name in harmed:
        harm(disk, name, rng)
    before = contents(disk)
    try:
        plan = plan_repair(disk)
    except StateError:  # both snapshots, or a field that tells of another run or release
        assert contents(disk) == before
        return
    carry_out(disk, plan)
    position, found = start(disk)
    assert found == history[position]
    if plan.cut is not None:
        assert position == plan.cut.position
        assert plan.cut.lost_records <= END - position
    elif f"log-{NEWEST:020d}.wal" not in harmed:  # its end may look as after a torn write
        assert position == END
    now = contents(disk)
    assert set(before.values()) <= set(now.values()), "nothing is deleted"
    again = plan_repair(disk)
    assert again.is_empty


def test_older_snapshot_and_its_log_make_up_for_the_newest(
    made: tuple[ForgetfulDisk, Made],
) -> None:
    for name in [n for n in made[0].names() if n.startswith(f"snapshot-{NEWEST:020d}")]:
        disk = made[0].after_kill()
        remove(disk, name, random.Random(0))
        if not name.endswith(".json"):  # without its manifest it is no snapshot any more
            with pytest.raises(StateError, match="dgs snapshot repair"):
                start(disk)
        plan = plan_repair(disk)
        carry_out(disk, plan)
        assert start(disk) == (END, made[1].fingerprints[0])


def test_interrupted_repair_is_refused_or_done_and_can_be_begun_again(
    made: tuple[ForgetfulDisk, Made],
) -> None:
    broken = made[0].after_kill()
    rng = random.Random(1)
    flip(broken, next(n for n in broken.names() if n.startswith(f"snapshot-{NEWEST:020d}.m")), rng)
    broken.damage(f"log-{OLDER:020d}.wal", lambda data: data.__setitem__(300, data[300] ^ 1))
    whole = broken.after_kill()
    plan = plan_repair(whole)
    assert plan.cut is not None
    assert plan.cut.later == (NEWEST,)
    whole.operations = 0
    carry_out(whole, plan)
    wanted = start(whole)
    assert wanted[0] == plan.cut.position < NEWEST
    for stop in range(whole.operations):
        disk = broken.after_kill()
        disk.fail_at(disk.operations + stop)
        with pytest.raises(PowerLossError):
            carry_out(disk, plan_repair(disk))
        kept = set(contents(disk.after_kill()).values())
        assert set(contents(broken).values()) <= kept, "nothing is deleted"
        for found in (disk.after_kill(), disk.after_power_loss(random.Random(stop))):
            try:
                assert start(found) == wanted
            except StateError:
                carry_out(found, plan_repair(found))
                assert start(found) == wanted


def test_damaged_files_of_an_earlier_repair_are_not_written_over(
    made: tuple[ForgetfulDisk, Made],
) -> None:
    disk, seen = made[0].after_kill(), set[bytes]()
    for seed in range(3):
        durable = Durable.open(disk)
        durable.finish_snapshot(durable.begin_snapshot())
        name = f"snapshot-{durable.position:020d}.json"
        durable.close()
        flip(disk, name, random.Random(seed))
        seen.add(disk.open(name).read())
        carry_out(disk, plan_repair(disk))
    assert seen <= set(contents(disk).values())


def test_scratch_shows_changes_that_the_folder_never_sees(
    made: tuple[ForgetfulDisk, Made],
) -> None:
    disk = made[0].after_kill()
    before = contents(disk)
    scratch = ScratchDisk(disk)
    durable = Durable.open(scratch)
    durable.finish_snapshot(durable.begin_snapshot())
    durable.close()
    assert f"snapshot-{END:020d}.json" in scratch.names()
    assert contents(disk) == before
    for attempt in (lambda: scratch.remove("a"), lambda: scratch.rename("a", "b")):
        with pytest.raises(FileNotFoundError):
            attempt()
