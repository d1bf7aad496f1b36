"""Many threads wait for one log: the first to wait writes for all."""

from __future__ import annotations

from threading import Condition
from typing import Protocol

__all__ = ["Committable", "GroupCommit"]


class Committable(Protocol):
    """A log, as those see it who wait for it."""

    @property
    def position(self) -> int:
        """Number of records appended."""
        ...

    @property
    def durable(self) -> int:
        """How many of them are on disk."""
        ...

    def commit(self) -> int:
        """Make all appended records durable; by one thread at a time."""
        ...


class GroupCommit:
    """Wait for records to become durable, with as few syncs as there can be.

    While one thread syncs, others append; the next sync takes all of theirs.

    Args:
        log: what is committed, by nobody else meanwhile.

    Example:
        >>> class Memory:
        ...     position = durable = 0
        ...     def commit(self):
        ...         self.durable = self.position
        ...         return self.durable
        >>> log = Memory()
        >>> log.position = 3
        >>> GroupCommit(log).wait(2); log.durable
        3
    """

    def __init__(self, log: Committable) -> None:
        """Nobody waits yet."""
        self._log = log
        self._changed = Condition()
        self._is_busy = False

    @property
    def position(self) -> int:
        """Number of records appended so far."""
        return self._log.position

    def wait(self, position: int) -> None:
        """Return once the first `position` records are durable.

        Raises:
            StateError: the log cannot be written; nothing may be told of what waits for it.
        """
        while self._log.durable < position:
            with self._changed:
                if self._is_busy:
                    self._changed.wait()
                    continue
                self._is_busy = True
            try:
                self._log.commit()
            finally:
                with self._changed:
                    self._is_busy = False
                    self._changed.notify_all()
