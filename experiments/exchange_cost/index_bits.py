"""What positions cost on the wire, beside what they must cost.

A random support of density p has an entropy of ``H(p) / p`` bits an entry: 8.08 at 1 %, 11.41 at
0.1 %. A clustered one has less, and must never cost more than a random one of as many entries. The
entropy of the chain that drew it is told as well: what a coder that knows the chain would need.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dgs.kernels import kernels
from dgs.space import ParameterSpace, TensorSpec
from dgs.view import Part, View
from experiments.exchange_cost.figures import Figure, Report, as_rows

__all__ = ["measure"]

Bools = npt.NDArray[np.bool_]

REACH_BITS = {0.01: 8.16, 0.001: 11.52}
RUNS = (4, 16, 64)
"""Mean lengths of the runs in supports that a chain of two states draws."""

HOT_BLOCK, HOT_SHARE, HOT_FACTOR = 4096, 0.1, 9.0
"""Blocks of so many coordinates, of which a tenth are so many times as dense as the support."""


def measure(sizes: Sequence[int], seeds: Sequence[int] = (0, 1, 2)) -> Report:
    """Return bits an entry of random and clustered supports, and the figures; worst of the seeds.

    Args:
        sizes: of the tensors.
        seeds: of the supports.
    """
    segments, one = _segments(sizes), _segments([sum(sizes)])
    rows = []
    for density in REACH_BITS:
        for seed in seeds:
            rows += _rows(segments, density, np.random.default_rng(seed))
            alone = _rows(one, density, np.random.default_rng(seed))[0]
            rows.append({**alone, "support": "one tensor"})
    figures = [
        Figure(
            f"index bits per entry, {support}, {density:.1%}",
            max(r["bits"] for r in rows if (r["density"], r["support"]) == (density, support)),
            reach,
        )
        for density, reach in REACH_BITS.items()
        for support in ("random", "one tensor")
    ]
    clustered = max(
        r["bits"] / r["random_bits"] for r in rows if r["support"] not in ("random", "one tensor")
    )
    figures.append(Figure("clustered supports / entropy of random ones", clustered, 1.02))
    return {"rows": rows, "figures": as_rows(figures)}


def _segments(sizes: Sequence[int]) -> npt.NDArray[np.int64]:
    space = ParameterSpace(tuple(TensorSpec(f"t{i}", (n,)) for i, n in enumerate(sizes)))
    return Part(View.whole(space), 0, space.size).segment_sizes


def _rows(
    segments: npt.NDArray[np.int64], density: float, rng: np.random.Generator
) -> list[Report]:
    total = int(segments.sum())
    drawn: dict[str, tuple[Bools, float]] = {
        "random": (rng.random(total) < density, _entropy(density) / density)
    }
    for run in RUNS:
        drawn[f"runs of {run}"] = _chain(total, density, run, rng)
    drawn["hot blocks"] = _hot_blocks(total, density, rng)
    return [
        {
            "support": name,
            "density": density,
            "entries": int(support.sum()),
            "bits": _bits(np.flatnonzero(support), segments),
            "random_bits": _entropy(float(support.mean())) / float(support.mean()),
            "chain_bits": chain_bits,
        }
        for name, (support, chain_bits) in drawn.items()
    ]


def _bits(indices: npt.NDArray[np.int64], segments: npt.NDArray[np.int64]) -> float:
    """Count the bits an entry of a body beyond its values: tables and parameters included."""
    values = np.ones(indices.size, np.float32)
    encode = kernels(int(segments.sum())).encode_body
    body = encode(indices, values, segments, "float32").body
    return 8 * len(body) / indices.size - 32


def _chain(total: int, density: float, run: int, rng: np.random.Generator) -> tuple[Bools, float]:
    """Draw runs with a mean length, and gaps between them; return the entropy an entry, too."""
    leave, enter = 1 / run, density / (run * (1 - density))
    count = int(1.2 * total * density / run) + 1000
    lengths = np.stack((rng.geometric(enter, count), rng.geometric(leave, count)), axis=1)
    states = np.tile(np.array([False, True]), count)
    support = np.repeat(states, lengths.ravel())[:total]
    support = np.pad(support, (0, total - support.size))
    return support, _entropy(leave) + (1 - density) / density * _entropy(enter)


def _hot_blocks(total: int, density: float, rng: np.random.Generator) -> tuple[Bools, float]:
    """Draw a support of which most is in a tenth of the blocks; return the entropy an entry."""
    hot, cold = HOT_FACTOR * density, density * (1 - HOT_FACTOR * HOT_SHARE) / (1 - HOT_SHARE)
    is_hot = rng.random(math.ceil(total / HOT_BLOCK)) < HOT_SHARE
    share = np.repeat(np.where(is_hot, hot, cold).astype(np.float32), HOT_BLOCK)[:total]
    bits = HOT_SHARE * _entropy(hot) + (1 - HOT_SHARE) * _entropy(cold)
    return rng.random(total, dtype=np.float32) < share, bits / density


def _entropy(p: float) -> float:
    """Return the bits of one draw that is true with probability `p`."""
    if p in (0.0, 1.0):
        return 0.0
    return -p * math.log2(p) - (1 - p) * math.log2(1 - p)
