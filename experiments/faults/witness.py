"""Who was promised what: every acknowledgement that a worker received, kept outside the server.

A `Witness` stands between a worker and its transport and appends one line to the worker's own file
for each exchange that a shard has answered, before the worker sees the answer. What is in such a
file must afterwards be in that shard's log, exactly once and unchanged.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dgs.errors import DgsError
from dgs.frame import HEADER_BYTES, decode_frame, frame_checksum
from dgs.transport.base import Method, Traffic, Transport

__all__ = ["Ack", "AckFile", "Witness", "parse_acks", "read_acks"]


class Ack(NamedTuple):
    """One exchange that one shard has answered."""

    shard: int
    run: int
    """Number of the shard's state."""
    worker_id: int
    member: int
    incarnation: int
    """Under which it was applied."""
    seq: int
    content_crc: int
    """CRC-32 of what was sent, without the header: a worker that resumes repeats its last update
    under a new incarnation."""
    reply_crc: int
    """Checksum that the difference frame carried, as it was received."""
    version: int
    """Updates that the shard had applied, this one included."""
    at_us: int
    """Microseconds of the machine's monotonic clock."""


class AckFile:
    """A file of acknowledgements, one line each; lines of several threads do not mix.

    Args:
        path: appended to.
    """

    def __init__(self, path: Path) -> None:
        """Open the file."""
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def add(self, ack: Ack) -> None:
        """Append one line, in one write: a process that is killed leaves whole lines."""
        os.write(self._file, (" ".join(map(str, ack)) + "\n").encode())

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


class Witness:
    """Carry calls of another transport, and write down each answered exchange.

    Args:
        inner: carries them; closed together with this one.
        file: gets the acknowledgements; shared by the shards of a worker.
    """

    def __init__(self, inner: Transport, file: AckFile) -> None:
        """Wrap a transport."""
        self._inner = inner
        self._file = file

    @property
    def address(self) -> str:
        """Return the server's address."""
        return self._inner.address

    @property
    def traffic(self) -> Traffic:
        """Return the inner transport's count."""
        return self._inner.traffic

    def call(self, method: Method, request: bytes, *, timeout_s: float) -> bytes:
        """Carry one request; see `Transport.call`."""
        reply = self._inner.call(method, request, timeout_s=timeout_s)
        if method is Method.EXCHANGE and (ack := _ack_in(request, reply)):
            self._file.add(ack)
        return reply

    def close(self) -> None:
        """Close the inner transport."""
        self._inner.close()


def _ack_in(request: bytes, reply: bytes) -> Ack | None:
    try:
        header = decode_frame(reply, max_size=None).header
    except DgsError:  # damaged on its way: the client asks again
        return None
    return Ack(
        shard=header.shard,
        run=header.run,
        worker_id=header.worker_id,
        member=header.member,
        incarnation=header.incarnation,
        seq=header.seq,
        content_crc=zlib.crc32(request[HEADER_BYTES:]),
        reply_crc=frame_checksum(reply),
        version=header.version,
        at_us=time.monotonic_ns() // 1000,
    )


def parse_acks(text: bytes) -> list[Ack]:
    r"""Read whole lines.

    Args:
        text: lines as `AckFile` writes them.

    Example:
        >>> parse_acks(b"0 9 1 0 77 3 5 6 12 1000\n")[0].seq
        3
    """
    return [Ack(*map(int, line.split())) for line in text.splitlines()]


def read_acks(folder: Path) -> Iterator[tuple[str, Ack]]:
    """Read the files of all workers.

    Args:
        folder: holds one file a worker, ``<name>.acks``.

    Yields:
        The worker's name and one acknowledgement, in each file's order.
    """
    for path in sorted(folder.glob("*.acks")):
        text = path.read_bytes()
        for ack in parse_acks(text[: text.rfind(b"\n") + 1]):
            yield path.stem, ack
