"""The record of what one worker has, and the difference that brings it closer to the model.

`Record` is the paper's v_k: a dense copy, per session, of exactly what the worker's base is. Both
sides change it by the same float32 operations in the same order, so they agree bit for bit.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from dgs.codec import encode_body
from dgs.config import Selection, Values
from dgs.select import make_selector
from dgs.space import FloatArray
from dgs.view import Part

__all__ = ["Difference", "Record", "digest"]


def digest(values: FloatArray) -> int:
    """Hash the bits of float32 values to 64 bits: BLAKE2b over their little-endian bytes."""
    data = np.ascontiguousarray(values, dtype="<f4")
    return int.from_bytes(hashlib.blake2b(data.data, digest_size=8).digest(), "little")


@dataclass(frozen=True, slots=True)
class Difference:
    """An encoded difference: the body of a reply."""

    body: bytes
    count: int
    replaces: bool
    """Whether the values replace the worker's own instead of being added to them."""


class Record:
    """What one session's worker has of this shard, and how its differences are made.

    Args:
        part: the coordinates that the session exchanges.
        model: the shard's model; the record starts as a copy of the session's part of it.
        density: fraction of each segment that a difference may hold, in (0, 1].
        selection: how the entries are chosen.
        dense_below: see `WorkerConfig.dense_below`.
        values: how values are coded.
    """

    def __init__(
        self,
        part: Part,
        model: FloatArray,
        *,
        density: float,
        selection: Selection,
        dense_below: int,
        values: Values,
    ) -> None:
        """Copy the session's part of the model."""
        self.replica: FloatArray = np.array(model[part.coordinates])
        self._part = part
        self._density = density
        self._values = values
        self._selection = (selection, dense_below)
        self._selector = make_selector(selection, len(part.segment_sizes), dense_below)

    @property
    def values(self) -> Values:
        """How values are coded."""
        return self._values

    def configure(
        self, *, density: float, selection: Selection, dense_below: int, values: Values
    ) -> None:
        """Change how the next differences are made; the replica stays what it is."""
        self._density, self._values = density, values
        if self._selection != (selection, dense_below):
            self._selection = (selection, dense_below)
            self._selector = make_selector(selection, len(self._part.segment_sizes), dense_below)

    def advance(self, model: FloatArray) -> Difference:
        """Select from ``model - replica``, add that to the replica, and return it encoded.

        With float32 values the reply *sets* coordinates to the model's value: ``replica + (model -
        replica)`` need not be ``model`` in float32, and the last bits would travel for ever.
        Otherwise the decoded difference is added, and what rounding took waits in
        ``model - replica``.

        Note:
            In place. Deterministic.

        References:
            Yan et al., ICPP 2020, eq. 3-6. Algorithm 2 prints ``v <- v - G`` in line 14 against its
            own eq. 4 and 6b; the plus is right and is what happens here.
        """
        now = model[self._part.coordinates]
        with np.errstate(over="ignore"):  # an infinite difference is still selected and replaced
            waiting = now - self.replica
        chosen = self._select(waiting)
        replaces = self._values == "float32"
        limit = np.finfo(np.float32).max
        values = now[chosen] if replaces else np.clip(waiting[chosen], -limit, limit)
        encoded = encode_body(chosen, values, self._part.segment_sizes, self._values)
        if replaces:
            self.replica[chosen] = encoded.decoded
        else:
            self.replica[chosen] += encoded.decoded
        return Difference(encoded.body, len(chosen), replaces)

    def _select(self, waiting: FloatArray) -> npt.NDArray[np.int64]:
        if self._density == 1.0:
            return np.flatnonzero(waiting)
        candidates = torch.from_numpy(waiting)
        chosen, start = [torch.zeros(0, dtype=torch.int64, device="cpu")], 0
        for unit, size in enumerate(self._part.segment_sizes.tolist()):
            segment = candidates[start : start + size]
            chosen.append(self._selector.select(segment, unit, self._density) + start)
            start += size
        return torch.cat(chosen).numpy()
