"""Look at a state directory without a server: what is in it, whether it is sound, what it gives.

Everything is tried on a `ScratchDisk` by the very code that a server recovers with, so what is said
here is what a server would do; the folder itself is only read.
"""

from __future__ import annotations

from dataclasses import dataclass

from dgs.durable import Durable
from dgs.errors import StateError
from dgs.state import ServerState, fingerprint
from dgs.storage.disk import Disk
from dgs.storage.records import segment_name
from dgs.storage.repair import Cut, Plan, carry_out, find_cut, plan_repair
from dgs.storage.scratch import ScratchDisk
from dgs.storage.snapshot import list_snapshots, read_snapshot, set_aside
from dgs.storage.wal import list_segments

__all__ = [
    "Found",
    "Verified",
    "preview",
    "recovered",
    "verify",
    "words_for_cut",
]


@dataclass(frozen=True)
class Found:
    """The state that a server would go on from."""

    snapshot: int
    """Position of the snapshot that it starts from."""

    position: int
    """Requests in all."""

    version: int
    """Updates that the model has had."""

    workers: tuple[str, ...]
    """Who takes part."""

    fingerprint: str
    """Hash of everything that replies depend on."""

    torn: str
    """What a torn write left at the end of the log, which a start cuts off."""

    dropped: int
    """Sessions that have to join again, as this machine makes other replies than were given."""


@dataclass(frozen=True)
class Verified:
    """What a thorough look at a state directory gave."""

    problems: tuple[str, ...]
    """Damage; empty if the folder is sound."""

    found: Found | None
    """What a server would go on from; None where it could not start."""

    proof: str
    """How the older snapshot and the log agree with the newest one; empty where there is none."""

    is_startable: bool
    """Whether a server starts from the folder as it is."""


def preview(disk: Disk, plan: Plan) -> Found:
    """Recover, in memory, what a server would go on from after a repair.

    Raises:
        StateError: it would not start.
    """
    durable = recovered(disk, plan)
    try:
        return _found(durable)
    finally:
        durable.close()


def recovered(disk: Disk, plan: Plan) -> Durable:
    """Start, in memory and without changing the folder, as after a repair.

    Raises:
        StateError: what is left cannot be started from either.
    """
    scratch = ScratchDisk(disk)
    if not plan.is_empty:
        carry_out(scratch, plan)
    return Durable.open(scratch)


def _found(durable: Durable) -> Found:
    state, recovery = durable.core.state, durable.recovery
    return Found(
        snapshot=recovery.snapshot,
        position=durable.position,
        version=state.version,
        workers=tuple(sorted({session.worker for session in state.registry.sessions()})),
        fingerprint=fingerprint(state),
        torn=recovery.torn,
        dropped=recovery.dropped,
    )


def verify(disk: Disk) -> Verified:
    """Read everything in a state directory, recover in memory what it holds, and compare.

    Where two snapshots are there, the older one and the log have to give what the newer one is, bit
    for bit: all that a server does was done again, and came out the same.

    Raises:
        StateError: a part is of a newer release or of another server, or the disk fails.
    """
    try:
        plan = plan_repair(disk)
    except StateError as e:
        if isinstance(e.__cause__, OSError) or not list_snapshots(disk):
            raise
        return Verified((str(e),), None, "", is_startable=False)
    newest = plan.sound[0].position
    problems = [text for texts in plan.damaged.values() for text in texts]
    is_startable = plan.cut is None and all(position < newest for position in plan.damaged)
    if plan.cut is not None:
        problems.append(words_for_cut(plan.cut))
    found = None
    try:
        found = preview(disk, plan)
    except StateError as e:
        problems.append(str(e))
        is_startable = False
    proof = ""
    if found is not None and len(plan.sound) > 1:
        problem, proof = _prove(disk, plan)
        problems += [problem] if problem else []
    return Verified(tuple(problems), found, proof, is_startable)


def words_for_cut(cut: Cut) -> str:
    """Say what is wrong with a log, and what of it cannot be used."""
    some = f"at least {cut.lost_records:,}" if cut.lost_records else "an unknown number of"
    return (
        f"{cut.why}. The log is sound up to request {cut.position:,}; {cut.lost_bytes:,} bytes "
        f"behind that, with {some} requests, cannot be used"
    )


def _prove(disk: Disk, plan: Plan) -> tuple[str, str]:
    """Replay the log from the older snapshot up to the newer one; return a problem, or a proof."""
    newer, older = (entry.position for entry in plan.sound[:2])
    scratch = ScratchDisk(disk)
    for entry in plan.sound:
        if entry.position != older:
            set_aside(scratch, entry.position)
    for position in plan.damaged:
        set_aside(scratch, position)
    for first in [first for first in list_segments(scratch) if first >= newer]:
        scratch.remove(segment_name(first))
    between = f"the log from snapshot {older:,} to snapshot {newer:,}"
    cut = find_cut(scratch, plan.run, older)
    if cut is not None:
        return (
            f"{words_for_cut(cut)}. A server starts from snapshot {newer:,} all the same, and "
            f"removes {between} once there is another one",
            "",
        )
    durable = Durable.open(scratch)
    try:
        if durable.position != newer:
            return f"{between} ends at {durable.position:,}", ""
        state = durable.core.state
        known = ServerState.restored(*read_snapshot(disk, newer))
        state.configure(known.config)
        if fingerprint(state) != fingerprint(known):
            return f"{between} gives another state than snapshot {newer:,}", ""
    finally:
        durable.close()
    replayed = newer - older
    return "", (
        f"snapshot {older:,} and the {replayed:,} requests behind it give snapshot {newer:,}, bit "
        "for bit"
    )
