"""A server with a state directory goes on where it was, and says so where it cannot."""

from __future__ import annotations

import logging
import shutil
import threading
from pathlib import Path

import pytest
import torch

import dgs
from dgs.client import server_status
from dgs.durable import Durable
from dgs.errors import StateError
from dgs.state import fingerprint
from dgs.storage.disk import FolderDisk
from dgs.transport.connect import connect
from tests.helpers.training import Batches, flat, make_model, train_step, wrap

HASHED = dgs.ServerConfig(hash_interval=1)


def serve(address: str, folder: Path, **more: object) -> dgs.serving.ServerHandle:  # type: ignore[name-defined]
    return dgs.serve(address, state_dir=folder, config=HASHED, **more)  # type: ignore[arg-type]


def test_a_training_goes_on_bit_for_bit_when_its_server_was_stopped_in_between(
    tmp_path: Path,
) -> None:
    results = []
    for stops in (False, True):
        model, batches = make_model(), Batches()
        handle = serve("127.0.0.1:0", tmp_path / str(stops))
        address = handle.address
        opt = wrap(model, address, worker="a", density=0.05)
        for _ in range(3):
            for _ in range(5):
                train_step(model, opt, batches)
            if stops:
                handle.stop()
                handle = serve(address, tmp_path / str(stops))
        assert (opt.stats.rejoins, opt.stats.resyncs) == (0, 0)
        results.append((flat(model), flat_model(opt)))
        opt.close()
        handle.stop()
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def flat_model(opt: dgs.DistributedOptimizer) -> torch.Tensor:
    return torch.cat([t.reshape(-1) for t in opt.pull_model().values()])


def test_what_was_acknowledged_is_in_a_copy_of_the_folder_made_at_any_time(tmp_path: Path) -> None:
    # the copy is what a process killed at that moment would leave
    model, batches = make_model(), Batches()
    with serve("127.0.0.1:0", tmp_path / "live") as handle:
        opt = wrap(model, handle.address, worker="a")
        for turn in range(6):
            train_step(model, opt, batches)
            copy = tmp_path / f"copy-{turn}"
            shutil.copytree(tmp_path / "live", copy)
            with FolderDisk(copy) as disk:
                found = Durable.open(disk, HASHED)
                core = handle._durable.core  # type: ignore[union-attr]
                assert fingerprint(found.core.state) == fingerprint(core.state)
                assert found.core.version == turn + 1
                found.close()
        opt.close()


def test_a_second_server_on_the_folder_is_refused(tmp_path: Path) -> None:
    with (
        serve("127.0.0.1:0", tmp_path),
        pytest.raises(StateError, match="is in use by process"),
    ):
        serve("127.0.0.1:0", tmp_path)


def test_a_server_that_cannot_listen_leaves_the_folder_free(tmp_path: Path) -> None:
    with dgs.serve("127.0.0.1:0") as other, pytest.raises(dgs.DgsError, match="cannot listen"):
        serve(other.address, tmp_path)
    serve("127.0.0.1:0", tmp_path).stop()


def test_a_start_says_what_was_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serve("127.0.0.1:0", tmp_path) as handle:
        opt = wrap(make_model(), handle.address, worker="a")
        opt.close(leave=False)
    caplog.clear()
    with caplog.at_level(logging.WARNING), serve("127.0.0.1:0", tmp_path) as handle:
        assert "recovered version 0" in caplog.text
        assert handle.recovery is not None
        assert handle.recovery.replayed == 0  # stopping made a snapshot


def test_trouble_with_the_disk_is_told_to_the_owner_and_acknowledges_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, troubled = list[str](), threading.Event()

    def on_trouble(trouble: str) -> None:
        told.append(trouble)
        troubled.set()

    model, batches = make_model(), Batches()
    patient = dgs.RetryConfig(budget_s=1.0, attempt_s=1.0)
    with serve("127.0.0.1:0", tmp_path, on_trouble=on_trouble) as handle:
        opt = wrap(model, handle.address, worker="a", retry=patient)
        train_step(model, opt, batches)

        def fail(self: object) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr("dgs.storage.disk._FolderFile.sync", fail)
        with pytest.raises(dgs.DgsError, match="cannot keep what it is sent"):
            train_step(model, opt, batches)
        assert troubled.wait(30)
        assert handle.trouble == told[0]
        (transport,) = connect(handle.address, patient)
        assert server_status(transport, timeout_s=9.0).storage.trouble == told[0]
        transport.close()
        monkeypatch.undo()
        address = handle.address
    with serve(address, tmp_path):  # as a supervisor would
        train_step(model, opt, batches)
        assert (opt.stats.rejoins, opt.stats.resyncs) == (0, 0)
        opt.close()
