"""The record of what one worker has, and the difference that brings it closer to the model.

`Record` is the paper's v_k: exactly what the worker's base is. Both sides change it by the same
float32 operations in the same order, so they agree bit for bit. It is a dense copy, or, where
replies bring the worker all that differs, no more than the version at which the worker was last
answered.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from dgs.candidates import Candidates
from dgs.changes import Change, undo
from dgs.config import Selection, Values
from dgs.errors import ConfigError
from dgs.kernels import change_kernels, kernels
from dgs.search import Entries, Search, Window
from dgs.select import make_selector
from dgs.shard import Shard
from dgs.space import FloatArray, Int64Array
from dgs.view import Part

__all__ = ["Arrays", "Difference", "Record", "digest"]

Arrays = dict[str, npt.NDArray[Any]]
"""Arrays of a saved state, by name."""

_SPARSE = 8  # a replica is given up after a reply of less than one coordinate in so many


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

    Note:
        Takes at most 4 bytes per coordinate and 1 MiB. With density 1 and float32 values, the
        replica is kept only while replies hold much of the model, or while the shard's log does not
        reach back to `version`.
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
        """Copy the session's part of the model; `follow` must be called before `advance`."""
        self._replica: FloatArray | None = np.array(model[part.coordinates])
        self._part = part
        self._density = density
        self._values = values
        self._selection = (selection, dense_below)
        self._selector = make_selector(selection, len(part.segment_sizes), dense_below)
        self._candidates = Candidates(part)
        self._is_lent = False
        self._shard: Shard | None = None
        self.version = 0
        """The model's version when the worker was last answered."""

    def facts(self) -> dict[str, Any]:
        """Return the settings and the version: what `restored` needs besides `lend`."""
        selection, dense_below = self._selection
        return {
            "density": self._density,
            "values": self._values,
            "selection": selection,
            "dense_below": dense_below,
            "version": self.version,
        }

    def lend(self) -> Callable[[], Arrays]:
        """Return a function that computes the arrays of the record as it is now.

        Cheap: nothing is copied before the record or the model next changes. The function may run
        later, and in another thread. Candidates are not among the arrays: they change no reply.
        """
        shard, replica = self._followed(), self._replica
        self._is_lent = replica is not None
        changes = shard.log.since(self.version) if replica is None else []
        selection = self._selector.state().numpy()
        model, part = shard.lend(), self._part

        def arrays() -> Arrays:
            return {**_compared(model, replica, changes, part), "selection": selection}

        return arrays

    @classmethod
    def restored(
        cls, part: Part, shard: Shard, facts: Mapping[str, Any], arrays: Mapping[str, Any]
    ) -> Self:
        """Rebuild a record that was saved together with its shard; later replies are the same."""
        settings = {k: facts[k] for k in ("density", "selection", "dense_below", "values")}
        record = cls(part, shard.model, **settings)
        record._selector.load_state(torch.from_numpy(arrays["selection"]))
        record._shard, record.version = shard, facts["version"]
        assert record._replica is not None
        if "replica" in arrays:
            record._replica[:] = arrays["replica"]
        else:
            record._replica[arrays["at"]] = arrays["was"]
        record._candidates.forget()
        if "at" in arrays and not arrays["at"].size and record.version == shard.version:
            record._release()  # as the log begins here, only who is up to date can follow it
        return record

    @property
    def values(self) -> Values:
        """How values are coded."""
        return self._values

    @property
    def replica(self) -> FloatArray:
        """What the worker has; not to be modified."""
        if self._replica is not None:
            return self._replica
        shard = self._followed()
        now = self.version == shard.version
        model = shard.model if now else shard.model_at(self.version)
        return model[self._part.coordinates]

    @property
    def nbytes(self) -> int:
        """Bytes held from exchange to exchange."""
        replica = 0 if self._replica is None else self._replica.nbytes
        return replica + self._candidates.nbytes + 16 * len(self._part.segment_sizes)

    @property
    def walked(self) -> int:
        """Changed coordinates looked at so far."""
        return self._candidates.walked

    @property
    def compared(self) -> int:
        """Coordinates of model and replica compared so far."""
        return self._candidates.compared

    def follow(self, shard: Shard) -> None:
        """Belong to a shard whose model the record equals; nothing if it does already."""
        if self._shard is None:
            self._shard, self.version = shard, shard.version
            self._release()

    def materialise(self) -> None:
        """Keep a replica from now on; nothing if there is one."""
        if self._replica is None:
            self._replica = np.array(self.replica)
            self._followed().followers.discard(self)
            self._candidates.clear()

    def configure(
        self, *, density: float, selection: Selection, dense_below: int, values: Values
    ) -> None:
        """Change how the next differences are made; the replica stays what it is."""
        self._density, self._values = density, values
        if not self._brings_all:
            self.materialise()
        if self._selection != (selection, dense_below):
            self._selection = (selection, dense_below)
            self._selector = make_selector(selection, len(self._part.segment_sizes), dense_below)

    def advance(self) -> Difference:
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
        shard = self._followed()
        if self._replica is None:
            difference = self._catch_up(shard)
        else:
            if self._is_lent:
                self._replica, self._is_lent = self._replica.copy(), False
            difference = self._approach(shard, self._replica)
        self.version = shard.version
        if difference.count * _SPARSE <= self._part.size:
            self._release()
        return difference

    def _approach(self, shard: Shard, replica: FloatArray) -> Difference:
        """Select entries, and bring the replica there to the model, or closer."""
        window = Window(shard.model, self._part)
        sizes = self._part.segment_sizes.tolist()
        search = Search(sizes, window, replica, self._selector, self._density)
        changes = shard.log.since(self.version) if shard.log.reaches(self.version) else None
        entries, positions = self._candidates.find(search, changes, shard.scratch)
        chosen = entries.indices[positions]
        if self._values == "float32":
            difference, _ = self._encode(chosen, window.copy_to(replica, chosen))
            entries.values[positions] = 0.0
            if isinstance(positions, slice):  # nothing is left
                entries = Entries.empty(0, len(sizes))
        else:
            limit = np.finfo(np.float32).max
            waiting = np.clip(entries.values[positions], -limit, limit)
            difference, decoded = self._encode(chosen, waiting)
            with np.errstate(over="ignore"):
                after = np.clip(replica[chosen] + decoded, -limit, limit)
                replica[chosen] = after
                entries.values[positions] = window.at(chosen) - after
        self._candidates.keep(entries, self._density)
        return difference

    def _catch_up(self, shard: Shard) -> Difference:
        """Find all that has changed since the last answer and is not what it was then."""
        window, where = Window(shard.model, self._part), self._part.coordinates
        model = shard.model[where] if isinstance(where, slice) else shard.model
        changes = shard.log.since(self.version)
        nothing, one = Entries.empty(0, 1), np.ones(1, np.uint32)
        coordinates = np.concatenate([nothing.indices, *(c.indices for c in changes)])
        found = Entries.empty(coordinates.size, 1)
        total = change_kernels(shard.model.size).walk(
            coordinates,
            np.concatenate([nothing.values, *(c.before for c in changes)]),  # the oldest counts
            np.cumsum([0, *(c.indices.size for c in changes)]),
            model,
            window.first,
            nothing.indices,
            nothing.values,
            np.array([model.size]),
            one,
            one,
            *found,
            np.zeros(1, np.int64),
        )
        found = found.first(total)
        changed = Change(found.indices, found.values, model[found.indices])
        chosen, now = window.localise(changed)
        return self._encode(chosen, now)[0]

    def _encode(self, chosen: Int64Array, values: FloatArray) -> tuple[Difference, FloatArray]:
        encode = kernels(self._part.size).encode_body
        body, decoded = encode(chosen, values, self._part.segment_sizes, self._values)
        return Difference(body, chosen.size, self._values == "float32"), decoded

    @property
    def _brings_all(self) -> bool:
        """Whether a reply brings the worker all that differs."""
        return self._density == 1.0 and self._values == "float32"

    def _release(self) -> None:
        """Give the replica up if the version says as much."""
        if self._replica is not None and self._brings_all:
            self._replica = None
            self._followed().followers.add(self)
            self._candidates.clear()

    def _followed(self) -> Shard:
        if self._shard is None:
            raise ConfigError("the record follows no shard yet")
        return self._shard


def _compared(
    model: FloatArray, replica: FloatArray | None, changes: Sequence[Change], part: Part
) -> Arrays:
    """Return a replica as what differs from the model, or whole where that is shorter.

    Args:
        model: the shard's.
        replica: None for the part of the model that it was before `changes`.
        changes: consecutive, the oldest first.
        part: what the replica is of.
    """
    now = model[part.coordinates]
    if replica is None:
        then = model.copy()
        undo(then, changes)
        replica = then[part.coordinates]
    at = np.flatnonzero(now.view(np.uint32) != replica.view(np.uint32))
    if 3 * at.size > replica.size:
        return {"replica": replica}
    return {"at": at, "was": replica[at]}
