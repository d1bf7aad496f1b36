"""What one seed draws: how many take part, what they agree on, and how badly things go."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Self, get_args

from dgs.config import Rule, Selection, Values, WorkerConfig

__all__ = ["Weather"]

_SHAPES = (((6, 2), (5,)), ((8,), (), (3, 2)), ((13,),), ((4, 4), (2, 3), (1,)))


@dataclass(slots=True)
class Weather:
    """The parameters of one history. Rates are probabilities per opportunity.

    `calm` ends everything that is a fault; the rest of the run must then go well.
    """

    shapes: tuple[tuple[int, ...], ...]
    buffers: int
    num_shards: int
    num_workers: int
    exact: bool
    """Whether all arithmetic is free of rounding, so that mass can be compared."""
    config: WorkerConfig
    hash_interval: int
    exchanges: int
    """Updates to be answered before the calm, all workers together."""
    drop: float
    duplicate: float
    late: float
    """Share of copies that arrive much later than the others."""
    flip: float
    """Share of frames with one bit turned over on the way."""
    delay_s: float
    think_s: float
    gather_s: float
    """Longest wait before a commit, in which other requests may join it."""
    server_crash: float
    """Per request."""
    failpoint: float
    """Per disk operation."""
    no_memory: float
    """Per exchange: that memory runs out half-way through it."""
    power: float
    """Share of server crashes that are power losses."""
    interleave: float
    """Per disk operation of a snapshot: that something else happens meanwhile."""
    full: float
    """Per commit: that the disk is full for a while."""
    bad_sync: float
    """Per sync: that it fails."""
    snapshot: float
    """Per commit: that a snapshot is begun."""
    lease_s: float
    """Silence after which a session is closed; 0 for never."""
    worker_crash: float
    """Per exchange."""
    keeps_state: float
    """Share of workers' crashes that leave a saved state."""
    is_calm: bool = False

    @classmethod
    def draw(cls, rng: Random) -> Self:
        """Draw everything that a seed decides before the run."""
        exact = rng.random() < 0.4
        shards = rng.choice((1, 1, 1, 1, 1, 1, 1, 2, 2, 3))
        return cls(
            shapes=rng.choice(_SHAPES),
            buffers=rng.choice((0, 0, 2)),
            num_shards=shards,
            num_workers=rng.choice((1, 2, 2, 3)),
            exact=exact,
            config=_draw_config(rng, exact),
            hash_interval=rng.choice((1, 2, 64)),
            exchanges=max(2, rng.choice((3, 4, 6, 10)) // shards),
            drop=_some(rng, 0.3),
            duplicate=_some(rng, 0.3),
            late=_some(rng, 0.3),
            flip=_some(rng, 0.05),
            delay_s=rng.choice((0.001, 0.01, 0.05)),
            think_s=rng.choice((0.001, 0.05, 0.2)),
            gather_s=rng.choice((0.0, 0.01, 0.1)),
            server_crash=_some(rng, 0.04),
            failpoint=_some(rng, 0.02),
            no_memory=_some(rng, 0.02) if rng.random() < 0.3 else 0.0,
            power=rng.choice((0.0, 0.5, 0.5, 1.0)),
            interleave=_some(rng, 0.5),
            full=_some(rng, 0.1),
            bad_sync=_some(rng, 0.02),
            snapshot=rng.choice((0.0, 0.1, 0.2, 0.4)),
            lease_s=rng.choice((0.0, 0.0, 0.0, 0.5, 1.5)),
            worker_crash=_some(rng, 0.15),
            keeps_state=rng.choice((0.0, 0.5, 1.0)),
        )

    def calm(self) -> None:
        """End all faults; snapshots go on."""
        self.drop = self.duplicate = self.late = self.flip = 0.0
        self.server_crash = self.no_memory = self.failpoint = self.full = self.bad_sync = (
            self.worker_crash
        ) = 0.0
        self.lease_s = 0.0
        self.is_calm = True


def _some(rng: Random, most: float) -> float:
    """Draw a rate: none in a third of the seeds, so that faults also meet alone."""
    return 0.0 if rng.random() < 1 / 3 else most * rng.random()


def _draw_config(rng: Random, exact: bool) -> WorkerConfig:
    selections: tuple[Selection, ...] = get_args(Selection)
    if exact:
        values: Values = "float32"
        rule: Rule = rng.choice(("residual", "residual", "none"))
    else:
        values = rng.choice(("float32", "float32", "bfloat16", "int8", "sign"))
        rule = rng.choice(("samomentum", "residual", "dgc", "none"))
    density = rng.choice((0.1, 0.3, 1.0))
    if rule == "none":  # keeps nothing back
        values, density = "float32", 1.0
    return WorkerConfig(
        rule=rule,
        momentum=0.0 if rule in ("none", "residual") else 0.5,
        density=density,
        download_density=rng.choice((0.1, 0.3, 1.0)),
        dense_below=rng.choice((0, 4)),
        values=values,
        selection=rng.choice(selections),
    )
