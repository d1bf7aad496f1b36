"""Show how far a run is: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["Bar", "Lines", "Watcher", "make_watcher"]

LINE_INTERVAL_S = 3.0
"""Seconds between two plain lines."""


class Watcher(Protocol):
    """Is told how far the method that runs has come."""

    def begin(self, method: str, total: int) -> None:
        """Start with a method.

        Args:
            method: its name.
            total: updates that the server will have applied at its end.
        """
        ...

    def update(self, version: int, staleness: float) -> None:
        """Take what the server's status says.

        Args:
            version: updates applied so far.
            staleness: median so far.
        """
        ...

    def end(self) -> None:
        """End with the method's training, however it ended."""
        ...

    def note(self, text: str) -> None:
        """Say what happens between two methods."""
        ...


class Bar:
    """A progress bar for each method; counts are the server's.

    Args:
        console: a terminal.
    """

    def __init__(self, console: Console) -> None:
        """Show nothing before `begin`."""
        self._console = console
        self._progress: Progress | None = None
        self._total = 0

    def begin(self, method: str, total: int) -> None:
        """See `Watcher`."""
        self._total = total
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("updates, staleness {task.fields[staleness]:g}"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._progress.add_task(method, total=total, staleness=0)
        self._progress.start()

    def update(self, version: int, staleness: float) -> None:
        """See `Watcher`."""
        if self._progress is not None:
            task = self._progress.task_ids[0]
            self._progress.update(task, completed=version, staleness=staleness)

    def end(self) -> None:
        """See `Watcher`."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def note(self, text: str) -> None:
        """See `Watcher`."""
        self._console.print(text, markup=False, highlight=False)


class Lines:
    """A line at the start, one every few seconds, and one at the end.

    Args:
        write: takes a line.
        clock: tells seconds; never goes back.
    """

    def __init__(
        self, write: Callable[[str], object], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Say nothing before `begin`."""
        self._write = write
        self._clock = clock
        self._method, self._total, self._version = "", 0, 0
        self._last_s = 0.0

    def begin(self, method: str, total: int) -> None:
        """See `Watcher`."""
        self._method, self._total, self._version = method, total, 0
        self._last_s = self._clock()
        self._write(f"{method}: starting the processes")

    def update(self, version: int, staleness: float) -> None:
        """See `Watcher`."""
        self._version = version
        now = self._clock()
        if now - self._last_s >= LINE_INTERVAL_S:
            self._last_s = now
            rest = f", median staleness {staleness:g}" if version else "; the workers start"
            self._write(f"{self._method}: {version} of {self._total} updates{rest}")

    def end(self) -> None:
        """See `Watcher`."""
        self._write(f"{self._method}: ended after {self._version} of {self._total} updates")

    def note(self, text: str) -> None:
        """See `Watcher`."""
        self._write(text)


def make_watcher(console: Console) -> Watcher:
    """Return a bar for a terminal, lines for anything else."""
    if console.is_terminal:
        return Bar(console)
    return Lines(lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True))
