"""The GPU's passes hold to their definitions on a machine without a GPU, too."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from dgs.errors import ConfigError
from tests.helpers.source_tree import ROOT

pytest.importorskip("triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu runs them on the GPU")
def test_the_passes_hold_to_their_definitions_under_the_interpreter() -> None:
    # in a process of its own: triton reads the variable once, when it is imported
    options = ["-q", "-p", "no:cacheprovider", "-m", "not gpu"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "tests/dgs/kernels/test_gpu.py"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout


def test_the_cpu_is_refused_without_the_interpreter() -> None:
    from dgs.kernels import gpu, gpu_passes

    if gpu_passes.INTERPRETED:
        pytest.skip("this process has the interpreter")
    with pytest.raises(ConfigError, match="TRITON_INTERPRET"):
        gpu.Units([4], [4], torch.device("cpu"))
