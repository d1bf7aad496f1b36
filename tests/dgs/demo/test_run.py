"""The whole demonstration, in real processes over loopback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from dgs.cli.main import main
from dgs.demo.plan import DIGITS, Plan, dense_method
from dgs.demo.progress import Lines
from dgs.demo.run import ChildFailedError, run_demo

WORKERS, STEPS = 2, 100


@pytest.mark.dist
@pytest.mark.slow
def test_demo_trains_and_tells_what_it_cost(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["demo", "--workers", str(WORKERS), "--steps", str(STEPS), "--json"])
    said = capsys.readouterr()
    assert code == 0, said.err
    told = json.loads(said.out)
    assert told["samples"] == WORKERS * STEPS * DIGITS.batch
    dense, sparse = told["methods"]
    for method in (dense, sparse):
        assert method["exchanges"] == WORKERS * STEPS
        assert method["workers_bytes_up"] == method["bytes_up"] > 0
        assert method["workers_bytes_down"] == method["bytes_down"] > 0
        per_step = method["bytes_up"] / (WORKERS * STEPS)
        assert method["up_ratio"] == pytest.approx(told["dense_bytes"] / per_step)
        assert method["loss_last"] < 0.7 * method["loss_first"]
        assert method["accuracy"] > 0.5
        assert 0 <= method["staleness_p50"] <= method["staleness_p99"]
        assert method["resyncs"] == 0
    assert sparse["up_ratio"] > 50 > 2 > dense["up_ratio"] >= 0.9
    assert sparse["down_ratio"] > 50
    assert "updates" in said.err


@pytest.mark.dist
def test_failing_worker_ends_the_demo_and_shows_its_output() -> None:
    plan = Plan(
        task=replace(DIGITS, batch=5000),
        methods=(dense_method(),),
        workers=2,
        steps=1,
        seed=0,
        device="cpu",
    )
    said: list[str] = []
    with pytest.raises(ChildFailedError, match=r"(?s)worker \d ended with code 1.*batch=5000"):
        run_demo(plan, Lines(said.append))
    assert said[-1] == "dense ASGD: ended after 0 of 2 updates"


@pytest.mark.dist
@pytest.mark.slow
def test_interrupt_ends_the_demo_at_once() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "dgs", "demo", "--steps", "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            assert process.stderr is not None
            lines = iter(process.stderr.readline, "")
            trains = any("median staleness" in line for line in lines)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=10)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert trains
    assert process.returncode == 130, err
    assert out == ""
    assert "interrupted" in err
    assert "Traceback" not in err


def test_missing_images_are_refused_with_code_1(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["demo", "--data-dir", "no/such/folder", "--device", "cpu"]) == 1
    assert "there is no folder no/such/folder" in capsys.readouterr().err
