"""The loops over memory, in the fastest form that this machine can run.

`kernels` returns an implementation of the `Kernels` protocol: compiled by numba where that can be
imported and pays, otherwise plain numpy and torch. Both give the same bits.
"""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dgs.codec import Encoded
from dgs.config import Values
from dgs.kernels import changes, reference
from dgs.kernels.change_protocol import ChangeKernels
from dgs.kernels.warming import warm

__all__ = ["COMPILED_FROM", "ChangeKernels", "Kernels", "change_kernels", "kernels"]

_Floats = npt.NDArray[np.float32]
_Indices = npt.NDArray[np.int64]


class Kernels(Protocol):
    """What an implementation offers; the definitions stand in `dgs.kernels.reference`."""

    NAME: str
    """What the implementation is called in messages."""

    def warm_up(self) -> float:
        """Compile everything, or load it from the cache; return the seconds that it took."""
        ...

    def accumulate_and_select(
        self,
        velocity: _Floats,
        base: _Floats,
        local: _Floats,
        threshold: float,
        indices: _Indices,
        values: _Floats,
        *,
        first: int = 0,
    ) -> int:
        """Compute ``velocity += base - local`` and find what is large."""
        ...

    def add_and_select(
        self,
        velocity: _Floats,
        progress: _Floats,
        threshold: float,
        indices: _Indices,
        values: _Floats,
        *,
        first: int = 0,
    ) -> int:
        """Compute ``velocity += progress`` and find what is large."""
        ...

    def exact_top_k(
        self,
        candidates: _Floats,
        k: int,
        indices: _Indices,
        values: _Floats,
        *,
        first: int = 0,
    ) -> int:
        """Find the entries of largest magnitude."""
        ...

    def accumulate_and_top_k(
        self,
        velocity: _Floats,
        base: _Floats,
        local: _Floats,
        k: int,
        indices: _Indices,
        values: _Floats,
        *,
        first: int = 0,
    ) -> int:
        """Compute ``velocity += base - local`` and find its largest entries."""
        ...

    def scan(
        self,
        model: _Floats,
        replica: _Floats,
        threshold: float,
        indices: _Indices,
        values: _Floats,
        *,
        first: int = 0,
    ) -> int:
        """Find where a replica lacks much of the model."""
        ...

    def scan_top_k(
        self,
        model: _Floats,
        replica: _Floats,
        k: int,
        indices: _Indices,
        values: _Floats,
        *,
        first: int = 0,
    ) -> int:
        """Find the largest entries of ``model - replica``."""
        ...

    def apply_update(self, model: _Floats, indices: _Indices, values: _Floats) -> int:
        """Subtract an update from the model, or refuse it whole."""
        ...

    def settle(
        self, velocity: _Floats, indices: _Indices, update: _Floats, momentum: float
    ) -> None:
        """Decay what was sent."""
        ...

    def record(self, replica: _Floats, model: _Floats, indices: _Indices, values: _Floats) -> None:
        """Set entries of the replica to the model's."""
        ...

    def encode_body(
        self,
        indices: npt.ArrayLike,
        values: npt.ArrayLike,
        segment_sizes: npt.ArrayLike,
        kind: Values,
    ) -> Encoded:
        """Code a sparse message."""
        ...

    def decode_body(
        self,
        body: bytes | bytearray | memoryview,
        segment_sizes: npt.ArrayLike,
        kind: Values,
        nnz: int,
    ) -> tuple[_Indices, _Floats]:
        """Decode a sparse message, or refuse it whole."""
        ...


COMPILED_FROM = 1 << 18
"""Entries from which compiled kernels pay. Loading numba takes seconds, once per process; plain
numpy and torch need about a millisecond for fewer entries than this."""


def kernels(size: int) -> Kernels:
    """Return the implementation that suits arrays of `size` entries; all give the same bits.

    Note:
        The first call for a large array imports numba and compiles, or loads what an earlier
        process has compiled; ``import dgs`` does not. Without numba, that call warns, once.
    """
    return _compiled() if size >= COMPILED_FROM else reference


def change_kernels(size: int) -> ChangeKernels:
    """Return the loops over changes of arrays of `size` entries; see `kernels`."""
    if kernels(size) is reference:
        return changes
    from dgs.kernels import cpu_changes

    return cpu_changes


@cache
def _compiled() -> Kernels:
    try:
        from dgs.kernels import cpu
    except ImportError as error:
        warnings.warn(
            f"the compiled kernels are not available ({error}); selection and coding will be "
            "several times slower. Install numba to have them",
            RuntimeWarning,
            stacklevel=3,
        )
        return reference
    warm(cpu.warm_up, Path(__file__).parent / "__pycache__")
    return cpu
