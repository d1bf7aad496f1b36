"""What the servers have kept, held against what their workers were promised.

For each shard, from the files alone:

- every acknowledged exchange is in the log, exactly once, with the bytes that were sent and the
  reply that was received;
- each worker's places in its data, which travel with its updates, follow one another without
  repetition, however often it was killed;
- subtracting the logged updates one after the other gives the model that the server had;
- recovery from the newest snapshot, recovery from the first one and all of the log, and the same a
  second time give one state: model, replicas, numbers, cached replies.

The log is complete because `experiments.faults.progress.Archive` has kept what the server cut off.
"""

from __future__ import annotations

import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dgs.durable import Durable
from dgs.errors import StateError
from dgs.frame import HEADER_BYTES, decode_frame
from dgs.kernels import kernels
from dgs.space import FloatArray, ParameterSpace, TensorSpec
from dgs.state import fingerprint
from dgs.storage.disk import FolderDisk
from dgs.storage.wal import Record, read_log
from dgs.view import Part, View
from experiments.faults.problem import distance
from experiments.faults.witness import Ack, read_acks

__all__ = ["Fold", "ShardVerdict", "Verdict", "audit", "part_of"]

MOST_PROBLEMS = 20
"""Of each shard; one defect may show in every exchange."""

Key = tuple[int, int, int, int]
"""Worker, member, incarnation, sequence number."""


def part_of(size: int, shard: int, shards: int) -> Part:
    """Return which coordinates of the problem a shard holds."""
    space = ParameterSpace((TensorSpec("x", (size,)),))
    return Part(View.whole(space), *space.shard_ranges(shards)[shard])


class Fold:
    """The model that a list of requests makes, by plain subtraction: no server takes part.

    Args:
        part: what the shard holds.
        names: of workers, by their numbers: one that left and came back has several.
    """

    def __init__(self, part: Part, names: Mapping[int, str]) -> None:
        """Start without a model."""
        self._part = part
        self._names = names
        self.model: FloatArray | None = None
        self.applied: dict[Key, tuple[int, int]] = {}
        """By exchange, the checksums of what was sent and of the reply."""
        self.problems: list[str] = []
        self._last: dict[tuple[str, int], tuple[int, int, int]] = {}
        self._bodies: dict[tuple[str, int], set[int]] = {}

    def add(self, record: Record) -> None:
        """Carry out one record."""
        if record.method == "PutModel":
            frame = decode_frame(record.payload, max_size=None)
            self.model = np.frombuffer(frame.body, dtype="<f4").astype(np.float32)
        elif record.method == "Exchange":
            self._exchange(record)

    def _exchange(self, record: Record) -> None:
        payload = bytes(record.payload)
        frame = decode_frame(payload, max_size=None)
        h = frame.header
        key = (h.worker_id, h.member, h.incarnation, h.seq)
        if key in self.applied:
            self.problems.append(f"exchange {key} is in the log twice")
        if (record.worker, record.incarnation, record.seq) != (h.worker_id, h.incarnation, h.seq):
            self.problems.append(f"the record of exchange {key} has other numbers than its frame")
        self.applied[key] = zlib.crc32(payload[HEADER_BYTES:]), record.reply_crc
        self._follow(key, int(bytes(frame.cursor)))
        decode = kernels(self._part.size).decode_body
        indices, values = decode(frame.body, self._part.segment_sizes, h.values, h.nnz)
        if h.nnz:
            self._once(key, bytes(frame.body))
        assert self.model is not None
        self.model[indices] -= values

    def _follow(self, key: Key, position: int) -> None:
        """Check that a session's numbers follow one another, and a worker's places in its data.

        A worker that has lost its state goes on behind the furthest place that any shard knows, so
        another shard may be without one update.
        """
        *_, incarnation, seq = key
        who = self._who(key)
        old, last, place = self._last.get(who, (0, 0, 0))
        begun = seq == 1 and incarnation > old
        if not begun and (seq != last + 1 or incarnation < old):
            self.problems.append(f"exchange {key} follows number {last} of incarnation {old}")
        if not place < position <= place + 1 + begun:
            self.problems.append(f"exchange {key} is of place {position}, after {place}")
        self._last[who] = incarnation, seq, position

    def _who(self, key: Key) -> tuple[str, int]:
        return self._names.get(key[0], f"number {key[0]}"), key[1]

    def _once(self, key: Key, body: bytes) -> None:
        """Check that no update comes again under other numbers: workers draw theirs anew."""
        seen = self._bodies.setdefault(self._who(key), set())
        if hash(body) in seen:
            self.problems.append(f"the update of exchange {key} was applied before")
        seen.add(hash(body))


@dataclass
class ShardVerdict:
    """What was found of one shard."""

    shard: int
    run: int = 0
    """Number of its state."""
    logged: int = 0
    """Requests in its log, from the first on."""
    exchanges: int = 0
    acknowledged: int = 0
    lost: int = 0
    """Acknowledged, and not in the log."""
    changed: int = 0
    """In the log with other bytes, or another reply."""
    replayed: int = 0
    """Requests that recovery from the newest snapshot carried out again."""
    fingerprint: str = ""
    problems: list[str] = field(default_factory=list)


@dataclass
class Verdict:
    """What was found of all."""

    shards: list[ShardVerdict]
    distance: float
    """Of the servers' model from the optimum; 1 at the start."""

    @property
    def problems(self) -> list[str]:
        """Everything that must not be, in words; empty if all is well."""
        return [f"shard {s.shard}: {p}" for s in self.shards for p in s.problems]

    @property
    def lost(self) -> int:
        """Acknowledged updates that no log has."""
        return sum(s.lost for s in self.shards)

    @property
    def acknowledged(self) -> int:
        """Acknowledged updates, counted shard by shard."""
        return sum(s.acknowledged for s in self.shards)


def audit(folder: Path, shards: int, seed: int) -> Verdict:
    """Judge what a run has left.

    Args:
        folder: of `experiments.faults.supervisor.supervise`; it is left as it is.
        shards: number of servers.
        seed: of the problem.
    """
    model = np.load(folder / "model.npy", allow_pickle=False)
    verdicts = []
    for shard in range(shards):
        acks = [(n, ack) for n, ack in read_acks(folder / "acks") if ack.shard == shard]
        verdicts.append(_judge(folder, part_of(model.size, shard, shards), shard, acks, model))
    return Verdict(verdicts, distance(torch.from_numpy(model), seed))


def _judge(
    folder: Path,
    part: Part,
    shard: int,
    acks: Sequence[tuple[str, Ack]],
    model: FloatArray,
) -> ShardVerdict:
    verdict = ShardVerdict(shard)
    state, archive = folder / "state" / str(shard), folder / "archive" / str(shard)
    try:
        _compare_recoveries(verdict, state, archive, part, model)
        fold = Fold(part, {ack.worker_id: name for name, ack in acks})
        _carry_out(verdict, archive, fold)
    except StateError as error:
        verdict.problems.append(str(error))
        return verdict
    _compare_models(verdict, "the fold of the log", fold.model, model[part.start : part.stop])
    _check_acks(verdict, fold, acks)
    verdict.problems += fold.problems[:MOST_PROBLEMS]
    return verdict


def _compare_recoveries(
    verdict: ShardVerdict, state: Path, archive: Path, part: Part, model: FloatArray
) -> None:
    expected = model[part.start : part.stop]
    seen: dict[str, str] = {}
    with _copied(state) as first:
        for name in ("recovery", "a second recovery"):
            with _recovered(first) as durable:
                seen[name] = fingerprint(durable.core.state)
                _check_recovery(verdict, name, durable)
                if name == "recovery":
                    verdict.run = durable.core.state.run
                    verdict.replayed = durable.recovery.replayed
                    _compare_models(verdict, "the model recovered", _model(durable), expected)
    with _copied(archive) as whole, _recovered(whole) as durable:
        name = "carrying out all of the log"
        seen[name] = fingerprint(durable.core.state)
        _check_recovery(verdict, name, durable)
        if durable.recovery.snapshot != 0:
            verdict.problems.append(f"{name} began at position {durable.recovery.snapshot}, not 0")
    verdict.fingerprint = seen["recovery"]
    for name, found in seen.items():
        if found != verdict.fingerprint:
            verdict.problems.append(f"{name} gives another state than recovery")


def _check_recovery(verdict: ShardVerdict, name: str, durable: Durable) -> None:
    if durable.recovery.dropped:
        verdict.problems.append(f"{name} made other replies in {durable.recovery.dropped} sessions")


def _model(durable: Durable) -> FloatArray | None:
    shard = durable.core.state.shard
    return None if shard is None else shard.model


def _compare_models(
    verdict: ShardVerdict,
    name: str,
    found: npt.NDArray[Any] | None,
    expected: npt.NDArray[Any],
) -> None:
    if found is None or found.tobytes() != expected.tobytes():
        verdict.problems.append(f"{name} is not the model that the server had")


def _carry_out(verdict: ShardVerdict, archive: Path, fold: Fold) -> None:
    with _copied(archive) as copy, FolderDisk(copy) as disk:
        for record in read_log(disk, verdict.run, 0):
            fold.add(record)
            verdict.logged += 1
    verdict.exchanges = len(fold.applied)


def _check_acks(verdict: ShardVerdict, fold: Fold, acks: Iterable[tuple[str, Ack]]) -> None:
    told: Counter[str] = Counter()
    for _, ack in acks:
        verdict.acknowledged += 1
        key = (ack.worker_id, ack.member, ack.incarnation, ack.seq)
        logged = fold.applied.get(key)
        if logged is None:
            verdict.lost += 1
            told["acknowledged, but not in the log"] += 1
        elif logged != (ack.content_crc, ack.reply_crc):
            verdict.changed += 1
            told["in the log with another content or reply than acknowledged"] += 1
    verdict.problems += [f"{count} exchanges {what}" for what, count in told.items()]


@contextmanager
def _recovered(folder: Path) -> Iterator[Durable]:
    """Recover a state; the folder is changed."""
    with FolderDisk(folder) as disk:
        durable = Durable.open(disk)
        try:
            yield durable
        finally:
            durable.close()


@contextmanager
def _copied(folder: Path) -> Iterator[Path]:
    """Copy a state directory, for what looks at it changes it."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="copy-") as copy:
        place = Path(copy, "state")
        shutil.copytree(folder, place)
        yield place
