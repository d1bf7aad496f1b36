"""Which fault happens when, to whom, for how long: drawn from a seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from random import Random
from typing import Literal, NamedTuple, get_args

__all__ = ["KINDS", "ON_SERVERS", "WEIGHTS", "Fault", "Kind", "faults"]

Kind = Literal[
    "kill server",
    "end server",
    "stop server",
    "kill worker",
    "stop worker",
    "replace worker",
    "cut",
    "reset",
    "black hole",
    "refuse",
    "weak link",
]
KINDS: tuple[Kind, ...] = get_args(Kind)

ON_SERVERS: frozenset[Kind] = frozenset({"kill server", "end server", "stop server"})
"""Aimed at a shard; those on workers at a worker, those on links at a worker's way to a shard."""

WEIGHTS: Mapping[Kind, float] = dict.fromkeys(KINDS, 1.0) | {"kill server": 6.0, "kill worker": 2.0}
"""How often each kind is drawn, relative to the others."""

LONGEST_S = 5.0
"""Seconds that a lasting fault may last: several in a row stay below the idle limit."""


class Fault(NamedTuple):
    """One fault."""

    after_s: float
    """Seconds since the fault before it."""
    kind: Kind
    shard: int
    worker: int
    lasts_s: float
    """Seconds until a lasting fault ends, or what was killed is started again."""


def faults(
    seed: int,
    shards: int,
    workers: int,
    *,
    mean_gap_s: float,
    weights: Mapping[Kind, float] = WEIGHTS,
) -> Iterator[Fault]:
    """Draw faults without end.

    Args:
        seed: equal seeds give equal faults.
        shards: number of servers.
        workers: number of workers.
        mean_gap_s: mean seconds from one fault to the next; exponentially distributed.
        weights: how often each kind is drawn; kinds that are missing are not.

    Example:
        >>> next(faults(1, 2, 3, mean_gap_s=1.0)) == next(faults(1, 2, 3, mean_gap_s=1.0))
        True
    """
    random = Random(seed)
    kinds = [k for k in KINDS if weights.get(k, 0.0) > 0.0]
    while True:
        kind = random.choices(kinds, [weights[k] for k in kinds])[0]
        restarted = kind in ("kill server", "kill worker", "end server")
        yield Fault(
            after_s=random.expovariate(1.0 / mean_gap_s),
            kind=kind,
            shard=random.randrange(shards),
            worker=random.randrange(workers),
            lasts_s=random.uniform(0.0, 1.0 if restarted else LONGEST_S),
        )
