"""What everything in one history shares: time, chance, weather, and what is written down."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from random import Random

from dgs.space import ParameterSpace, TensorSpec
from dgs.view import Part, View
from experiments.faults.simulation.checks import Ledger
from experiments.faults.simulation.clock import Clock, Trace
from experiments.faults.simulation.network import Network
from experiments.faults.simulation.weather import Weather

__all__ = ["Stage", "Tally"]


@dataclass(slots=True)
class Tally:
    """Counts of what one history, or many, contained."""

    histories: int = 0
    events: int = 0
    applied: int = 0
    acknowledged: int = 0
    kills: int = 0
    power_losses: int = 0
    recoveries: int = 0
    snapshots: int = 0
    evictions: int = 0
    worker_crashes: int = 0
    worker_resumes: int = 0
    rejoins: int = 0

    def add(self, other: Tally) -> None:
        """Add the counts of another."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(slots=True)
class Stage:
    """The common ground of one history.

    Args:
        seed: decides everything.
    """

    seed: int
    rng: Random = field(init=False)
    weather: Weather = field(init=False)
    clock: Clock = field(init=False)
    trace: Trace = field(init=False)
    network: Network = field(init=False)
    ledger: Ledger = field(init=False)
    view: View = field(init=False)
    parts: list[Part] = field(init=False)
    tally: Tally = field(init=False)

    def __post_init__(self) -> None:
        """Draw the weather and lay out the model."""
        self.rng = Random(self.seed)
        self.weather = Weather.draw(self.rng)
        self.clock = Clock()
        self.trace = Trace(self.clock)
        self.network = Network(self.clock, self.weather, self.rng)
        self.ledger = Ledger(self.weather.num_shards)
        self.tally = Tally(histories=1)
        weather = self.weather
        self.view, self.parts = _layout(weather.shapes, weather.buffers, weather.num_shards)

    def soon(self, mean_s: float) -> float:
        """Draw a waiting time, exponentially distributed."""
        return self.rng.expovariate(1.0 / mean_s)


@cache
def _layout(
    shapes: tuple[tuple[int, ...], ...], buffers: int, num_shards: int
) -> tuple[View, list[Part]]:
    """Return the model of some shapes, and its shards: the same for many seeds."""
    tensors = [TensorSpec(f"t{i}", shape) for i, shape in enumerate(shapes)]
    if buffers:
        tensors.append(TensorSpec("b", (buffers,), buffer=True))
    space = ParameterSpace(tuple(tensors))
    view = View.whole(space)
    return view, [Part(view, start, stop) for start, stop in space.shard_ranges(num_shards)]
