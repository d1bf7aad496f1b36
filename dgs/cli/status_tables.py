"""How `dgs status` writes what it has seen, for people."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from dgs.cli.console import words_for_bytes, words_for_seconds

__all__ = ["Described", "TableParts", "away", "heading", "tables", "troubles"]

Described = dict[str, Any]
"""What `dgs.cli.status.describe` returns, or a part of it; all values are JSON's."""

TableParts = tuple[str, Sequence[str], list[list[str]]]
"""Title, names of the columns, rows."""

SERVERS_TITLE = "servers (p50, p99: staleness)"
SHARD_COLUMNS = ("server", "shard", "range", "version", "refused", "up", "down", "p50", "p99")
WORKERS_TITLE = "workers (behind: updates of others since its last exchange)"
WORKER_COLUMNS = ("worker", "joined", "exchanges", "behind", "up", "down", "p50", "p99")

MEMORY_TITLE = "memory (in flight: requests that are arriving or waiting)"
MEMORY_COLUMNS = ("server", "sessions", "records", "replies", "in flight")
AWAY_TITLE = "turned away (put off: told to come again; evicted: silent for the lease)"
AWAY_COLUMNS = ("server", "put off", "evicted", "lease")
STORAGE_TITLE = "storage (requests applied, on disk, in the newest snapshot)"
STORAGE_COLUMNS = ("server", "applied", "on disk", "snapshot", "age", "log", "state")

SECURITY_TITLE = "security (turned away: calls refused for who made them)"
SECURITY_COLUMNS = ("server", "encrypted", "callers show", "certificate ends", "turned away")

WARN_BEFORE_S = 7 * 86400.0
"""Seconds before its end at which a certificate is to be replaced."""

_YEAR_10000_S = 253402300800.0

LONGEST_AGE_S = 10 * 365 * 86400
"""Incarnations are clock readings; one that would be older than this is none."""


def tables(status: Described) -> list[TableParts]:
    """Return tables of the servers, their workers, and where told, their limits and storage."""
    servers = status["servers"]
    found: list[TableParts] = [
        (SERVERS_TITLE, SHARD_COLUMNS, [_shard_row(s) for s in servers]),
        (WORKERS_TITLE, WORKER_COLUMNS, _worker_rows(servers)),
        (MEMORY_TITLE, MEMORY_COLUMNS, [_memory_row(s) for s in servers if s.get("limits")]),
        (AWAY_TITLE, AWAY_COLUMNS, [_away_row(s) for s in servers if s.get("limits")]),
        (SECURITY_TITLE, SECURITY_COLUMNS, [_security_row(s) for s in servers if _is_secured(s)]),
        (STORAGE_TITLE, STORAGE_COLUMNS, [_storage_row(s) for s in servers if s.get("storage")]),
    ]
    return [table for n, table in enumerate(found) if n < 2 or table[2]]


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


def _memory_row(server: Described) -> list[str]:
    limits = server["limits"]
    return [
        server["address"],
        f"{len(server['workers'])}/{limits['max_workers']}",
        words_for_bytes(limits["record_bytes"]),
        _part(limits["reply_bytes"], limits["max_reply_bytes"]),
        _part(limits["in_flight_bytes"], limits["max_in_flight_bytes"]),
    ]


def _away_row(server: Described) -> list[str]:
    limits = server["limits"]
    lease_s = limits["lease_s"]
    return [
        server["address"],
        str(limits["put_off"]),
        str(server["evicted"]),
        words_for_seconds(lease_s) if lease_s else "none",
    ]


def _is_secured(server: Described) -> bool:
    """Whether there is anything to say; a server on loopback mostly has no security."""
    told = server.get("security") or {}
    return any(told.get(name) for name in ("tls", "tokens"))


def _security_row(server: Described) -> list[str]:
    told = server["security"]
    shown = [("certificate", told["client_certificates"]), ("token", told["tokens"])]
    return [
        server["address"],
        "yes" if told["tls"] else "NO",
        " and ".join(name for name, asked in shown if asked) or "NOTHING",
        _words_for_end(told["certificate_ends_s"]),
        str(told["turned_away"]),
    ]


def _words_for_end(ends_s: float) -> str:
    """Write when a certificate ends, a Unix time.

    Example:
        >>> _words_for_end(0.0), _words_for_end(1.0)
        ('-', '1970-01-01: EXPIRED')
    """
    if not 0 < ends_s < _YEAR_10000_S:
        return "-"
    day, left_s = time.strftime("%Y-%m-%d", time.gmtime(ends_s)), ends_s - time.time()
    return f"{day}: EXPIRED" if left_s <= 0 else f"{day} (in {words_for_seconds(left_s)})"


def _part(count_bytes: int, limit_bytes: int) -> str:
    return f"{words_for_bytes(count_bytes)}/{words_for_bytes(limit_bytes)}"


def _storage_row(server: Described) -> list[str]:
    storage = server["storage"]
    return [
        server["address"],
        str(storage["position"]),
        str(storage["durable"]),
        str(storage["snapshot_position"]),
        words_for_seconds(storage["snapshot_age_s"]),
        words_for_bytes(storage["log_bytes"]),
        "TROUBLE" if storage["trouble"] else "ok",
    ]


def troubles(status: Described) -> list[str]:
    """Tell which servers acknowledge nothing, and why, and whose certificates end within a week."""
    stuck = [
        f"server {s['address']} acknowledges nothing: {s['storage']['trouble']}"
        for s in status["servers"]
        if (s.get("storage") or {}).get("trouble")
    ]
    ends = [
        (s["address"], (s.get("security") or {}).get("certificate_ends_s"))
        for s in status["servers"]
    ]
    soon_s = time.time() + WARN_BEFORE_S
    return stuck + [
        f"server {address} needs a new certificate: this one ends {_words_for_end(ends_s)}"
        for address, ends_s in ends
        if ends_s and ends_s < soon_s
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
