"""Logs to test with: records whose content tells their number, and recovery as a server does it."""

from __future__ import annotations

import random

from dgs.storage.disk import Disk
from dgs.storage.log import Log
from dgs.storage.records import (
    METHODS,
    segment_name,
)
from dgs.storage.wal import Record, read_log

__all__ = ["RUN", "fill", "raw", "record", "reopen"]

RUN = 77


def record(number: int) -> Record:
    """Return a record that is like no other; its payload has a length of its own."""
    payload = random.Random(number).randbytes(number * 7 % 50)
    return Record(METHODS[number % 4], number, number + 1, number + 2, number + 3, payload)


def fill(log: Log, count: int) -> None:
    for _ in range(count):
        log.append(record(log.position))


def reopen(disk: Disk, start: int = 0) -> tuple[Log, list[Record], str]:
    """Recover, as a server does after it was started again."""
    contents = read_log(disk, RUN, start)
    records = list(contents)
    return Log.open(disk, RUN, contents.end), records, contents.torn


def raw(disk: Disk, first: int = 0) -> bytes:
    return disk.open(segment_name(first)).read()
