"""What the server's side of an exchange costs: ``python -m experiments.exchange_cost.server``.

Eight workers, Gaussian updates on random supports, 0.1 % up and down, float32. The same requests go
to records that walk through the log where that pays, and to records that compare everything: a
round of the one, a round of the other, and one of ``np.subtract(model, replica, out=tmp)``, the
yardstick, in turn. The replies must be the same. Medians, without the first rounds; one core.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from dgs import candidates
from dgs.kernels import kernels
from dgs.shard import Shard
from dgs.space import ParameterSpace, TensorSpec
from dgs.tracker import Record
from dgs.view import Part, View
from experiments.exchange_cost.paths import resnet18_sizes

Report = dict[str, Any]
Floats = npt.NDArray[np.float32]


class Site:
    """A shard with its sessions, all of which hold everything."""

    def __init__(self, sizes: list[int], workers: int, settings: dict[str, Any]) -> None:
        """Open the sessions; they start with the model."""
        space = ParameterSpace(tuple(TensorSpec(f"t{i}", (n,)) for i, n in enumerate(sizes)))
        model = np.random.default_rng(0).standard_normal(space.size, dtype=np.float32)
        self.part = Part(View.whole(space), 0, space.size)
        self.part.prepare()
        self.shard = Shard(model)
        self.records = [Record(self.part, model, **settings) for _ in range(workers)]
        for record in self.records:
            record.follow(self.shard)

    def exchange(self, worker: int, body: bytes, count: int) -> bytes:
        """Decode, apply, find the difference, select, record and encode."""
        decode = kernels(self.part.size).decode_body
        update = decode(body, self.part.segment_sizes, "float32", count)
        if self.shard.apply(*update) >= 0:
            raise RuntimeError("the update is not finite")
        return self.records[worker].advance().body


def bodies(part: Part, density: float, number: int) -> list[tuple[bytes, int]]:
    """Draw encoded updates."""
    rng = np.random.default_rng(1)
    total = part.size
    drawn = []
    for _ in range(number):
        indices = np.unique(rng.integers(0, total, int(density * total)))
        values = rng.standard_normal(indices.size, dtype=np.float32)
        body = kernels(total).encode_body(indices, values, part.segment_sizes, "float32").body
        drawn.append((body, indices.size))
    return drawn


def timed(times: list[float], call: Callable[..., Any], *arguments: Any) -> Any:
    """Append how long a call takes, in seconds; return its result."""
    began = time.perf_counter()
    result = call(*arguments)
    times.append(time.perf_counter() - began)
    return result


def measure(
    scale: float, *, workers: int, density: float, entries: int, rounds: int, selection: str
) -> Report:
    """Return medians in milliseconds.

    Args:
        scale: factor on ResNet-18's size.
        workers: sessions.
        density: fraction that is sent up, and down.
        entries: where above 0, entries sent instead, whatever the size.
        rounds: exchanges of each session; the first quarter is not counted.
        selection: as in `WorkerConfig`.
    """
    sizes = resnet18_sizes(scale)
    total = sum(sizes)
    density = entries / total if entries else density
    settings = {
        "density": density,
        "selection": selection,
        "dense_below": 32,
        "values": "float32",
    }
    walking, comparing = (Site(sizes, workers, settings) for _ in range(2))
    updates = bodies(walking.part, density, rounds * workers)
    walk_cost = candidates.WALK_COST
    tmp = np.zeros(total, np.float32)
    times: dict[str, list[float]] = {"walk": [], "compare": [], "np.subtract": []}
    for begin in range(0, rounds * workers, workers):
        steps = range(begin, begin + workers)
        got = [timed(times["walk"], walking.exchange, s - begin, *updates[s]) for s in steps]
        candidates.WALK_COST = 1 << 40  # type: ignore[misc]  # so that walking never pays
        compared = [
            timed(times["compare"], comparing.exchange, s - begin, *updates[s]) for s in steps
        ]
        candidates.WALK_COST = walk_cost  # type: ignore[misc]
        if got != compared:
            raise RuntimeError("the replies of the two differ")
        for record in comparing.records:
            timed(times["np.subtract"], np.subtract, comparing.shard.model, record.replica, tmp)
    kept = {name: taken[len(taken) // 4 :] for name, taken in times.items()}
    medians = {name: 1e3 * float(np.median(taken)) for name, taken in kept.items()}
    return {
        "parameters": total,
        "entries": int(density * total),
        "selection": selection,
        "ms": medians,
        "fastest_ms": {name: 1e3 * min(taken) for name, taken in kept.items()},
        "mean_ms": {name: 1e3 * float(np.mean(taken)) for name, taken in kept.items()},
        "walk / compare": medians["walk"] / medians["compare"],
        "compare / np.subtract": medians["compare"] / medians["np.subtract"],
        "compared by walking records": sum(r.compared for r in walking.records)
        / (total * rounds * workers),
        "bytes per session beyond the replica": max(r.nbytes for r in walking.records) - 4 * total,
        "bytes of the log": walking.shard.log.nbytes,
    }


def main() -> None:
    """Measure, and print JSON."""
    parser = argparse.ArgumentParser(prog="python -m experiments.exchange_cost.server")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on ResNet-18's size")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--density", type=float, default=0.001)
    parser.add_argument("--entries", type=int, default=0, help="entries sent, instead of a density")
    parser.add_argument("--rounds", type=int, default=40, help="exchanges of each worker")
    parser.add_argument("--selection", choices=["tracked", "exact"], default="tracked")
    given = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    kernels(1 << 30).warm_up()
    report = measure(
        given.scale,
        workers=given.workers,
        density=given.density,
        entries=given.entries,
        rounds=given.rounds,
        selection=given.selection,
    )
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
