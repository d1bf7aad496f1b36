"""How `dgs snapshot` says what it has found, to people and to programs."""

from __future__ import annotations

from datetime import datetime

from dgs.cli.console import words_for_bytes
from dgs.inspection import Found, Verified, words_for_cut
from dgs.listing import Listing
from dgs.rescue import Rescued
from dgs.storage.repair import Plan

__all__ = [
    "SEGMENT_COLUMNS",
    "SNAPSHOT_COLUMNS",
    "describe_check",
    "describe_listing",
    "describe_plan",
    "describe_rescued",
    "segment_rows",
    "snapshot_rows",
    "words_for_check",
    "words_for_plan",
]

SNAPSHOT_COLUMNS = ("written", "snapshot", "version", "workers", "size", "at first sight")
SEGMENT_COLUMNS = ("last written", "from request", "requests", "size", "state")

Described = dict[str, object]


def snapshot_rows(listing: Listing) -> list[list[str]]:
    """Return one row for each snapshot."""
    return [
        [
            _time(s.time_s),
            f"{s.position:,}",
            "no model" if s.version is None else f"{s.version:,}",
            "-" if s.workers is None else str(s.workers),
            words_for_bytes(s.size_bytes),
            "; ".join(s.problems) or "sound",
        ]
        for s in listing.snapshots
    ]


def segment_rows(listing: Listing) -> list[list[str]]:
    """Return one row for each piece of the log."""
    return [
        [
            _time(s.time_s),
            f"{s.first:,}",
            f"{s.records:,}",
            words_for_bytes(s.size_bytes),
            s.problem or (f"torn end: {s.torn}" if s.torn else "sound"),
        ]
        for s in listing.segments
    ]


def describe_listing(listing: Listing) -> Described:
    """Return what is in a folder, for JSON."""
    return {
        "snapshots": [
            {**s._asdict(), "time": _time(s.time_s), "sound": not s.problems}
            for s in listing.snapshots
        ],
        "log": [
            {**s._asdict(), "time": _time(s.time_s), "sound": not s.problem}
            for s in listing.segments
        ],
    }


def _time(time_s: float) -> str:
    return datetime.fromtimestamp(time_s).astimezone().isoformat(" ", "seconds")


def describe_check(verified: Verified, live: str) -> Described:
    """Return what a thorough look gave, for JSON.

    Args:
        verified: what was found.
        live: why the folder was not locked meanwhile; empty if it was.
    """
    return {
        "sound": not verified.problems,
        "startable": verified.is_startable,
        "problems": verified.problems,
        "proof": verified.proof,
        "state": _describe_state(verified.found),
        "not_locked": live,
    }


def _describe_state(found: Found | None) -> Described | None:
    if found is None:
        return None
    return {
        "snapshot": found.snapshot,
        "position": found.position,
        "version": found.version,
        "workers": found.workers,
        "fingerprint": found.fingerprint,
        "torn": found.torn,
        "dropped_sessions": found.dropped,
    }


def words_for_check(verified: Verified, folder: str) -> list[str]:
    """Say what a thorough look gave, and what can be done."""
    lines = [f"damaged: {problem}" for problem in verified.problems]
    found = verified.found
    if found is not None:
        then = "a server recovers" if verified.is_startable else "after a repair, a server recovers"
        lines += [f"{then} {_words_for_state(found)}", f"fingerprint {found.fingerprint}"]
        if found.torn:
            lines.append(f"torn end of the log, never acknowledged, a start cuts it: {found.torn}")
        if found.dropped:
            lines.append(f"{found.dropped} session(s) have to join again: replies differ here")
    if verified.proof:
        lines.append(f"proved: {verified.proof}")
    if not verified.problems:
        lines.append("sound")
    elif not verified.is_startable:
        if found is not None:
            lines.append(f"to go on with what is left: dgs snapshot repair --state-dir {folder}")
        lines.append(f"to save the model: dgs snapshot export --state-dir {folder} --out FILE")
    return lines


def _words_for_state(found: Found) -> str:
    count = len(found.workers)
    some = ", ".join(found.workers[:5]) + (", ..." if count > 5 else "")
    return (
        f"version {found.version:,} after {found.position:,} requests, with {count} worker"
        f"{'' if count == 1 else 's'}{f' ({some})' if some else ''}, from snapshot "
        f"{found.snapshot:,} and {found.position - found.snapshot:,} requests of the log"
    )


def describe_rescued(part: Rescued) -> Described:
    """Return what was saved of one shard, for JSON."""
    return {
        "state_dir": part.label,
        "shard": part.shard,
        "num_shards": part.num_shards,
        "version": part.version,
        "position": part.position,
        "lost_bytes": part.lost_bytes,
        "notes": part.notes,
    }


def describe_plan(plan: Plan, found: Found | None, aside: list[str], *, done: bool) -> Described:
    """Return what a repair does, for JSON.

    Args:
        plan: what is damaged.
        found: what a server then has.
        aside: files that were set aside.
        done: whether it was done.
    """
    log = None
    if plan.cut is not None:
        log = {
            "position": plan.cut.position,
            "why": plan.cut.why,
            "lost_bytes": plan.cut.lost_bytes,
            "lost_requests": plan.cut.lost_records,
        }
    state = _describe_state(found)
    return {"snapshots": plan.damaged, "log": log, "state": state, "aside": aside, "done": done}


def words_for_plan(plan: Plan, found: Found) -> list[str]:
    """Say what a repair does, and what is lost by it."""
    lines = [
        f"snapshot {position:,} is damaged, and is set aside: {'; '.join(problems)}"
        for position, problems in plan.damaged.items()
    ]
    if plan.cut is not None:
        lines += [
            f"the log is damaged, and is to end there: {words_for_cut(plan.cut)}",
            "what these requests changed is lost; the workers that sent them join again by "
            "themselves",
        ]
    else:
        lines.append("nothing is lost: another snapshot and the log hold everything")
    return [*lines, f"a server then recovers {_words_for_state(found)}"]
