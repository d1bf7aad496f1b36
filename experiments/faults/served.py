"""One server process, and workers that train with it: what the figures are measured on."""

from __future__ import annotations

import queue
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from dgs.processes import Command
from experiments.faults.children import ENVIRONMENT, Children, address_in
from experiments.faults.progress import Progress

__all__ = ["ON_DISK", "Crew", "Served", "scratch"]

ON_DISK = "/var/tmp"
"""Where states are kept: unlike the usual place for temporary files, hardly ever in memory."""

START_S = 120.0


@contextmanager
def scratch() -> Iterator[Path]:
    """Make a folder for a state, on a disk; it is removed afterwards."""
    with tempfile.TemporaryDirectory(dir=ON_DISK, prefix="dgs-faults-") as folder:
        yield Path(folder)


class Served:
    """A server process.

    Args:
        folder: gets the process's output.
        arguments: of ``dgs server``, besides where it listens.
        port: to listen on; 0 for any, which is then kept.
        module: what to run in place of ``dgs``, with its own first arguments.
    """

    def __init__(
        self,
        folder: Path,
        arguments: Sequence[str] = (),
        *,
        port: int = 0,
        module: Sequence[str] = ("dgs",),
    ) -> None:
        """Start it and wait until it listens."""
        self._children = Children(folder / "logs")
        self._module = module
        self._arguments = arguments
        self._told: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.address = f"127.0.0.1:{port}"
        self.pid = 0
        try:
            self.started_in_s = self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def start(self) -> float:
        """Start it where it listened before; return the seconds until it listens."""
        argv = [sys.executable, "-m", *self._module, "server", "--listen", self.address, "--json"]
        start_s = time.monotonic()
        self._children.start(Command("server", [*argv, *self._arguments], ENVIRONMENT), self._take)
        try:
            self.address = self._told.get(timeout=START_S)
        except queue.Empty:
            raise TimeoutError(f"no server:\n{self._children.tail('server')}") from None
        self.pid = self._children.pid("server")
        return time.monotonic() - start_s

    def signal(self, number: int) -> None:
        """Send the process a signal."""
        self._children.signal("server", number)

    def end(self, number: int) -> int:
        """Send a signal that ends the process; return its exit code once it has ended."""
        self.signal(number)
        (ended,) = self._children.wait_any(START_S)
        return ended[1]

    @property
    def rss_bytes(self) -> int:
        """Memory of the process that is in use."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) << 10
        raise RuntimeError(f"process {self.pid} has no VmRSS")

    def __enter__(self) -> Self:
        """Return the server."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End it."""
        self._children.__exit__(kind, error, trace)

    def _take(self, label: str, text: str) -> None:
        self._children.write(label, text)
        if address := address_in(text):
            self._told.put(address)


class Crew:
    """Worker processes that train with one server as fast as they can.

    Args:
        folder: gets their output and acknowledgements.
        address: of the server.
        count: number of workers.
        arguments: further ones of `experiments.faults.trainee`.
    """

    def __init__(
        self, folder: Path, address: str, count: int, arguments: Sequence[str] = ()
    ) -> None:
        """Start them and wait until all train."""
        acks = folder / "acks"
        acks.mkdir(parents=True)
        self._children = Children(folder / "logs")
        self._progress = Progress(acks)
        self._names = [f"worker-{i}" for i in range(count)]
        argv = [sys.executable, "-m", "experiments.faults.trainee", "--server", address]
        try:
            for index, name in enumerate(self._names):
                own = ["--index", str(index), "--acks", str(acks / f"{name}.acks")]
                command = Command(name, [*argv, *own, *arguments], ENVIRONMENT)
                self._children.start(command, self._children.write)
            self._wait_for_all()
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def signal(self, index: int, number: int) -> None:
        """Send one worker a signal."""
        self._children.signal(self._names[index], number)

    def rates(self, seconds: float) -> list[float]:
        """Count for a while; return each worker's exchanges per second."""
        self._progress.look()
        before, start_s = self._progress.counts.copy(), time.monotonic()
        time.sleep(seconds)
        self._progress.look()
        self._fail_if_any_ended()
        passed_s = time.monotonic() - start_s
        return [(self._progress.counts[n, 0] - before[n, 0]) / passed_s for n in self._names]

    def _wait_for_all(self) -> None:
        until_s = time.monotonic() + START_S
        while not all(self._progress.counts[n, 0] > 20 for n in self._names):
            self._fail_if_any_ended()
            if time.monotonic() > until_s:
                raise TimeoutError("the workers do not train")
            time.sleep(0.1)
            self._progress.look()

    def _fail_if_any_ended(self) -> None:
        for label, code in self._children.exited():
            raise RuntimeError(f"{label} ended with {code}:\n{self._children.tail(label)}")

    def __enter__(self) -> Self:
        """Return the crew."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End all workers."""
        for label in self._children.running:
            self._children.signal(label, signal.SIGCONT)
        self._children.__exit__(kind, error, trace)
