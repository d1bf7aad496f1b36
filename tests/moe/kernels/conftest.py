"""The Triton kernels: on a GPU where there is one, under Triton's interpreter elsewhere."""

from __future__ import annotations

import os
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def gpu(device: torch.device) -> ModuleType:
    """Return the kernels; skip where nothing runs them."""
    pytest.importorskip("triton")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a GPU or Triton's interpreter, which test_interpreted.py starts")
    from moe.kernels import gpu

    return gpu
