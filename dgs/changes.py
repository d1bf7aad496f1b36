"""The log of what updates changed: enough to go back, and to see what changed since.

Each entry holds the coordinates of one update with the model's values before and after it. A
session that was answered at some version finds there all that its replica can lack since; a model
of an earlier version is rebuilt by undoing entries. The log is bounded by cutting off its oldest
entries.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from dgs.space import FloatArray, Int64Array

__all__ = ["ENTRY_BYTES", "Change", "ChangeLog", "undo"]

ENTRY_BYTES = 16
"""What a changed coordinate takes in the log: itself, and the model before and after."""


class Change(NamedTuple):
    """What one update changed.

    Attributes:
        indices: coordinates, strictly increasing.
        before: the model there before the update.
        after: the model there after the update.
    """

    indices: Int64Array
    before: FloatArray
    after: FloatArray


def undo(model: FloatArray, changes: Sequence[Change]) -> None:
    """Take a model back to what it was before some changes, in place.

    Args:
        model: shape ``(n,)``, as the changes left it.
        changes: consecutive, the oldest first.
    """
    for change in reversed(changes):
        model[change.indices] = change.before


class ChangeLog:
    """The latest changes of a model, one per version.

    Args:
        start: version of the model now.

    Example:
        >>> import numpy as np
        >>> log = ChangeLog()
        >>> log.append(Change(np.array([2]), np.ones(1, np.float32), np.zeros(1, np.float32)))
        >>> [change.indices.tolist() for change in log.since(0)], log.count_since(1)
        ([[2]], 0)
        >>> log.cut(0)
        >>> log.reaches(0), log.reaches(1)
        (False, True)
    """

    def __init__(self, start: int = 0) -> None:
        """Start without changes."""
        self._changes: deque[Change] = deque()
        self._totals: deque[int] = deque([0])
        self._start = start

    def __len__(self) -> int:
        """Count the coordinates of all changes."""
        return self._totals[-1] - self._totals[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return ENTRY_BYTES * len(self)

    def append(self, change: Change) -> None:
        """Note the next version's change."""
        self._changes.append(change)
        self._totals.append(self._totals[-1] + change.indices.size)

    def reaches(self, version: int) -> bool:
        """Tell whether all changes since a version are there."""
        return version >= self._start

    def since(self, version: int) -> list[Change]:
        """Return the changes since a version that the log reaches, the oldest first."""
        assert self.reaches(version), (version, self._start)
        newest = range(version - self._start, len(self._changes))
        return [self._changes[i] for i in newest]

    def count_since(self, version: int) -> int:
        """Count the coordinates of these changes."""
        return self._totals[-1] - self._totals[version - self._start]

    def start_for(self, most: int) -> int:
        """Return from which version on the log reaches once it is cut to `most` coordinates."""
        start, newest = self._start, self._totals[-1]
        for total in self._totals:
            if newest - total <= most:
                break
            start += 1
        return start

    def cut(self, most: int) -> None:
        """Drop the oldest changes until at most that many coordinates are left."""
        for _ in range(self.start_for(most) - self._start):
            self._changes.popleft()
            self._totals.popleft()
            self._start += 1
