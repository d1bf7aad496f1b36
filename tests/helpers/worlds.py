"""Worlds of ranks: processes joined by gloo that carry out functions, all of them at once.

A world costs seconds to start, so one is kept for many tests. Ranks are forked from a process that
has imported torch and nothing of the test run's state. A world in which a rank ended, or did not
answer in time, is killed whole: nothing here waits for ever.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.helpers.source_tree import ROOT

__all__ = ["PATIENCE_S", "World"]

PATIENCE_S = 60.0
"""Bound of a call, and of every collective inside it."""

GRACE_S = 1.0
"""What ranks get to say why they failed, once the first of them has said so."""

ENDED = "ended without an answer"

PRELOADED = ("pytest", "torch.distributed", "moe.layer")
"""What ranks would otherwise import one by one."""


class World:
    """Some ranks in processes of their own.

    Args:
        size: number of ranks.
        patience_s: seconds that a call may take.
        restarts: start afresh when a call has failed; for worlds kept for many tests, where the
            test that failed pays for it, not the next one.
        imports: further modules to import once instead of on every rank.
    """

    def __init__(
        self,
        size: int,
        patience_s: float = PATIENCE_S,
        *,
        restarts: bool = False,
        imports: Sequence[str] = (),
    ) -> None:
        self.size = size
        self.imports = imports
        self.patience_s = patience_s
        self.grace_s = GRACE_S
        self.restarts = restarts
        self._ends: list[Connection] = []
        self._host: subprocess.Popen[bytes] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call a module's function on every rank and return what each returned.

        Args:
            function: is called with `args`; it finds its rank by ``torch.distributed.get_rank()``.
            args: the same for every rank.

        Raises:
            AssertionError: a rank raised something (its traceback is in the message) or ended, or
                not all answered in time.
        """
        assert self._host is not None, "use the world in a with block"
        for end in self._ends:
            end.send((function, args))
        answers = self._answers()
        failed = [rank for rank in range(self.size) if not answers.get(rank, (False,))[0]]
        if not failed:
            return [answers[rank][1] for rank in range(self.size)]
        told = [f"rank {rank}: {answers[rank][1]}" for rank in failed if rank in answers]
        silent = [rank for rank in failed if rank not in answers]
        if silent or any(line.endswith(ENDED) for line in told):
            self.close()
            if self.restarts:
                self._start()
        told += [f"ranks {silent} did not answer"] if silent else []
        raise AssertionError("\n".join(told))

    def close(self) -> None:
        """End all processes."""
        host, self._host = self._host, None
        if host is not None:
            os.killpg(host.pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
            host.wait(PATIENCE_S)
        for end in self._ends:
            end.close()
        self._ends = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __enter__(self) -> World:
        self._start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        pairs = [multiprocessing.Pipe() for _ in range(self.size)]
        self._ends = [near for near, _ in pairs]
        far_ends = [far for _, far in pairs]
        store = str(Path(self._folder.name) / "store")
        numbers = [far.fileno() for far in far_ends]
        # a session of its own, so that host and ranks can be ended together
        self._host = subprocess.Popen(
            [sys.executable, "-m", __name__, store, ",".join(map(str, numbers)), *self.imports],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"},
            stdin=subprocess.DEVNULL,
            pass_fds=numbers,
            start_new_session=True,
        )
        for far in far_ends:
            far.close()
        answers = self._answers()  # each rank says that it has joined
        if len(answers) < self.size or not all(good for good, _ in answers.values()):
            self.close()
            raise AssertionError(f"the world did not start: {answers}")

    def _answers(self) -> dict[int, tuple[bool, Any]]:
        """Return one answer of each rank, of fewer when one has failed or time is over."""
        ranks = {id(end): rank for rank, end in enumerate(self._ends)}
        waiting = list(self._ends)
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + self.patience_s
        while waiting and (left := deadline - time.monotonic()) > 0:
            for end in wait(waiting, left):
                assert isinstance(end, Connection)
                waiting.remove(end)
                try:
                    answers[ranks[id(end)]] = end.recv()
                except EOFError:
                    answers[ranks[id(end)]] = (False, ENDED)
                if not answers[ranks[id(end)]][0]:
                    deadline = min(deadline, time.monotonic() + self.grace_s)
        return answers


def _host(store: str, numbers: str, *imports: str) -> None:
    """Import what ranks need, once, and fork them."""
    for name in (*PRELOADED, *imports):
        importlib.import_module(name)
    ends = [Connection(int(number)) for number in numbers.split(",")]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_serve, args=(store, rank, ends)) for rank in range(len(ends))]
    for process in ranks:
        process.start()
    for end in ends:
        end.close()
    for process in ranks:
        process.join()


def _serve(store: str, rank: int, ends: list[Connection]) -> None:
    """Join the world and carry out what arrives, until the other end is closed."""
    import torch
    import torch.distributed as dist

    own = ends[rank]
    for end in ends:
        if end is not own:
            end.close()
    torch.set_num_threads(1)
    # the same as use_deterministic_algorithms, which would import a compiler first
    torch.set_deterministic_debug_mode("error")
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, len(ends)),
        rank=rank,
        world_size=len(ends),
        timeout=timedelta(seconds=PATIENCE_S),
    )
    warnings.simplefilter("error")
    own.send((True, None))
    while True:
        try:
            function, args = own.recv()
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            own.send((True, function(*args)))
        except BaseException:
            own.send((False, traceback.format_exc()))


if __name__ == "__main__":
    _host(*sys.argv[1:])
