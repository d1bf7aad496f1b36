"""What the workers of a run agreed on: the model's tensors, and which shard of it this is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from dgs.errors import ModelMismatchError, NotReadyError
from dgs.frame import max_frame_bytes
from dgs.joining import Joining
from dgs.space import ParameterSpace, TensorSpec

__all__ = ["Agreement"]

FIRST_FRAME_BYTES = 64 << 20
"""Longest frame that is read before the model is known: enough to tell a worker of an earlier run
what became of its server."""


class Agreement:
    """The model and the shard, once the first worker has named them.

    Attributes:
        space: the model's index space; None before.
        shard: which part of the model this is, from 0.
        num_shards: how many parts there are.
        shard_range: the part, in the model's index space.
        max_frame_bytes: longest frame that a session of this shard can send.
        initialiser: worker that gives, or gave, the model.
    """

    def __init__(self) -> None:
        """Start without a model."""
        self.space: ParameterSpace | None = None
        self.shard = 0
        self.num_shards = 1
        self.shard_range = (0, 0)
        self.max_frame_bytes = FIRST_FRAME_BYTES
        self.initialiser = ""

    def require_space(self) -> ParameterSpace:
        """Return the model's index space.

        Raises:
            NotReadyError: nobody has joined yet.
        """
        if self.space is None:
            raise NotReadyError("the server has no model yet: no worker has joined")
        return self.space

    def check(self, joining: Joining) -> None:
        """Hold a join request to the run's model and shard.

        Raises:
            ModelMismatchError: names the first differing tensor, or the shards.
        """
        difference = self.require_space().first_difference(joining.view.space)
        if difference is not None:
            raise ModelMismatchError(
                f"the model of worker {joining.worker!r} (there) is not the server's (here): "
                + difference
            )
        mine = (self.shard, self.num_shards)
        if (joining.shard, joining.num_shards) != mine:
            raise ModelMismatchError(
                f"this server is shard {mine[0]} of {mine[1]}, and was joined as shard "
                f"{joining.shard} of {joining.num_shards}; every worker must list the same "
                "servers in the same order"
            )

    def adopt(self, joining: Joining) -> None:
        """Take the model's tensors, the shard and the initialiser from the first to join."""
        self._settle(joining.view.space, joining.shard, joining.num_shards)
        self.initialiser = joining.worker

    def _settle(self, space: ParameterSpace, shard: int, num_shards: int) -> None:
        self.space, self.shard, self.num_shards = space, shard, num_shards
        self.shard_range = start, stop = space.shard_ranges(num_shards)[shard]
        size = max(0, min(stop, space.num_parameters) - start)
        segments = space.count_segments(start, stop)
        self.max_frame_bytes = max_frame_bytes(size, segments, stop - start - size)

    def facts(self) -> dict[str, Any]:
        """Return what `restored` needs."""
        if self.space is None:
            return {"tensors": None}
        return {
            "tensors": [[t.name, t.shape, t.buffer, t.aliases] for t in self.space.tensors],
            "shard": [self.shard, self.num_shards],
            "initialiser": self.initialiser,
        }

    @classmethod
    def restored(cls, facts: Mapping[str, Any]) -> Self:
        """Rebuild what was saved."""
        agreed = cls()
        if facts["tensors"] is not None:
            specs = [TensorSpec(n, tuple(d), b, tuple(a)) for n, d, b, a in facts["tensors"]]
            agreed._settle(ParameterSpace(tuple(specs)), *facts["shard"])
            agreed.initialiser = facts["initialiser"]
        return agreed
