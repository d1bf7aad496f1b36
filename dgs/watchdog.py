"""End the processes of a parent that has died without ending them; run as a script, by its path.

A parent that is killed cannot clean up, so this process does it: it reads a pipe that only the
parent holds open. The lines ``+ID`` and ``-ID`` add and remove a process group; when the pipe ends,
the groups that are left get SIGTERM and, after a grace, SIGKILL. It needs the standard library
only, so that it starts in milliseconds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterable

__all__ = ["end_groups", "read_groups"]

GRACE_S = 3.0
"""Seconds between SIGTERM and SIGKILL."""

LOOK_EVERY_S = 0.05


def read_groups(lines: Iterable[str]) -> set[int]:
    """Follow the parent's lines to their end.

    Returns:
        The process groups added and not removed.

    Example:
        >>> read_groups(["+12", "+13", "-12"])
        {13}
    """
    groups: set[int] = set()
    for line in lines:
        number = int(line[1:])
        if line[0] == "+":
            groups.add(number)
        else:
            groups.discard(number)
    return groups


def end_groups(groups: Iterable[int], grace_s: float = GRACE_S) -> None:
    """Ask process groups to end, and make those that do not.

    Args:
        groups: ids of process groups.
        grace_s: seconds between SIGTERM and SIGKILL.
    """
    left = [g for g in groups if _signalled(g, signal.SIGTERM)]
    until = time.monotonic() + grace_s
    while left and time.monotonic() < until:
        time.sleep(LOOK_EVERY_S)
        left = [g for g in left if _signalled(g, 0)]
    for group in left:
        _signalled(group, signal.SIGKILL)


def _signalled(group: int, number: int) -> bool:
    """Send a signal; return whether there was anyone to get it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
        return True
    return False


if __name__ == "__main__":
    end_groups(read_groups(sys.stdin))
