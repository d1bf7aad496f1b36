"""What keeps a server from starting on a damaged state directory, and how to set it aside.

A plan is made first and changes nothing. Carrying it out renames what is damaged to "damaged-..."
and deletes nothing; it may be interrupted at any point and begun again: until its last step the
folder is refused as before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Final

from dgs.errors import StateError
from dgs.storage.disk import Disk, explained
from dgs.storage.records import (
    RECORD_BYTES,
    RECORD_MAGIC,
    Found,
    encode_segment_header,
    find_record,
    header_checksum,
    peek_record,
    segment_name,
)
from dgs.storage.snapshot import Entry, list_snapshots, set_aside, snapshot_name, verify_snapshot
from dgs.storage.wal import SegmentFile, list_segments

__all__ = ["Cut", "Plan", "carry_out", "find_cut", "holds_state", "plan_repair"]

ASIDE: Final = ".new"
DAMAGED: Final = "damaged-"


@dataclass(frozen=True)
class Cut:
    """Where a damaged log has to end, so that a server can go on from there."""

    position: int
    """Requests that are left."""

    why: str
    """What is wrong behind them."""

    keep: tuple[int, int] | None = None
    """First record of the damaged segment, and its bytes that stay; None if all of it is sound."""

    begin: int | None = None
    """First record of a segment to be made, where none leads up to the position."""

    later: tuple[int, ...] = ()
    """First records of the segments that cannot be used."""

    lost_bytes: int = 0
    """Bytes that are not used."""

    lost_records: int = 0
    """Requests in them, as far as can be told: at least so many."""


@dataclass(frozen=True)
class Plan:
    """What a repair would do."""

    run: int
    """Number of the server's state."""

    sound: tuple[Entry, ...]
    """Snapshots without damage, the newest first: a server starts from that one."""

    damaged: dict[int, list[str]] = field(default_factory=dict)
    """What is wrong with each of the others, by position."""

    cut: Cut | None = None
    """What is wrong with the log; None if nothing."""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to repair."""
        return not self.damaged and self.cut is None


def holds_state(names: Iterable[str]) -> bool:
    """Tell by the names of its files whether a folder holds a server's state, or what is left."""
    return any(
        name.startswith(("snapshot-", "log-")) and name.endswith((".json", ".wal"))
        for name in names
    )


def plan_repair(disk: Disk) -> Plan:
    """Read everything that a server would start from, and find out what has to be set aside.

    Raises:
        StateError: there is nothing to go on from, or a part is of a newer release, or of another
            server; or the disk fails.
    """
    entries = list_snapshots(disk)
    found = {entry.position: verify_snapshot(disk, entry.position) for entry in entries}
    damaged = {position: problems for position, problems in found.items() if problems}
    sound = tuple(entry for entry in entries if not found[entry.position])
    if not sound:
        raise _no_snapshot(disk, damaged)
    run = sound[0].facts["run"]
    return Plan(run, sound, damaged, find_cut(disk, run, sound[0].position))


def _no_snapshot(disk: Disk, damaged: dict[int, list[str]]) -> StateError:
    if not damaged:
        return StateError(
            f"{disk.label} holds no snapshot that a server could start from: the files snapshot-* "
            "were removed; put them back"
        )
    problems = "; ".join(text for texts in damaged.values() for text in texts)
    return StateError(
        f"{disk.label} holds no sound snapshot that a server could start from ({problems}); put "
        f"the files back. Where a model is left, 'dgs snapshot export --state-dir {disk.label} "
        "--out FILE' saves it, and 'dgs server --init FILE' starts from it in another folder"
    )


def find_cut(disk: Disk, run: int, start: int) -> Cut | None:
    """Read the log from a snapshot on; return where it has to be cut, if it is damaged.

    Args:
        disk: where it is.
        run: number of the server's state.
        start: position of the snapshot.

    Raises:
        StateError: a segment is of a newer release or of another server; or the disk fails.
    """
    with explained(disk, "read the log"):
        firsts = list_segments(disk)
        later = [first for first in firsts if first >= start]
        if not firsts and not start:
            return None  # made, but never used
        if later[:1] != [start]:  # each snapshot begins a segment
            why = f"{disk.label}: there is no {segment_name(start)}, where the log goes on"
            return _counted(disk, run, Cut(start, why, begin=start, later=tuple(later)))
        return _walk(disk, run, later)


def _walk(disk: Disk, run: int, firsts: list[int]) -> Cut | None:
    """Find the cut in segments of which the first one begins at the snapshot."""
    end = firsts[0]
    for number, first in enumerate(firsts):
        if first != end:
            why = (
                f"{disk.label}: the log goes on in {segment_name(first)}, expected it to go on "
                f"with record {end}: a file is missing"
            )
            return _counted(disk, run, Cut(end, why, later=tuple(firsts[number:])))
        segment = SegmentFile(disk, run, first)
        try:
            for _ in segment.walk(last=first == firsts[-1]):
                pass
        except StateError:
            keep, behind = (first, segment.good_bytes), tuple(firsts[number + 1 :])
            return _counted(disk, run, Cut(segment.end, segment.torn, keep, later=behind))
        end = segment.end
    return None


def _counted(disk: Disk, run: int, cut: Cut) -> Cut:
    """Add what is lost."""
    unused, known = 0, cut.position
    pieces = [(first, 0) for first in cut.later]
    for first, good in [*([cut.keep] if cut.keep else []), *pieces]:
        data = _read(disk, segment_name(first))
        unused += len(data) - good
        known = max(known, first, _last_position(data, run, first, good))
    return replace(cut, lost_bytes=unused, lost_records=known - cut.position)


def _last_position(data: bytes, run: int, first: int, offset: int) -> int:
    """Return the position after the last sound record behind an offset; 0 if there is none."""
    view, last = memoryview(data), 0
    seed = header_checksum(encode_segment_header(run, first))
    most = first + len(data) // RECORD_BYTES
    while (offset := data.find(RECORD_MAGIC, offset)) >= 0:
        claim = peek_record(view, offset)
        found = find_record(view, offset, seed) if claim and claim[0] <= most else ""
        if isinstance(found, Found):
            last, offset = max(last, found.position + 1), found.stop
        else:
            offset += 1
    return last


def carry_out(disk: Disk, plan: Plan) -> list[str]:
    """Do what a plan says; nothing is deleted.

    Returns:
        The names of the files that hold what was set aside.

    Raises:
        StateError: the disk fails; plan and carry out again.
    """
    aside: list[str] = []
    with explained(disk, "set aside what is damaged"):
        if plan.cut is not None:
            aside += _cut_log(disk, plan.run, plan.cut)
        for position in plan.damaged:
            prefix = snapshot_name(position).removesuffix("json")
            for name in [n for n in disk.names() if n.startswith(DAMAGED + prefix)]:
                disk.rename(name, _free_name(disk, name))
            aside += set_aside(disk, position)
    return aside


def _cut_log(disk: Disk, run: int, cut: Cut) -> list[str]:
    aside: list[str] = []
    if cut.keep is not None:
        first, good = cut.keep
        name = segment_name(first)
        data = _read(disk, name)
        aside.append(_free_name(disk, DAMAGED + name))
        _publish(disk, aside[0], data)  # the copy first: nothing is deleted, whatever happens
        _publish(disk, name, data[:good] if good else encode_segment_header(run, first))
    if cut.begin is not None:
        _publish(disk, segment_name(cut.begin), encode_segment_header(run, cut.begin))
    for first in cut.later:
        aside.append(_free_name(disk, DAMAGED + segment_name(first)))
        disk.rename(segment_name(first), aside[-1])
    disk.sync()
    return aside


def _free_name(disk: Disk, name: str) -> str:
    """Return a name like this one that no file has."""
    names, tried, number = set(disk.names()), name, 1
    while tried in names:
        number += 1
        tried = f"{DAMAGED}{number}-{name.removeprefix(DAMAGED)}"
    return tried


def _publish(disk: Disk, name: str, data: bytes) -> None:
    """Write a file, whole or not at all, durable on return."""
    with contextlib.closing(disk.open(name + ASIDE)) as file:
        file.truncate(0)
        file.write(data)
        file.sync()
    disk.rename(name + ASIDE, name)
    disk.sync()


def _read(disk: Disk, name: str) -> bytes:
    with contextlib.closing(disk.open(name)) as file:
        return file.read()
