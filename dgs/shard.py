"""The model of one shard, its version, and the log of its latest changes.

A shard lets sessions keep a version number instead of a replica where a reply brings them all that
differs: what such a *follower* has is the model of that version, rebuilt from the log when asked
for. Before the log is cut, followers that would lose their way are told to keep a replica.
"""

from __future__ import annotations

from typing import Protocol
from weakref import WeakSet

import numpy as np

from dgs.changes import Change, ChangeLog, undo
from dgs.kernels import change_kernels
from dgs.space import FloatArray, Int64Array

__all__ = ["Follower", "Scratch", "Shard"]

_LOG_SHARE = 64
"""The log holds up to one coordinate in so many: N/4 bytes. Walking through more takes longer than
comparing the whole model."""

_FOLLOWED_LOG_SHARE = 4
"""The same while there are followers: as much as one replica."""


class Follower(Protocol):
    """Whoever has the model of a version, but no copy of it."""

    @property
    def version(self) -> int:
        """The version."""
        ...

    def materialise(self) -> None:
        """Make the copy, and stop following."""
        ...


class Scratch:
    """Arrays that one exchange after the other uses: fresh pages would cost more than the work.

    Example:
        >>> scratch = Scratch()
        >>> scratch.integers("a", 3).size, scratch.floats("b", 0).dtype.name
        (3, 'float32')
    """

    def __init__(self) -> None:
        """Start with no arrays."""
        self._integers: dict[str, Int64Array] = {}
        self._floats: dict[str, FloatArray] = {}

    def integers(self, name: str, size: int) -> Int64Array:
        """Return an int64 array; valid, and not zeroed, until the name is next asked for."""
        found = self._integers.get(name)
        if found is None or found.size < size:
            found = self._integers[name] = np.empty(size + size // 4, np.int64)
        return found[:size]

    def floats(self, name: str, size: int) -> FloatArray:
        """Return a float32 array; valid, and not zeroed, until the name is next asked for."""
        found = self._floats.get(name)
        if found is None or found.size < size:
            found = self._floats[name] = np.empty(size + size // 4, np.float32)
        return found[:size]


class Shard:
    """Hold a model; apply updates and remember what they changed.

    Args:
        model: shape ``(n,)``; copied. Negative zeros become zeros, of which no later subtraction
            can make one: so equal values have equal bits.
        version: number of updates that it has had.

    Attributes:
        model: the values, of version `version`.
        version: number of updates applied.
        log: the latest changes.
        followers: sessions without a replica.
        scratch: for walks through the log, of at most twice its bytes and 4 MiB.

    Note:
        Deterministic. The log takes at most ``n / 4`` bytes; while there are followers, ``4 * n``,
        the size of one replica.

    Example:
        >>> shard = Shard(np.zeros(640, np.float32))
        >>> shard.apply(np.array([3, 5]), np.ones(2, np.float32))
        -1
        >>> shard.version, shard.model[3], shard.model_at(0)[3]
        (1, np.float32(-1.0), np.float32(0.0))
    """

    def __init__(self, model: FloatArray, version: int = 0) -> None:
        """Copy the model. Compiles, or loads, what exchanges will need."""
        change_kernels(model.size)
        self.model: FloatArray = np.add(model, np.float32(0.0), dtype=np.float32)
        self._is_lent = False
        self.version = version
        self.log = ChangeLog(version)
        self.followers: WeakSet[Follower] = WeakSet()
        self.scratch = Scratch()

    def apply(self, indices: Int64Array, values: FloatArray) -> int:
        """Subtract an update and log it, or refuse it whole.

        Args:
            indices: strictly increasing, in ``[0, n)``; kept, not copied.
            values: one per index.

        Returns:
            -1, or the position in the update of the first entry that would leave NaN or infinity in
            the model; nothing is changed then.
        """
        if self._is_lent:
            self.model, self._is_lent = self.model.copy(), False
        before, after = np.empty(indices.size, np.float32), np.empty(indices.size, np.float32)
        kernels = change_kernels(self.model.size)
        bad = kernels.apply_and_log(self.model, indices, values, before, after)
        if bad < 0:
            self.version += 1
            self.log.append(Change(indices, before, after))
            self._bound_log()
        return bad

    def model_at(self, version: int) -> FloatArray:
        """Return a copy of the model of a version that the log reaches."""
        model = self.model.copy()
        undo(model, self.log.since(version))
        return model

    def lend(self) -> FloatArray:
        """Return the model as it is now, for good: the next update changes a copy of it."""
        self._is_lent = True
        return self.model

    def _bound_log(self) -> None:
        share = _FOLLOWED_LOG_SHARE if self.followers else _LOG_SHARE
        most = self.model.size // share
        if len(self.log) <= most:
            return
        start = self.log.start_for(most)
        for follower in list(self.followers):
            if follower.version < start:
                follower.materialise()
        self.log.cut(most)
