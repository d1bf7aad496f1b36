"""What is counted while training: staleness, exchanges, refusals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Histogram", "Stats"]


class Histogram:
    """How often each whole number occurred; percentiles are exact, memory follows the values.

    Example:
        >>> h = Histogram()
        >>> for n in (0, 3, 3, 9):
        ...     h.add(n)
        >>> h.percentile(50), h.percentile(99)
        (3, 9)
    """

    def __init__(self, values: Iterable[int] = ()) -> None:
        """Count `values`."""
        self._counts: Counter[int] = Counter(values)

    def add(self, value: int) -> None:
        """Count one occurrence of `value`."""
        self._counts[value] += 1

    def merge(self, other: Histogram) -> None:
        """Add the counts of another histogram."""
        self._counts.update(other._counts)

    def items(self) -> list[tuple[int, int]]:
        """Return the values with their counts, in order."""
        return sorted(self._counts.items())

    @classmethod
    def of(cls, items: Iterable[Iterable[int]]) -> Histogram:
        """Rebuild a histogram from `items`."""
        histogram = cls()
        for value, count in items:
            histogram._counts[value] = count
        return histogram

    @property
    def count(self) -> int:
        """Count all occurrences."""
        return self._counts.total()

    def percentile(self, percent: float) -> int:
        """Return the smallest value with at least `percent` % of the occurrences at or below it.

        Args:
            percent: in (0, 100].

        Returns:
            The value, or 0 if nothing was counted.
        """
        wanted, seen, result = self.count * percent / 100, 0, 0
        for value, count in sorted(self._counts.items()):
            if seen >= wanted:
                break
            seen, result = seen + count, value
        return result


@dataclass(slots=True)
class Stats:
    """What one optimizer has done so far; numbers only, read them at any time."""

    steps: int = 0
    """Steps of the inner optimizer."""
    exchanges: int = 0
    """Exchanges whose difference was taken."""
    bytes_up: int = 0
    """Bytes of update frames that the transport carried, repeated attempts included."""
    bytes_down: int = 0
    """Bytes of difference frames that the transport carried, repeated attempts included."""
    setup_bytes: int = 0
    """Bytes of joining and pulling, both ways."""
    version: int = 0
    """Updates that the servers had applied at the last exchange."""
    staleness: int = 0
    """Updates of others applied between the last two answers to this worker."""
    staleness_p50: int = 0
    """Median staleness over all exchanges."""
    staleness_p99: int = 0
    """99th percentile of the staleness over all exchanges."""
    refused: int = 0
    """Rounds thrown away because they held NaN or Inf."""
    resyncs: int = 0
    """Full pulls because base and the server's record of it differed: each one is a defect."""
    rejoins: int = 0
    """Times the server's model replaced the base because a saved session could not go on."""
    replaced: int = 0
    """Updates applied of earlier processes of this worker, if it did not go on with their session:
    those updates stay, what these processes held back is lost. 0 if there were none."""
