"""Wait for processes that are not this one's children, and for lines of those that are."""

from __future__ import annotations

import os
import queue
import select
import subprocess
import threading
from types import TracebackType

from tests.helpers.source_tree import ROOT

PATIENCE_S = 60.0
"""Bound of every wait; a loaded machine takes seconds to import torch."""


def has_ended(pid: int, timeout_s: float = PATIENCE_S) -> bool:
    """Wait for a process to end, of whoever's child it is."""
    try:
        watched = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([watched], [], [], timeout_s)[0])
    finally:
        os.close(watched)


class Spoken:
    """A process whose lines are awaited; leaving the block kills it."""

    def __init__(self, *argv: str, **env: str) -> None:
        self.process = subprocess.Popen(
            argv,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self._arrived: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._arrived.put(line.rstrip("\n"))
        self._arrived.put(None)

    def line_with(self, text: str) -> str:
        """Wait for a line that holds a text."""
        while (line := self._arrived.get(timeout=PATIENCE_S)) is not None:
            self.lines.append(line)
            if text in line:
                return line
        raise AssertionError(f"ended without a line with {text!r}:\n{self.output}")

    def ends_with(self) -> int:
        """Wait for the end of the output and of the process; return its code."""
        while (line := self._arrived.get(timeout=PATIENCE_S)) is not None:
            self.lines.append(line)
        return self.process.wait(PATIENCE_S)

    def __enter__(self) -> Spoken:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join(PATIENCE_S)
        assert self.process.stdout is not None
        self.process.stdout.close()
