"""The processes of a run: server shards and workers that are killed, stopped and started again."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from dgs.processes import Command, ProcessGroup
from experiments.faults.proxy import FaultProxy

__all__ = ["ENVIRONMENT", "Children", "Shard", "Trainee", "address_in"]

ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
"""Of every child."""


class Children(ProcessGroup):
    """A group whose members can be sent any signal, and whose output goes to files.

    Args:
        logs: folder that gets one file a label.
    """

    def __init__(self, logs: Path) -> None:
        """Start without children."""
        super().__init__()
        self._logs = logs
        logs.mkdir(parents=True, exist_ok=True)

    def signal(self, label: str, number: int) -> None:
        """Send a signal to a child and all that it started; one that has ended gets none."""
        if label in self._children:
            self._children[label].signal(number)

    def pid(self, label: str) -> int:
        """Return the process id of a child that runs."""
        return self._children[label].process.pid

    def write(self, label: str, text: str) -> None:
        """Keep a line of a child's output."""
        with open(self.log(label), "a", encoding="utf-8") as file:
            file.write(text + "\n")

    def log(self, label: str) -> Path:
        """Return where a child's output is kept."""
        return self._logs / f"{label.replace(' ', '-')}.log"

    def tail(self, label: str, lines: int = 15) -> str:
        """Return the end of what a child has said."""
        if not self.log(label).exists():
            return "(no output)"
        return "\n".join(self.log(label).read_text("utf-8").splitlines()[-lines:])

    def __enter__(self) -> Self:
        """Return the group."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End all children, those that are stopped included."""
        for label in self.running:
            self.signal(label, signal.SIGCONT)
        super().__exit__(kind, error, trace)


@dataclass
class Shard:
    """One server, through all its lives."""

    index: int
    arguments: Sequence[str]
    """Of ``dgs server``, besides where it listens."""
    ways: list[FaultProxy]
    """One per worker; they follow the server to its port."""
    address: str = ""
    """Where it listens; empty while it does not."""
    allowed: set[int] = field(default_factory=set)
    """Exit codes that what was done to it explains."""
    restart_after_s: float = 0.0
    lives: int = 0
    back_s: list[float] = field(default_factory=list)
    """Seconds from each start until it listened."""

    @property
    def label(self) -> str:
        """Name among the children."""
        return f"server {self.index}"

    def start(self, children: Children) -> None:
        """Start a life."""
        argv = [sys.executable, "-m", "dgs", "server", "--listen", "127.0.0.1:0", "--json"]
        self.allowed, self.lives = set(), self.lives + 1
        start_s = time.monotonic()

        def take(label: str, text: str) -> None:
            children.write(label, text)
            if not self.address and (address := address_in(text)):
                for way in self.ways:
                    way.aim(address)
                self.address = address
                self.back_s.append(time.monotonic() - start_s)

        children.start(Command(self.label, [*argv, *self.arguments], ENVIRONMENT), take)

    def ended(self) -> None:
        """Take note that the process has ended."""
        self.address = ""
        for way in self.ways:
            way.aim(None)


@dataclass
class Trainee:
    """One worker, through all its lives; two processes may claim its name at a time."""

    index: int
    arguments: Sequence[str]
    """Of `experiments.faults.trainee`."""
    killed: set[str] = field(default_factory=set)
    """Labels of lives that were killed."""
    replaced: bool = False
    """Whether two processes have ever claimed the name: then one of them ends fenced."""
    restart_after_s: float = 0.0
    lives: int = 0

    @property
    def label(self) -> str:
        """Name of the newest life among the children."""
        return self.label_of(self.lives)

    def label_of(self, life: int) -> str:
        """Name of one life."""
        return f"worker {self.index} life {life}"

    @property
    def labels(self) -> list[str]:
        """Names of all lives."""
        return [self.label_of(life) for life in range(1, self.lives + 1)]

    def start(self, children: Children) -> None:
        """Start a life."""
        self.lives += 1
        module = [sys.executable, "-m", "experiments.faults.trainee"]
        argv = [*module, "--index", str(self.index), *self.arguments]
        children.start(Command(self.label, argv, ENVIRONMENT), children.write)


def address_in(text: str) -> str:
    """Return the address that a server announces as JSON in a line; empty if it does not."""
    with contextlib.suppress(ValueError):
        said = json.loads(text)
        if isinstance(said, dict):
            return str(said.get("address", ""))
    return ""
