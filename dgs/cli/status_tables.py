"""How `dgs status` writes what it has seen, for people."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from dgs.cli.console import words_for_bytes, words_for_seconds

__all__ = ["Described", "TableParts", "away", "heading", "tables"]

Described = dict[str, Any]
"""What `dgs.cli.status.describe` returns, or a part of it; all values are JSON's."""

TableParts = tuple[str, Sequence[str], list[list[str]]]
"""Title, names of the columns, rows."""

SERVERS_TITLE = "servers (p50, p99: staleness)"
SHARD_COLUMNS = ("server", "shard", "range", "version", "refused", "up", "down", "p50", "p99")
WORKERS_TITLE = "workers (behind: updates of others since its last exchange)"
WORKER_COLUMNS = ("worker", "joined", "exchanges", "behind", "up", "down", "p50", "p99")

LONGEST_AGE_S = 10 * 365 * 86400
"""Incarnations are clock readings; one that would be older than this is none."""


def tables(status: Described) -> list[TableParts]:
    """Return one table of the servers and one of the workers."""
    servers = status["servers"]
    return [
        (SERVERS_TITLE, SHARD_COLUMNS, [_shard_row(s) for s in servers]),
        (WORKERS_TITLE, WORKER_COLUMNS, _worker_rows(servers)),
    ]


def _shard_row(server: Described) -> list[str]:
    if "error" in server:
        return [server["address"], "-", "-", "no answer", *["-"] * 5]
    start, stop = server["range"]
    ready = server["ready"]
    return [
        server["address"],
        f"{server['shard']}/{server['num_shards']}" if ready else "-",
        f"{start:,}-{stop:,}" if ready else "-",
        str(server["version"]) if ready else "no model yet",
        str(server["refused"]),
        words_for_bytes(server["bytes_up"]),
        words_for_bytes(server["bytes_down"]),
        f"{server['staleness_p50']:g}",
        f"{server['staleness_p99']:g}",
    ]


def _worker_rows(servers: Sequence[Described]) -> list[list[str]]:
    """Make one row per worker: bytes of all shards together, the worst shard's staleness."""
    sessions: dict[tuple[str, int], list[Described]] = {}
    for server in servers:
        for w in server["workers"]:
            sessions.setdefault((w["worker"], w["member"]), []).append(w)
    several = {worker for worker, member in sessions if member > 0}
    return [
        [
            f"{worker}/{member}" if worker in several else worker,
            _age(parts[0]["incarnation"]),
            str(max(w["exchanges"] for w in parts)),
            str(max(w["behind"] for w in parts)),
            words_for_bytes(sum(w["bytes_up"] for w in parts)),
            words_for_bytes(sum(w["bytes_down"] for w in parts)),
            f"{max(w['staleness_p50'] for w in parts):g}",
            f"{max(w['staleness_p99'] for w in parts):g}",
        ]
        for (worker, member), parts in sorted(sessions.items())
    ]


def _age(incarnation: int) -> str:
    age_s = time.time() - incarnation / 1e9
    return f"{words_for_seconds(age_s)} ago" if age_s < LONGEST_AGE_S else "-"


def heading(status: Described) -> str:
    """Write when it was; the date and the time of day, as the clock on the wall shows them."""
    return str(status["time"])[:19].replace("T", " ")


def away(status: Described) -> list[str]:
    """Tell which servers did not answer, and why."""
    return [
        f"server {s['address']} does not answer: {s['error']}; still watching"
        for s in status["servers"]
        if "error" in s
    ]
