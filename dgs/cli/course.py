"""The workers' course under `dgs launch`, from their start to the exit code."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from dgs.cli.console import note
from dgs.errors import ServerUnavailableError
from dgs.processes import Command, ProcessGroup

__all__ = ["Course", "Revive", "exit_code"]

Revive = Callable[[str, str], None]
"""Starts a server again: takes its label, and how it ended, in words. Raises
`ServerUnavailableError` where it does not."""

INTERRUPT_S = 15.0
"""Seconds that workers get to end after Ctrl-C was passed on to them."""

STOP_S = 10.0
"""Seconds between SIGTERM and SIGKILL for workers whose run is over."""


def exit_code(returncode: int) -> int:
    """Turn a child's return code into an exit code, as a shell does.

    Example:
        >>> exit_code(3), exit_code(-9)
        (3, 137)
    """
    return returncode if returncode >= 0 else 128 - returncode


class Course:
    """Workers that run together, and how it ends.

    Args:
        group: runs the workers; its other children are their servers.
        workers: what to run.
        max_restarts: how often each worker that fails is started again.
        revive: called when a server has ended; None to end the run then.
    """

    def __init__(
        self,
        group: ProcessGroup,
        workers: Sequence[Command],
        max_restarts: int,
        revive: Revive | None = None,
    ) -> None:
        """Start nothing yet."""
        self._group = group
        self._workers = {w.label: w for w in workers}
        self._max_restarts = max_restarts
        self._revive = revive
        self._restarts = dict.fromkeys(self._workers, 0)
        self._unfinished = set(self._workers)
        self._signals: list[int] = []

    @property
    def hurried(self) -> bool:
        """Whether a second signal came: the user wants everything to end now."""
        return len(self._signals) > 1

    def follow(self) -> int:
        """Start the workers and return the exit code once the run is over; no worker is left then.

        Raises:
            ServerUnavailableError: a server of the group has ended.
            Exception: what the group's `on_line` raised.
        """
        with self._caught_signals():
            try:
                return self._follow()
            finally:
                self._group.stop(0.0 if self.hurried else STOP_S, self._left())

    def _follow(self) -> int:
        for worker in self._workers.values():
            self._group.start(worker)
        while not self._signals and self._unfinished:
            for label, returncode in self._group.wait_any(3600.0):
                failure = self._take_end(label, returncode)
                if failure is not None:
                    return failure
        if self._signals:
            return self._end_early()
        for label, returncode in self._group.exited():  # servers: the model is yet to be saved
            self._take_end(label, returncode)
        return 0

    def _left(self) -> set[str]:
        return self._unfinished & set(self._group.running)

    def _take_end(self, label: str, returncode: int) -> int | None:
        """Note a child's end; return the exit code if it ends the run."""
        if self._signals:
            return None
        how = _how(returncode)
        if label not in self._workers:
            if self._revive is not None:
                self._revive(label, how)
                return None
            raise ServerUnavailableError(
                f"{label} {how} while workers were training; the run cannot go on without its model"
            )
        if returncode == 0:
            self._unfinished.remove(label)
            return None
        if self._restarts[label] < self._max_restarts:
            self._restarts[label] += 1
            note(f"{label} {how}; restart {self._restarts[label]} of {self._max_restarts}")
            self._group.start(self._workers[label])
            return None
        note(f"{label} {how}; ending the run")
        return exit_code(returncode)

    def _end_early(self) -> int:
        """Pass the first signal on, and wait for the workers to end of themselves."""
        first = self._signals[0]
        if first == signal.SIGINT:
            note("interrupted: waiting for the workers to end; Ctrl-C again to kill them")
            self._group.interrupt(self._left())
            until = time.monotonic() + INTERRUPT_S
            while self._left() and not self.hurried and time.monotonic() < until:
                self._group.wait_any(max(0.0, until - time.monotonic()))
        return 128 + first

    @contextmanager
    def _caught_signals(self) -> Iterator[None]:
        def take(number: int, frame: FrameType | None) -> None:
            self._signals.append(number)
            self._group.wake()

        before = {n: signal.signal(n, take) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _how(returncode: int) -> str:
    """Describe an end in words."""
    if returncode >= 0:
        return f"ended with exit code {returncode}"
    try:
        return f"was ended by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"was ended by signal {-returncode}"
