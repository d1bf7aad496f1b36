"""The compiled kernels, and arrays that are hard to get right."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest

Floats = npt.NDArray[np.float32]


@pytest.fixture(scope="session")
def fast() -> ModuleType:
    """Return the compiled kernels; skip where numba is missing."""
    pytest.importorskip("numba")
    from dgs.kernels import cpu

    return cpu


SIZES = (0, 1, 2, 63, 64, 65, 127, 511, 512, 513, 577, 5000)
"""Around the lanes (64) and the block (512) of the compiled loops."""

SHAPES = (
    "normal",
    "heavy-tailed",
    "sparse",
    "ties",
    "equal",
    "zeros",
    "signed-zeros",
    "subnormal",
    "extreme",
)


def make(shape: str, size: int, seed: int) -> Floats:
    """Return values of a kind that selection could get wrong."""
    rng = np.random.default_rng([seed, size])
    normal = rng.standard_normal(size).astype(np.float32)
    limits = np.finfo(np.float32)
    match shape:
        case "heavy-tailed":
            return np.sign(normal) * np.exp(4 * np.abs(normal)).astype(np.float32)
        case "sparse":
            return normal * (rng.random(size) < 0.02).astype(np.float32)
        case "ties":
            return np.round(normal * 2) / np.float32(2)
        case "equal":
            return np.full(size, -1.5, np.float32)
        case "zeros":
            return np.zeros(size, np.float32)
        case "signed-zeros":
            return np.copysign(np.float32(0), normal) * (rng.random(size) < 0.9) + np.where(
                rng.random(size) < 0.05, normal, np.float32(-0.0)
            ).astype(np.float32)
        case "subnormal":
            return (normal * limits.smallest_subnormal * 9).astype(np.float32)
        case "extreme":
            choice = [limits.max, -limits.max, limits.tiny, limits.smallest_subnormal, -0.0, 1.0]
            return rng.choice(np.array(choice, np.float32), size)
        case _:
            return normal
