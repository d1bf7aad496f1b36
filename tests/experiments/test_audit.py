"""The audit finds what a server may never do to what it has acknowledged, and nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import dgs
from dgs.durable import Durable
from dgs.storage.disk import FolderDisk
from dgs.transport.local import LocalTransport
from experiments.faults.audit import Verdict, audit
from experiments.faults.problem import Rows
from experiments.faults.progress import Archive
from experiments.faults.witness import Ack, AckFile, Witness, read_acks

SIZE, SHARDS, SEED, STEPS = 40, 2, 5, 12


class Kept:
    """A durable shard that syncs before it answers, and makes a snapshot now and then."""

    def __init__(self, folder: Path, shard: int) -> None:
        self._disk = FolderDisk(folder / "state" / str(shard))
        self._archive = Archive(self._disk.path, folder / "archive" / str(shard))
        self.durable = Durable.open(self._disk)
        self._archive.look()

    def handle(self, method: str, request: bytes) -> bytes:
        reply = self.durable.handle(method, request)
        self.durable.commit()
        return reply

    def max_request_bytes(self, method: str) -> int:
        return self.durable.max_request_bytes(method)

    def snapshot(self) -> None:
        self.durable.finish_snapshot(self.durable.begin_snapshot())
        self._archive.look()

    def close(self) -> None:
        self.durable.close()
        self._disk.close()


def train(folder: Path, shards: list[Kept]) -> dict[str, torch.Tensor]:
    (folder / "acks").mkdir()
    file = AckFile(folder / "acks" / "worker-0.acks")
    point = torch.nn.Parameter(torch.zeros(SIZE))
    rows = Rows(SIZE, SEED, (1,))
    optimizer = dgs.DistributedOptimizer(
        torch.optim.SGD([point], lr=0.05),
        named_parameters=[("x", point)],
        server=[Witness(LocalTransport(shard), file) for shard in shards],
        worker="worker-0",
        momentum=0.5,
        density=0.3,
        download_density=0.3,
        dense_below=0,
    )
    for step in range(STEPS):
        optimizer.cursor = str(step + 1).encode()
        optimizer.zero_grad()
        rows.loss(point).backward()
        optimizer.step()
        if step % 3 == 2:
            for shard in shards:
                shard.snapshot()
    model = optimizer.pull_model()
    optimizer.close()
    file.close()
    return model


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    shards = [Kept(folder, shard) for shard in range(SHARDS)]
    model = train(folder, shards)
    np.save(folder / "model.npy", model["x"].numpy(), allow_pickle=False)
    for shard in shards:
        shard.close()
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """Return a copy that a test may damage."""
    return shutil.copytree(finished, tmp_path / "run")


def judge(run: Path) -> Verdict:
    return audit(run, SHARDS, SEED)


def last_segment(run: Path, shard: int) -> Path:
    return max((run / "archive" / str(shard)).glob("log-*.wal"))


def add(run: Path, ack: Ack) -> None:
    file = AckFile(run / "acks" / "worker-0.acks")
    file.add(ack)
    file.close()


def last_ack(run: Path) -> Ack:
    return [ack for _, ack in read_acks(run / "acks")][-1]


def test_an_honest_run_passes(run: Path) -> None:
    verdict = judge(run)
    assert verdict.problems == []
    assert verdict.lost == 0
    assert verdict.acknowledged == SHARDS * STEPS
    assert [s.exchanges for s in verdict.shards] == [STEPS] * SHARDS
    assert verdict.distance < 1.0


def test_an_audit_changes_nothing(run: Path) -> None:
    before = {p: p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}
    judge(run)
    assert before == {p: p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}


def test_an_acknowledged_exchange_that_is_not_in_the_log_is_lost(run: Path) -> None:
    ack = last_ack(run)
    add(run, ack._replace(seq=ack.seq + 1))
    assert judge(run).lost == 1


def test_a_log_without_its_end_has_lost_what_was_there(run: Path) -> None:
    for folder in ("archive", "state"):
        for path in (run / folder / "0").glob("log-*.wal"):
            if path.name == last_segment(run, 0).name:
                path.unlink()
    assert any("shard 0" in problem for problem in judge(run).problems)


@pytest.mark.parametrize("field", ["content_crc", "reply_crc"])
def test_other_bytes_than_acknowledged_are_found(run: Path, field: str) -> None:
    ack = last_ack(run)
    add(run, ack._replace(**{field: getattr(ack, field) ^ 1}))
    verdict = judge(run)
    assert verdict.lost == 0
    assert sum(s.changed for s in verdict.shards) == 1
    assert len(verdict.problems) == 1


def test_a_model_that_is_not_the_fold_of_the_log_is_found(run: Path) -> None:
    model = np.load(run / "model.npy")
    model[0] = np.nextafter(model[0], np.float32(np.inf))
    np.save(run / "model.npy", model)
    assert len(judge(run).problems) == 2  # neither the fold nor what was recovered is that one


def test_a_log_with_a_gap_is_refused(run: Path) -> None:
    segments = sorted((run / "archive" / "1").glob("log-*.wal"))
    assert len(segments) > 2
    segments[1].unlink()
    assert any("shard 1" in problem for problem in judge(run).problems)
