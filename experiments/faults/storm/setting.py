"""What a storm is set to: times, links, sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

__all__ = ["Setting"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One run. Everything is virtual time."""

    seed: int = 0
    workers: int = 32
    horizon_s: float = 3600.0
    kills_per_hour: float = 0.0
    """Of all workers and the server together; only what is up is killed, so all of them count."""
    server_share: float = 0.05
    """Share of the kills that hit the server, or the coordinator of a synchronous group."""
    restart_s: float = 30.0
    """Median time from a worker's kill until its new process is ready to join."""
    restart_spread: float = 0.25
    """Standard deviation of its logarithm."""
    server_restart_s: float = 5.0
    """From the server's kill until it listens again, its log carried out."""

    compute_s: float = 1.0
    """Mean time of one step of one worker."""
    compute_spread: float = 0.2
    """Standard deviation of its logarithm; drawn anew for every step, machines are alike."""
    round_trip_s: float = 0.05
    """Of a worker's link, without the bytes."""
    bytes_per_s: float = 12.5e6
    """Of a worker's link, each way: 100 Mbit/s."""
    sync_s: float = 0.004
    """Of one fdatasync of the server's log."""
    snapshot_s: float = 60.0
    """Between two snapshots of the server."""

    heartbeat_s: float = 5.0
    """After which a silent replica of an elastic group is taken for dead; torchft's default."""
    regroup_s: float = 1.0
    """To connect the members of a synchronous group anew."""
    checkpoint_s: float = 60.0
    """Between two checkpoints of the static group that has them."""

    batch: int = 16
    """Samples of a worker's step."""
    rate: float = 0.0
    """Learning rate; 0 for the method's own."""
    window_s: float = 5.0
    """Of participation."""
    looks: int = 40
    """Times that the loss is measured."""

    @property
    def hours(self) -> float:
        """The horizon in hours."""
        return self.horizon_s / 3600.0

    def carry_s(self, size_bytes: int) -> float:
        """Return how long a message takes one way."""
        return self.round_trip_s / 2 + size_bytes / self.bytes_per_s

    def collective_s(self, size_bytes: int) -> float:
        """Return how long an all-reduce takes: two round trips, and the least bytes there can be.

        Rings and trees over this many members take longer.
        """
        return 2 * self.round_trip_s + 2 * size_bytes / self.bytes_per_s

    def draw_compute_s(self, random: Random) -> float:
        """Draw the time of a step."""
        shift = self.compute_spread**2 / 2  # so that the mean is compute_s
        return self.compute_s * math.exp(random.gauss(0.0, self.compute_spread) - shift)
