"""A server's side of the exchange in a few lines: whole replicas, everything compared."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from dgs.codec import encode_body
from dgs.config import Selection, Values
from dgs.select import make_selector
from dgs.tracker import Difference
from dgs.view import Part

FloatArray = npt.NDArray[np.float32]


class PlainRecord:
    """The definition of `Record`: a copy of the model, and one selection per segment."""

    def __init__(
        self,
        part: Part,
        model: FloatArray,
        density: float,
        selection: Selection,
        dense_below: int,
        values: Values,
    ) -> None:
        """Copy the session's part of the model."""
        self.replica = np.array(model[part.coordinates])
        self._part, self.density, self.values = part, density, values
        self._selector = make_selector(selection, len(part.segment_sizes), dense_below)

    def advance(self, model: FloatArray) -> Difference:
        """Select from ``model - replica``, add that to the replica, and return it encoded."""
        now = model[self._part.coordinates]
        with np.errstate(over="ignore"):
            waiting = now - self.replica
        chosen = self._select(torch.from_numpy(waiting))
        replaces = self.values == "float32"
        limit = np.finfo(np.float32).max
        values = now[chosen] if replaces else np.clip(waiting[chosen], -limit, limit)
        encoded = encode_body(chosen, values, self._part.segment_sizes, self.values)
        if replaces:
            self.replica[chosen] = encoded.decoded
        else:
            self.replica[chosen] += encoded.decoded
        return Difference(encoded.body, len(chosen), replaces)

    def _select(self, waiting: torch.Tensor) -> npt.NDArray[np.int64]:
        chosen, start = [torch.zeros(0, dtype=torch.int64)], 0
        for unit, size in enumerate(self._part.segment_sizes.tolist()):
            segment = waiting[start : start + size]
            chosen.append(self._selector.select(segment, unit, self.density) + start)
            start += size
        return torch.cat(chosen).numpy()
