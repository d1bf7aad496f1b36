"""A worker with a checkpoint may be killed at any moment: it trains the same, bit for bit."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

import dgs
from dgs.client import pull_model
from dgs.space import FloatArray
from dgs.transport.base import Transport
from dgs.transport.grpc_client import GrpcTransport
from dgs.transport.local import LocalTransport
from tests.helpers.processes import Spoken
from tests.helpers.scripts.killed import STEPS, make_worker, train
from tests.helpers.source_tree import ROOT

SCRIPT = str(ROOT / "tests" / "helpers" / "scripts" / "killed.py")
MOMENTS = ("send:2", "reply:1", "write:1", "reply:2", "write:2", "step:3")
"""Where one process after the other is killed."""


def model_of(links: list[Transport]) -> dict[str, FloatArray]:
    model = pull_model(links, timeout_s=20.0)
    for link in links:
        link.close()
    return model


@pytest.mark.parametrize(("overlap", "num_shards"), [(False, 1), (True, 1), (False, 2)])
def test_a_worker_killed_at_any_moment_trains_the_same_model_bit_for_bit(
    overlap: bool, num_shards: int, tmp_path: Path
) -> None:
    cores = [dgs.ParameterServer() for _ in range(num_shards)]
    model, opt = make_worker(cores, overlap)
    parameters = train(model, opt, lambda moment: None)
    opt.close(leave=False)
    expected = model_of([LocalTransport(core) for core in cores])
    with ExitStack() as stack:
        handles = [stack.enter_context(dgs.serve("127.0.0.1:0")) for _ in range(num_shards)]
        addresses = ",".join(handle.address for handle in handles)
        mode = "overlap" if overlap else "wait"
        argv = (sys.executable, "-W", "error", SCRIPT, addresses, f"{tmp_path}/", mode, *MOMENTS)
        with Spoken(*argv) as worker:
            assert worker.ends_with() == 0, worker.output
        found = model_of([GrpcTransport(handle.address) for handle in handles])
    reached = [line for line in worker.lines if line.startswith("reached")]
    assert reached == [f"reached {moment}" for moment in MOMENTS]
    assert f"ended with {parameters}" in worker.lines
    assert f"exchanges {STEPS // 2} rejoins 0" in worker.lines
    assert {n: v.tobytes() for n, v in found.items()} == {
        n: v.tobytes() for n, v in expected.items()
    }
