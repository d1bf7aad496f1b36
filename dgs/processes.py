"""Child processes that come and go together: start, follow, interrupt, end.

Every child leads a session of its own, so that what it starts ends with it and a terminal's Ctrl-C
reaches the parent only, which passes it on. All children end when the group is left, and also when
the parent is killed: see `dgs.watchdog`.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO

from dgs import watchdog
from dgs.errors import ConfigError, ServerUnavailableError
from dgs.security import WITHIN_THE_MACHINE

__all__ = [
    "Command",
    "LocalServer",
    "OnLine",
    "ProcessGroup",
    "start_all",
    "start_servers",
]

OnLine = Callable[[str, str], None]
"""Takes a child's label and one line of its output, without the line's end."""

LONGEST_LINE_BYTES = 1 << 16
"""Longer lines are handed over in pieces."""

DRAIN_S = 5.0
"""Seconds to read what a child that has ended, and all that it started, left in the pipe."""

SERVER_START_S = 60.0
"""Seconds within which a server must listen; most of it goes into importing torch."""


@dataclass(frozen=True)
class Command:
    """What to run, under which name."""

    label: str
    """Name of the child, unique among those that run."""
    argv: Sequence[str]
    """Program and arguments."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Additions to this process's environment."""


class _Watchdog:
    """The helper process that ends process groups if this process dies without doing so."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", watchdog.__file__],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def add(self, group: int) -> None:
        """Have a process group ended."""
        self._tell(f"+{group}\n")

    def remove(self, group: int) -> None:
        """Leave a process group alone: it has ended, and its id may soon be another's."""
        self._tell(f"-{group}\n")

    def close(self) -> None:
        """End the helper; groups that were not removed end with it."""
        assert self._process.stdin is not None
        with self._lock, contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(2 * watchdog.GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        with self._lock, contextlib.suppress(OSError, ValueError):  # it was killed, or is closed
            self._process.stdin.write(line)
            self._process.stdin.flush()


class _Child:
    """One child, the thread that reads its output, and the thread that waits for its end."""

    def __init__(
        self,
        command: Command,
        on_line: OnLine,
        on_end: Callable[[_Child], None],
        keeper: _Watchdog,
    ) -> None:
        self.label = command.label
        self.ended = False
        """Whether it has ended, and all its output was handed over."""
        self._gone = False
        self._lock = threading.Lock()
        self._on_line = on_line
        self._on_end = on_end
        self._keeper = keeper
        self.process = subprocess.Popen(
            list(command.argv),
            env={**os.environ, **command.env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        keeper.add(self.process.pid)
        assert self.process.stdout is not None
        self._reader = threading.Thread(
            target=self._read, args=(self.process.stdout,), name=f"read {self.label}", daemon=True
        )
        self._waiter = threading.Thread(target=self._wait, name=f"wait {self.label}", daemon=True)
        self._reader.start()
        self._waiter.start()

    def signal(self, number: int) -> None:
        """Send a signal to the child and all that it started; one that has ended gets none."""
        with self._lock:
            if not self._gone:
                _signal_group(self.process.pid, number)

    def join(self, timeout_s: float) -> None:
        """Wait until the child's end has been reported."""
        self._waiter.join(timeout_s)

    def _read(self, output: IO[bytes]) -> None:
        with output:
            while raw := output.readline(LONGEST_LINE_BYTES):
                text = raw.decode("utf-8", "replace").rstrip("\r\n")
                self._on_line(self.label, text.rpartition("\r")[2])

    def _wait(self) -> None:
        if hasattr(os, "waitid"):  # leaves a zombie, so that the id cannot be another's yet
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        else:
            self.process.wait()
        with self._lock:
            _signal_group(self.process.pid, signal.SIGKILL)
            self._keeper.remove(self.process.pid)
            self.process.wait()
            self._gone = True
        self._reader.join(DRAIN_S)
        self.ended = True
        self._on_end(self)


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


class ProcessGroup:
    """Children that end together, at the latest when the `with` block is left.

    Args:
        on_line: gets each line that a child writes to its standard output or error; called by
            threads, one at a time. What it raises is raised again by `wait_any` and `exited`, and
            it is called no more.

    Note:
        Used by one thread, except for `wake`. A child's standard input is empty. When this process
        is killed, a helper process sends SIGTERM and then SIGKILL to the children and what they
        started; only what has opened a session of its own escapes.

    Example:
        >>> lines = []
        >>> with ProcessGroup(lambda label, text: lines.append((label, text))) as group:
        ...     group.start(Command("a", [sys.executable, "-c", "print('hello')"]))
        ...     group.wait_any(60.0)
        [('a', 0)]
        >>> lines
        [('a', 'hello')]
    """

    def __init__(self, on_line: OnLine | None = None) -> None:
        """Start without children."""
        self.on_line = on_line
        self._line_lock = threading.Lock()
        self._failure: BaseException | None = None
        self._children: dict[str, _Child] = {}
        self._ended: queue.SimpleQueue[_Child | None] = queue.SimpleQueue()
        self._keeper: _Watchdog | None = None

    @property
    def running(self) -> list[str]:
        """Labels of the children that have not ended."""
        return [label for label, child in self._children.items() if not child.ended]

    def start(self, command: Command, on_line: OnLine | None = None) -> None:
        """Start a child.

        Args:
            command: what to run; its label may be that of a child that has ended.
            on_line: gets this child's lines instead of the group's `on_line`.

        Raises:
            ConfigError: a child of this label runs, or there is no such program.
        """
        if command.label in self.running:
            raise ConfigError(f"a process labelled {command.label!r} runs already")
        if self._keeper is None:
            self._keeper = _Watchdog()
        sink = self._guarded(on_line or self.on_line)
        try:
            child = _Child(command, sink, self._ended.put, self._keeper)
        except OSError as error:
            raise ConfigError(
                f"cannot run {command.argv[0]!r} ({command.label}): {error.strerror}"
            ) from error
        self._children[command.label] = child

    def returncode(self, label: str) -> int | None:
        """Return how a child has ended; minus a signal's number for death by signal.

        Returns:
            None while it runs.
        """
        child = self._children[label]
        return child.process.returncode if child.ended else None

    def exited(self) -> list[tuple[str, int]]:
        """Return the labels and return codes of the children that ended since last asked.

        Raises:
            Exception: what `on_line` raised.
        """
        ended = []
        with contextlib.suppress(queue.Empty):
            while True:
                ended.append(self._ended.get_nowait())
        return self._outcomes(ended)

    def wait_any(self, timeout_s: float) -> list[tuple[str, int]]:
        """Wait for a child to end.

        Args:
            timeout_s: seconds to wait at most.

        Returns:
            As `exited`; empty when the time is over or `wake` was called.

        Raises:
            Exception: what `on_line` raised.
        """
        try:
            first = self._ended.get(timeout=timeout_s)
        except queue.Empty:
            return self._outcomes([])
        return self._outcomes([first]) + self.exited()

    def wake(self) -> None:
        """Make `wait_any` return; any thread and a signal handler may call this."""
        self._ended.put(None)

    def interrupt(self, labels: Iterable[str] | None = None) -> None:
        """Send SIGINT to children, as a terminal's Ctrl-C would.

        Args:
            labels: which children; None for all.
        """
        for child in self._chosen(labels):
            child.signal(signal.SIGINT)

    def stop(self, grace_s: float = 10.0, labels: Iterable[str] | None = None) -> None:
        """Send SIGTERM to children, wait for them, and kill those that do not end.

        Args:
            grace_s: seconds between SIGTERM and SIGKILL.
            labels: which children; None for all.
        """
        chosen = self._chosen(labels)
        try:
            for child in chosen:
                child.signal(signal.SIGTERM)
            until = time.monotonic() + grace_s
            for child in chosen:
                child.join(max(0.0, until - time.monotonic()))
        finally:
            for child in chosen:
                child.signal(signal.SIGKILL)
        until = time.monotonic() + 2 * DRAIN_S
        for child in chosen:
            child.join(max(0.0, until - time.monotonic()))

    def __enter__(self) -> ProcessGroup:
        """Return the group."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End all children."""
        try:
            self.stop()
        finally:
            if self._keeper is not None:
                self._keeper.close()

    def _chosen(self, labels: Iterable[str] | None) -> list[_Child]:
        if labels is None:
            return list(self._children.values())
        return [self._children[label] for label in labels]

    def _guarded(self, on_line: OnLine | None) -> OnLine:
        def take(label: str, text: str) -> None:
            with self._line_lock:
                if on_line is None or self._failure is not None:
                    return
                try:
                    on_line(label, text)
                except BaseException as error:  # the pipe must be read on, or the child blocks
                    self._failure = error
                    self.wake()

        return take

    def _outcomes(self, ended: Iterable[_Child | None]) -> list[tuple[str, int]]:
        if self._failure is not None:
            raise self._failure
        return [(c.label, c.process.returncode) for c in ended if c is not None]


def start_servers(
    group: ProcessGroup,
    count: int,
    *,
    init: Path | None = None,
    arguments: Sequence[str] = (),
) -> list[str]:
    """Start the shards of one model on this machine, as processes of a group.

    Args:
        group: gets children labelled ``server 0``, ``server 1``, ...; their output after the first
            line goes to its `on_line`.
        count: number of shards.
        init: safetensors file with the model to start from.
        arguments: further arguments of ``dgs server``.

    Returns:
        Their addresses, in the order of the shards.

    Raises:
        ServerUnavailableError: one ended, or did not listen in time; the text has its output.
    """
    given = [*(["--init", str(init)] if init is not None else []), *arguments]
    servers = [LocalServer(group, i, given) for i in range(count)]
    start_all(servers)
    return [s.address for s in servers]


class LocalServer:
    """A server on this machine, a child of a group; it can be started again on its address.

    Args:
        group: gets a child labelled ``server`` and its number; its output after the first line goes
            to the group's `on_line`.
        number: its place among the shards.
        arguments: of ``dgs server``, besides where to listen.

    Attributes:
        label: of the child.
        address: where it listens, once it has.
    """

    def __init__(self, group: ProcessGroup, number: int, arguments: Sequence[str] = ()) -> None:
        """Start nothing yet."""
        self.label = f"server {number}"
        self.address = ""
        self._group = group
        self._arguments = arguments
        self._listens = threading.Event()
        self._since = 0.0
        self._tail: deque[str] = deque(maxlen=20)

    def start(self) -> None:
        """Start the process, where none runs; it listens some seconds later."""
        listen = self.address or "127.0.0.1:0"
        argv = [sys.executable, "-m", "dgs", "server", "--listen", listen, "--json"]
        self._listens.clear()
        self._tail.clear()
        env = {**WITHIN_THE_MACHINE, "PYTHONUNBUFFERED": "1"}
        command = Command(self.label, [*argv, *self._arguments], env)
        self._group.start(command, self._take)

    @property
    def served_s(self) -> float | None:
        """Seconds since it listens; None if it has not since it was last started."""
        return time.monotonic() - self._since if self._listens.is_set() else None

    @property
    def output(self) -> str:
        """The last lines that it has written since it was last started."""
        return "\n".join(self._tail) or "(no output)"

    def wait(self, until: float) -> None:
        """Return once it listens.

        Args:
            until: reading of `time.monotonic` at which to give up.

        Raises:
            ServerUnavailableError: it ended, or is too late; the text has its output.
        """
        while True:
            ended = self._group.returncode(self.label)
            if self._listens.wait(0.05):
                return
            late = time.monotonic() > until
            if ended is None and not late:
                continue
            why = f"ended with code {ended}" if ended is not None else "does not listen in time"
            raise ServerUnavailableError(f"{self.label} {why}; its output:\n{self.output}")

    def _take(self, label: str, text: str) -> None:
        address = "" if self._listens.is_set() else _address_in(text)
        if address:
            self.address, self._since = address, time.monotonic()
            self._listens.set()
            return
        self._tail.append(text)
        if self._group.on_line is not None:
            self._group.on_line(label, text)


def start_all(servers: Sequence[LocalServer]) -> None:
    """Start servers at the same time, and wait until all of them listen.

    Raises:
        ServerUnavailableError: one ended, or did not listen in time; the text has its output.
    """
    for server in servers:
        server.start()
    until = time.monotonic() + SERVER_START_S
    for server in servers:
        server.wait(until)


def _address_in(text: str) -> str:
    with contextlib.suppress(ValueError):
        said = json.loads(text)
        if isinstance(said, dict):
            return str(said.get("address", ""))
    return ""
