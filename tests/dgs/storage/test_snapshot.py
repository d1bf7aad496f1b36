"""Snapshots: there or not there, never in part; damage is found wherever it is."""

from __future__ import annotations

import errno
import json
import os
import random
import zlib
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dgs.errors import StateError
from dgs.storage.disk import FolderDisk
from dgs.storage.snapshot import (
    Snapshot,
    clean,
    list_snapshots,
    prune,
    read_snapshot,
    set_aside,
    snapshot_name,
    verify_snapshot,
    write_snapshot,
)
from tests.helpers.disks import ForgetfulDisk, PowerLossError

SEEDS = range(8)
DTYPES = ["float32", "float64", "int64", "uint64", "uint32", "uint8", "bool"]
ARRAYS = hnp.arrays(st.sampled_from(DTYPES), hnp.array_shapes(min_dims=0, min_side=0))
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
FACTS = st.dictionaries(
    st.text(max_size=5),
    st.recursive(
        st.none() | st.booleans() | st.integers() | FLOATS | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=5,
    ).filter(
        lambda value: json.loads(json.dumps(value)) == value and "Infinity" not in repr(value)
    ),
    max_size=3,
)


def arrays(position: int) -> dict[str, npt.NDArray[Any]]:
    return {"theta": np.arange(position, position + 4, dtype=np.float32)}


def snapshot(position: int) -> Snapshot:
    """Return a snapshot whose content tells its position."""
    parts = {"model": partial(arrays, position), "replicas-0": partial(arrays, position + 1)}
    return Snapshot(position, {"run": 7, "at": position}, parts)


def check(disk: ForgetfulDisk, position: int) -> None:
    """Make sure that a snapshot is what was written."""
    assert verify_snapshot(disk, position) == []
    facts, parts = read_snapshot(disk, position)
    assert facts == {"run": 7, "at": position}
    assert list(parts) == ["model", "replicas-0"]
    for extra, part in enumerate(parts.values()):
        np.testing.assert_array_equal(part["theta"], arrays(position + extra)["theta"])


def sizes(disk: ForgetfulDisk) -> dict[str, int]:
    return {name: len(disk.open(name).read()) for name in disk.names()}


def positions(disk: ForgetfulDisk) -> list[int]:
    return [entry.position for entry in list_snapshots(disk)]


@given(
    parts=st.dictionaries(
        st.text("abz09_-", min_size=1, max_size=5), st.dictionaries(st.text(), ARRAYS, max_size=3)
    ),
    facts=FACTS,
    position=st.integers(0, 2**63),
)
def test_what_is_written_is_read(
    parts: dict[str, dict[str, npt.NDArray[Any]]], facts: dict[str, Any], position: int
) -> None:
    disk = ForgetfulDisk()
    makers: dict[str, Any] = {part: partial(dict, named) for part, named in parts.items()}
    written = write_snapshot(disk, Snapshot(position, facts, makers))
    assert written == sum(sizes(disk).values())
    entry = list_snapshots(disk)[0]
    assert entry == (position, written, facts, ())
    found = read_snapshot(disk, position)
    assert found.facts == facts
    assert found.parts.keys() == parts.keys()
    for part, named in parts.items():
        assert found.parts[part].keys() == named.keys()
        for name, array in named.items():
            read = found.parts[part][name]
            assert (read.dtype, read.shape) == (array.dtype, array.shape)
            assert read.tobytes() == array.tobytes()
            assert read.flags.writeable
            assert read.flags.aligned


def test_arrays_of_any_layout_are_written_as_they_look() -> None:
    grid = np.arange(12, dtype=np.float32).reshape(3, 4)
    views = {"turned": grid.T, "skipped": grid[::2, ::-1], "swapped": grid.astype(">f4")}
    disk = ForgetfulDisk()
    write_snapshot(disk, Snapshot(0, {}, {"a": lambda: views}))
    read = read_snapshot(disk, 0).parts["a"]
    for name, view in views.items():
        np.testing.assert_array_equal(read[name], view)


def test_one_part_is_in_memory_at_a_time() -> None:
    disk = ForgetfulDisk()
    finished: list[int] = []

    def make(number: int) -> Mapping[str, npt.NDArray[Any]]:
        finished.append(sum(name.endswith(".safetensors") for name in disk.names()))
        return {"a": np.full(number, number)}

    write_snapshot(disk, Snapshot(0, {}, {f"p{n}": partial(make, n) for n in range(3)}))
    assert finished == [0, 1, 2]


def test_snapshots_are_listed_newest_first_and_all_but_two_are_pruned() -> None:
    disk = ForgetfulDisk()
    for position in (3, 20, 100):
        write_snapshot(disk, snapshot(position))
    assert positions(disk) == [100, 20, 3]
    assert prune(disk) == 20
    assert positions(disk) == [100, 20]
    assert len(disk.names()) == 6
    assert prune(disk, keep=1) == 100
    assert len(disk.names()) == 3
    check(disk, 100)


def test_nothing_is_pruned_where_nothing_is() -> None:
    assert prune(ForgetfulDisk()) == 0


def test_damaged_snapshot_does_not_count_among_those_kept() -> None:
    disk = ForgetfulDisk()
    for position in (1, 2, 3):
        write_snapshot(disk, snapshot(position))
    disk.damage(snapshot_name(3), bytearray.clear)
    assert prune(disk) == 1
    assert positions(disk) == [3, 2, 1]
    assert "are not a manifest" in list_snapshots(disk)[0].problems[0]


def test_snapshot_of_the_same_position_is_replaced() -> None:
    disk = ForgetfulDisk()
    write_snapshot(disk, Snapshot(5, {}, {"model": lambda: {"old": np.ones(2)}}))
    write_snapshot(disk, snapshot(5))
    check(disk, 5)
    assert len(clean(disk)) == 1
    check(disk, 5)


@pytest.mark.parametrize("part", ["", "a/b", "A", "a.b", "../x"])
def test_parts_have_plain_names(part: str) -> None:
    with pytest.raises(ValueError, match="does not name a part"):
        write_snapshot(ForgetfulDisk(), Snapshot(0, {}, {part: dict}))


@pytest.mark.parametrize("facts", [{"a": float("nan")}, {"a": np.ones(1)}, {"a": b""}])
def test_facts_are_json(facts: dict[str, Any]) -> None:
    disk = ForgetfulDisk()
    with pytest.raises((TypeError, ValueError)):
        write_snapshot(disk, Snapshot(0, facts, {}))
    assert positions(disk) == []


def test_keys_that_json_turns_into_text_do_not_upset_the_checksum() -> None:
    disk = ForgetfulDisk()
    write_snapshot(disk, Snapshot(0, {"by": {2: "a", 10: "b"}}, {}))
    assert read_snapshot(disk, 0).facts == {"by": {"2": "a", "10": "b"}}


# --- power losses and failing disks


def test_power_loss_at_every_operation_leaves_whole_snapshots() -> None:
    total = ForgetfulDisk()
    _work(total, [])
    for number in range(total.operations + 1):
        for seed in SEEDS:
            rng = random.Random(f"{number} {seed}")
            disk = ForgetfulDisk(rng)
            disk.fail_at(number)
            promised: list[int] = [-1]
            with suppress(PowerLossError, StateError):
                _work(disk, promised)
            found = disk.after_power_loss(rng) if seed % 4 else disk.after_kill()
            assert {-1, *positions(found)} >= {promised[-1]}
            for position in positions(found):
                check(found, position)
            clean(found)
            assert len(found.names()) == 3 * len(positions(found))
            for position in positions(found):
                check(found, position)


def _work(disk: ForgetfulDisk, promised: list[int]) -> None:
    """Write and prune; `promised` gets the newest snapshot that has to be found."""
    for position in (0, 4, 9, 9, 12):
        write_snapshot(disk, snapshot(position))
        promised.append(position)
        prune(disk)


def test_replacing_a_snapshot_never_loses_the_one_that_was_there() -> None:
    for number in range(20):
        for seed in SEEDS:
            rng = random.Random(f"{number} {seed}")
            disk = ForgetfulDisk(rng)
            write_snapshot(disk, Snapshot(5, {"old": 1}, {"model": lambda: {"a": np.ones(9)}}))
            disk.fail_at(disk.operations + number)
            with suppress(PowerLossError, StateError):
                write_snapshot(disk, Snapshot(5, {"new": 1}, {"model": lambda: {"a": np.ones(3)}}))
            found = disk.after_power_loss(rng)
            facts, parts = read_snapshot(found, 5)
            assert len(parts["model"]["a"]) == (9 if "old" in facts else 3)


def test_disk_that_fails_is_explained_and_takes_the_next_snapshot() -> None:
    total = ForgetfulDisk()
    write_snapshot(total, snapshot(1))
    write_snapshot(total, snapshot(2))
    for number in range(total.operations // 2, total.operations):
        disk = ForgetfulDisk()
        write_snapshot(disk, snapshot(1))
        disk.fail_at(number, partial(OSError, errno.ENOSPC, os.strerror(errno.ENOSPC)))
        with pytest.raises(StateError, match=r"cannot write snapshot-0*2\.json .* No space left"):
            write_snapshot(disk, snapshot(2))
        check(disk, 1)
        disk.trouble = lambda number, kind: None
        write_snapshot(disk, snapshot(2))
        check(disk, 2)
        clean(disk)
        assert len(disk.names()) == 6


def test_clean_takes_what_is_unfinished_and_nothing_else() -> None:
    disk = ForgetfulDisk()
    write_snapshot(disk, snapshot(1))
    kept = disk.names()
    write_snapshot(disk, snapshot(2))
    disk.remove(snapshot_name(2))
    for name in ("log-1.wal.new", "snapshot-1.json.new"):
        disk.open(name).close()
    for name in ("notes.new", "damaged-snapshot-1.json"):
        disk.open(name).close()
    removed = clean(disk)
    assert len(removed) == 4
    assert disk.names() == sorted([*kept, "damaged-snapshot-1.json", "notes.new"])


def test_parts_of_a_damaged_manifest_are_kept_for_repair() -> None:
    disk = ForgetfulDisk()
    write_snapshot(disk, snapshot(1))
    disk.damage(snapshot_name(1), bytearray.clear)
    assert clean(disk) == []
    assert len(disk.names()) == 3


def test_set_aside_leaves_the_older_one_to_be_used() -> None:
    disk = ForgetfulDisk()
    write_snapshot(disk, snapshot(1))
    write_snapshot(disk, snapshot(2))
    moved = set_aside(disk, 2)
    assert len(moved) == 3
    assert positions(disk) == [1]
    assert clean(disk) == []
    assert set(moved) < set(disk.names())


# --- damage


def test_every_damaged_byte_is_found_and_the_file_named() -> None:
    whole = ForgetfulDisk()
    write_snapshot(whole, snapshot(3))
    for name, size in sizes(whole).items():
        for offset in range(size):
            disk = ForgetfulDisk()
            write_snapshot(disk, snapshot(3))
            disk.damage(name, partial(_flip, offset=offset, value=1 << offset % 8))
            _is_refused(disk, name)


def _flip(data: bytearray, offset: int, value: int) -> None:
    data[offset] ^= value


def _is_refused(disk: ForgetfulDisk, name: str) -> None:
    with pytest.raises(StateError, match=name) as caught:
        read_snapshot(disk, 3)
    if "newer release" not in str(caught.value):
        problems = verify_snapshot(disk, 3)
        assert len(problems) == 1
        assert problems[0].startswith(name)


def test_every_missing_end_is_found_and_the_file_named() -> None:
    whole = ForgetfulDisk()
    write_snapshot(whole, snapshot(3))
    for name, size in sizes(whole).items():
        for left in range(size):
            disk = ForgetfulDisk()
            write_snapshot(disk, snapshot(3))
            disk.damage(name, partial(_shorten, size=left))
            _is_refused(disk, name)


def _shorten(data: bytearray, size: int) -> None:
    del data[size:]


def test_missing_part_is_found_at_first_sight_and_reading_creates_nothing() -> None:
    disk = ForgetfulDisk()
    write_snapshot(disk, snapshot(3))
    part = next(name for name in disk.names() if ".model." in name)
    disk.remove(part)
    names = disk.names()
    assert list_snapshots(disk)[0].problems == (f"{part}: not there",)
    assert verify_snapshot(disk, 3) == [f"{part}: not there"]
    with pytest.raises(StateError, match="not there: run 'dgs snapshot repair --state-dir disk'"):
        read_snapshot(disk, 3)
    with pytest.raises(StateError, match="not there"):
        read_snapshot(disk, 4)
    assert disk.names() == names


def test_damage_is_told_with_what_was_found_and_expected() -> None:
    disk = ForgetfulDisk()
    write_snapshot(disk, snapshot(3))
    part = next(name for name in disk.names() if ".model." in name)
    size = sizes(disk)[part]
    disk.damage(part, partial(_shorten, size=10))
    with pytest.raises(
        StateError, match=rf"^disk/{part}: 10 bytes, expected {size}: run 'dgs snap"
    ):
        read_snapshot(disk, 3)


@given(noise=st.binary(max_size=50) | st.just(b"[" * 100_000) | st.just(b"1" * 10_000))
def test_any_bytes_in_place_of_the_manifest_are_refused(noise: bytes) -> None:
    disk = ForgetfulDisk()
    write_snapshot(disk, snapshot(3))
    disk.damage(snapshot_name(3), lambda data: data.__setitem__(slice(None), noise))
    with pytest.raises(StateError):
        read_snapshot(disk, 3)
    assert list_snapshots(disk)[0].problems


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"../x": {"bytes": 1, "crc32": 1}}},
        {"files": {"model": {"bytes": 1}}},
        {"files": [1]},
        {"files": {"model": {"bytes": 1, "crc32": "1"}}},
        {"position": 4},
        {"format": "1"},
    ],
)
def test_sealed_nonsense_is_refused_too(change: dict[str, Any]) -> None:
    disk = ForgetfulDisk()
    write_snapshot(disk, snapshot(3))
    disk.damage(snapshot_name(3), partial(_rewrite, change=change))
    names = disk.names()
    with pytest.raises(StateError, match=r"snapshot-0*3"):
        read_snapshot(disk, 3)
    assert disk.names() == names


def _rewrite(data: bytearray, change: dict[str, Any]) -> None:
    """Change a manifest with a right checksum."""
    content = json.loads(data) | change
    del content["crc32"]
    dump = partial(json.dumps, sort_keys=True, separators=(",", ":"))
    content["crc32"] = zlib.crc32(dump(content).encode())
    data[:] = dump(content).encode() + b"\n"


def test_newer_format_is_refused_by_its_number() -> None:
    disk = ForgetfulDisk()
    write_snapshot(disk, snapshot(3))
    disk.damage(snapshot_name(3), partial(_rewrite, change={"format": 9}))
    for attempt in (read_snapshot, verify_snapshot):
        with pytest.raises(StateError, match="written by a newer release: it has format 9, this"):
            attempt(disk, 3)


def test_real_folder_keeps_snapshots(tmp_path: Path) -> None:
    with FolderDisk(tmp_path) as disk:
        for position in (1, 2, 3):
            write_snapshot(disk, snapshot(position))
    with FolderDisk(tmp_path) as disk:
        assert clean(disk) == []
        assert prune(disk) == 2
        check(disk, 2)
        check(disk, 3)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == sorted(
        ["", *[".json"] * 2, *[".safetensors"] * 4]
    )
