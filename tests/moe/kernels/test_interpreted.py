"""Without a GPU, the Triton kernels are tested under Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.helpers.source_tree import ROOT


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU itself runs test_gpu.py")
def test_the_kernels_pass_their_tests_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    # Triton decides when it is imported, so only a process of its own can be told
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_gpu.py"],
        cwd=ROOT / "tests" / "moe" / "kernels",
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "interpreter" not in done.stdout, "the kernels' tests were skipped"
