"""A member's side of its exchanges with all shards: numbers, frames on their way, replies.

`Dialog` knows what was sent and what was answered, nothing of how updates come about or of what
becomes of differences. At most one exchange is pending; its frames are kept until all its replies
have been read, so sending again is always possible and always right.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dgs.codec import Encoded
from dgs.config import Values
from dgs.errors import ConfigError, MalformedError
from dgs.frame import Frame, FrameKind, Header, decode_frame, encode_frame, restamp
from dgs.kernels import Kernels
from dgs.quantize import first_non_finite
from dgs.space import FloatArray, Int64Array
from dgs.view import Part

__all__ = ["Dialog", "Received", "Ticket"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ticket:
    """What one shard's server knows a session by; stamped on every frame."""

    run: int
    worker_id: int
    member: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class Received:
    """One shard's checked reply."""

    header: Header
    indices: Int64Array
    """Positions in the shard's part, ascending."""
    values: FloatArray
    tail: FloatArray
    """The part's averaged buffers."""


class Dialog:
    """Number the exchanges, frame the updates, check the replies.

    Args:
        parts: what is exchanged with each shard.
        values: how updates are coded.
        kernels: encode and decode.
    """

    def __init__(self, parts: Sequence[Part], values: Values, kernels: Kernels) -> None:
        """Start without sessions; `begin` or `resume` names them."""
        self.parts = list(parts)
        self.tickets: list[Ticket] = []
        self.versions = [0] * len(self.parts)
        """Updates that each shard had applied when it last answered."""
        self.sequence = 0
        """Number of the last exchange."""
        self.pending: list[bytes] | None = None
        """The frames of an exchange whose replies have not been read yet, one per shard."""
        self.cursor = b""
        """What travels with the next update, with every shard's frame."""
        self._values = values
        self._kernels = kernels

    def begin(self, tickets: Sequence[Ticket], models: Sequence[bytes]) -> list[Frame]:
        """Take fresh sessions; numbers start anew and what was pending is forgotten.

        Args:
            tickets: one per shard.
            models: one frame of kind MODEL per shard, of the session's record.

        Raises:
            MalformedError: a frame is not what its session holds; nothing has changed.
        """
        frames = [decode_frame(m, max_size=None) for m in models]
        for part, frame in zip(self.parts, frames, strict=True):
            sizes = (frame.header.size, len(frame.tail))
            if frame.header.kind != FrameKind.MODEL or sizes != (part.size, part.tail_size):
                raise MalformedError(
                    f"the server sent a model of {sizes[0]} coordinates and {sizes[1]} buffer "
                    f"values; this worker holds {part.size} and {part.tail_size}"
                )
        self.versions = [f.header.version for f in frames]
        self.tickets = list(tickets)
        self.sequence, self.pending = 0, None
        return frames

    def resume(self, tickets: Sequence[Ticket]) -> None:
        """Go on with the sessions of an earlier incarnation; re-stamp what is pending."""
        self.tickets = list(tickets)
        if self.pending is not None:
            self.pending = [
                restamp(frame, ticket.incarnation)
                for frame, ticket in zip(self.pending, tickets, strict=True)
            ]

    def check_idle(self) -> None:
        """Refuse to start an exchange while another is pending.

        Raises:
            ConfigError: one is.
        """
        if self.pending is not None:
            raise ConfigError("the last exchange has not been answered yet; absorb it first")

    def compose(
        self,
        indices: Int64Array,
        values: FloatArray,
        tails: Sequence[FloatArray],
        send: Callable[[int, bytes], object],
    ) -> FloatArray:
        """Make the next exchange's frames and hand each over as soon as it is ready.

        Args:
            indices: ascending positions in the member's local index space.
            values: what to send there, finite.
            tails: the buffers, one array per shard.
            send: called with each shard and its frame, in order.

        Returns:
            The update as the servers decode it, one value per index.

        Raises:
            ConfigError: an exchange is pending.
        """
        self.check_idle()
        self.sequence += 1
        frames, decoded = [], [np.zeros(0, dtype=np.float32)]
        for shard, part in enumerate(self.parts):
            inside = slice(*np.searchsorted(indices, (part.local.start, part.local.stop)))
            local = indices[inside] - part.local.start
            body = self._encode(part, local, values[inside])
            decoded.append(body.decoded)
            tail = tails[shard].astype("<f4")
            header = self._header(shard, len(local))
            frames.append(encode_frame(header, body.body, tail, self.cursor))
            send(shard, frames[-1])
        self.pending = frames
        return np.concatenate(decoded)

    def blank(self, shards: Collection[int], tails: Sequence[FloatArray]) -> list[bytes]:
        """Replace what some shards refused by an empty update of the same number.

        A shard that has applied its part answers with the reply that it keeps, one that did not
        answer applies it now, and one that refused it applies nothing. So all shards go on from the
        same sequence number, and the cursor moves on with it: the data behind it has been used.

        Returns:
            The frames to send, to all shards.
        """
        assert self.pending is not None
        nothing = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
        for shard in shards:
            body = self._encode(self.parts[shard], *nothing).body
            tail = tails[shard].astype("<f4")
            cursor = bytes(decode_frame(self.pending[shard]).cursor)  # newer ones may be set by now
            self.pending[shard] = encode_frame(self._header(shard, 0), body, tail, cursor)
        return self.pending

    def _encode(self, part: Part, indices: Int64Array, values: FloatArray) -> Encoded:
        return self._kernels.encode_body(indices, values, part.segment_sizes, self._values)

    def _header(self, shard: int, count: int) -> Header:
        ticket = self.tickets[shard]
        return Header(
            kind=FrameKind.UPDATE,
            values=self._values,
            worker_id=ticket.worker_id,
            member=ticket.member,
            shard=shard,
            run=ticket.run,
            incarnation=ticket.incarnation,
            seq=self.sequence,
            version=self.versions[shard],
            size=self.parts[shard].size,
            nnz=count,
        )

    def read(self, replies: Sequence[bytes]) -> list[Received]:
        """Check and decode the replies to the pending exchange, which ends with this.

        Raises:
            MalformedError: a reply is not one to this exchange, which stays pending.
            ChecksumError: a reply was damaged on its way; likewise.
        """
        received = [
            self._read(part, decode_frame(reply, max_size=None))
            for part, reply in zip(self.parts, replies, strict=True)
        ]
        self.versions = [r.header.version for r in received]
        self.pending = None
        return received

    def _read(self, part: Part, frame: Frame) -> Received:
        h = frame.header
        got = (h.kind, h.seq, h.size, len(frame.tail))
        wanted = (FrameKind.DIFFERENCE, self.sequence, part.size, part.tail_size)
        if got != wanted:
            raise MalformedError(
                f"the server's reply (kind, sequence number, size, buffers) is {got}, expected "
                f"{wanted}"
            )
        sizes = part.segment_sizes
        indices, values = self._kernels.decode_body(frame.body, sizes, h.values, h.nnz)
        if first_non_finite(values) is not None:
            raise MalformedError("the server's reply holds NaN or Inf")
        return Received(h, indices, values, frame.tail)

    def state(self) -> dict[str, Any]:
        """Return numbers, sessions and pending frames: numbers, lists and tensors only."""
        state: dict[str, Any] = {
            "sequence": self.sequence,
            "versions": list(self.versions),
            "in_flight": len(self.pending or ()),
            "runs": [t.run for t in self.tickets],
            "incarnations": [t.incarnation for t in self.tickets],
        }
        for shard, frame in enumerate(self.pending or ()):
            state[f"pending.{shard}"] = torch.frombuffer(bytearray(frame), dtype=torch.uint8)
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Take numbers and pending frames from a saved state; `resume` must name the sessions."""
        self.sequence = state["sequence"]
        self.versions = list(state["versions"])
        count = state["in_flight"]
        self.pending = (
            [state[f"pending.{i}"].cpu().numpy().tobytes() for i in range(count)] if count else None
        )
