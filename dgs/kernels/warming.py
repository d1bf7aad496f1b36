"""Compile kernels once per machine, before the first step needs them, and say so."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system: processes that start at once compile at once
    fcntl = None  # type: ignore[assignment]

__all__ = ["warm"]

logger = logging.getLogger("dgs.kernels")

LONGEST_WAIT_S = 120.0
"""Seconds to wait for another process that compiles; after that this one compiles as well."""

PAUSE_S = 0.05


def warm(warm_up: Callable[[], float], folder: Path) -> float:
    """Run `warm_up` when no other process does, and warn first if it has to compile.

    Args:
        warm_up: compiles or loads what `folder` keeps; returns the seconds that it took.
        folder: where numba keeps compiled code; `NUMBA_CACHE_DIR` takes precedence.

    Returns:
        The seconds that `warm_up` took.
    """
    kept_in = Path(os.environ.get("NUMBA_CACHE_DIR") or folder)
    with _turn(kept_in / "dgs-kernels.lock"):
        if next(kept_in.rglob("*.nbi"), None) is None:
            logger.warning("compiling kernels, once for this machine: this takes 10 to 30 s")
        taken_s = warm_up()
    logger.info("kernels are ready after %.1f s", taken_s)
    return taken_s


@contextmanager
def _turn(lock: Path) -> Iterator[None]:
    """Hold a lock between processes, as far as there is one and it comes in time."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("wb")
    except OSError:  # an installation that cannot be written to; numba compiles in memory then
        yield
        return
    with file:
        give_up = time.monotonic() + LONGEST_WAIT_S
        while fcntl is not None and time.monotonic() < give_up:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                time.sleep(PAUSE_S)
        yield  # closing the file gives the lock back
