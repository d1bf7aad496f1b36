"""What holds for every test: fixed seeds, one thread, poisoned memory, and nothing left running."""

from __future__ import annotations

import multiprocessing
import os
import random
import threading
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

LEFTOVERS_S = 10.0
"""Seconds that threads and processes get to end after the test that started them."""

hypothesis.settings.register_profile("house", derandomize=True, deadline=None, database=None)


def pytest_configure() -> None:
    """Make sums independent of the number of cores, and reads of unwritten memory visible."""
    hypothesis.settings.load_profile("house")
    torch.set_num_threads(1)
    # torch.empty() is filled with NaN in this mode, so that an entry nobody wrote cannot pass for 0
    torch.use_deterministic_algorithms(True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_left_running() -> Iterator[None]:
    threads, processes = set(threading.enumerate()), _children()
    yield
    deadline = time.monotonic() + LEFTOVERS_S
    for thread in _new_threads(threads):
        thread.join(max(0.0, deadline - time.monotonic()))
    for process in multiprocessing.active_children():  # reaps those that have ended, too
        process.join(max(0.0, deadline - time.monotonic()))
    left = [f"thread {thread.name!r}" for thread in _new_threads(threads)]
    left += [f"process {pid} ({_command(pid)})" for pid in sorted(_children() - processes)]
    if left:
        pytest.fail("the test left running: " + ", ".join(left) + "; stop them in its fixtures")


def _new_threads(before: set[threading.Thread]) -> list[threading.Thread]:
    return [t for t in threading.enumerate() if not t.daemon and t not in before]


def _children() -> set[int]:
    """Return the ids of this process's children; only those of `multiprocessing` off Linux."""
    known = {child.pid for child in multiprocessing.active_children() if child.pid is not None}
    for listing in Path("/proc/self/task").glob("*/children"):
        try:
            known |= {int(pid) for pid in listing.read_text().split()}
        except OSError:  # that thread has ended since
            continue
    tracker: object = getattr(resource_tracker, "_resource_tracker", None)
    return known - {os.getpid(), getattr(tracker, "_pid", None)}


def _command(pid: int) -> str:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:
        command = ""
    return command or "only just started, or ended and not waited for"
