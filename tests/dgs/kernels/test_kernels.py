"""Which implementation is chosen, and what happens on a machine without numba."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

from dgs.kernels import COMPILED_FROM, Kernels, kernels, reference
from dgs.kernels.warming import warm
from tests.helpers.source_tree import ROOT

WITHOUT_NUMBA = """
import sys, warnings
sys.modules["numba"] = None                     # importing it raises ImportError
from dgs.kernels import kernels
assert "numba.core" not in sys.modules
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert kernels(1 << 30).NAME == "reference" and kernels(1 << 30) is kernels(1 << 29)
assert len(caught) == 1, caught
assert "Install numba" in str(caught[0].message)
"""


def test_the_compiled_kernels_are_chosen_where_they_run(fast: ModuleType) -> None:
    assert kernels(COMPILED_FROM) is fast
    assert fast.NAME == "cpu"
    assert kernels(COMPILED_FROM - 1) is reference  # loading numba would take longer than it saves


def test_without_numba_there_is_one_warning_and_the_reference() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_NUMBA],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr


def test_both_implementations_offer_the_same(fast: ModuleType) -> None:
    wanted = {name for name in vars(Kernels) if not name.startswith("_")} | {"NAME"}
    for module in (reference, fast):
        assert set(module.__all__) == wanted


def test_warming_up_compiles_everything_once(fast: ModuleType) -> None:
    fast.warm_up()
    assert fast.warm_up() < 1.0
    assert reference.warm_up() == 0.0


def test_compiling_is_announced_and_loading_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def compile_one() -> float:
        assert "compiling kernels, once" in caplog.text
        (tmp_path / "kernel.nbi").touch()
        return 1.0

    assert warm(compile_one, tmp_path) == 1.0
    caplog.clear()
    assert warm(lambda: 2.0, tmp_path) == 2.0
    assert caplog.text == ""


def test_processes_that_start_at_once_compile_one_after_the_other(tmp_path: Path) -> None:
    inside: list[int] = []
    most: list[int] = []

    def compile_one() -> float:
        inside.append(1)
        most.append(len(inside))
        threading.Event().wait(0.02)  # long enough for another one to come in, if it could
        inside.pop()
        return 0.0

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: warm(compile_one, tmp_path), range(4)))
    assert most == [1] * 4


def test_kernels_that_nothing_can_be_kept_of_are_compiled_nevertheless(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert warm(lambda: 3.0, tmp_path / "file" / "folder") == 3.0
