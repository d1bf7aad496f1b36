"""A worker's side of the exchange, without a network and without an optimizer.

`Worker` owns the base (its exact replica of the model) and what the momentum rule holds back. It
turns progress into one update frame per shard, and replies into a new base. All state that an
interrupted run needs to go on bit for bit is in here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dgs.codec import decode_body, encode_body
from dgs.config import WorkerConfig
from dgs.errors import ConfigError, MalformedError, NonFiniteError
from dgs.frame import Frame, FrameKind, Header, decode_frame, encode_frame, restamp
from dgs.momentum import make_rule
from dgs.quantize import first_non_finite
from dgs.select import make_selector
from dgs.space import FloatArray, Int64Array
from dgs.tracker import digest
from dgs.view import Part, View

__all__ = ["Answer", "Ticket", "Worker"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ticket:
    """What one shard's server knows a session by; stamped on every frame."""

    run: int
    worker_id: int
    member: int
    incarnation: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What the shards' replies to one exchange said."""

    staleness: int
    """Updates applied since this worker was last answered; the most of all shards."""
    version: int
    """Updates applied by the shard that has applied the most."""
    diverged: bool
    """Whether a reply carried a hash that the base does not have: base and record differ."""
    received: int
    """Entries of the difference."""


class Worker:
    """Hold base and velocity; make updates, take differences.

    ``velocity += progress; sent = select(|velocity|, density)``, per tensor; what was sent is
    settled with the momentum rule, and replies are added to (or set in) ``base``.

    Args:
        view: what this member holds of the model.
        num_shards: number of servers that the model is split over.
        config: rule, density, codes.
        device: where base and velocity live.

    Note:
        Deterministic. In place on its own tensors.
    """

    def __init__(
        self,
        view: View,
        num_shards: int,
        config: WorkerConfig,
        device: torch.device | None = None,
    ) -> None:
        """Allocate base and velocity; `join` fills the base."""
        self.view = view
        self.parts = [Part(view, a, b) for a, b in view.space.shard_ranges(num_shards)]
        self.base = torch.zeros(view.num_parameters, dtype=torch.float32, device=device)
        self.buffers = np.zeros(view.size - view.num_parameters, dtype=np.float32)
        self._averaged = self.buffers.copy()  # what the servers last said of the buffers
        self.sequence = 0
        self.pending: list[bytes] | None = None
        """The frames of an exchange that has not been absorbed yet, one per shard."""
        self._config = config
        self._rule = make_rule(config.rule, view.num_parameters, config.momentum, device)
        bounds = view.offsets[view.offsets <= view.num_parameters].tolist()
        self.ranges = [slice(a, b) for a, b in pairwise(bounds)][: self._num_tensors()]
        self._selector = make_selector(config.selection, len(self.ranges), config.dense_below)
        self._tickets: list[Ticket] = []
        self._versions = [0] * num_shards
        self._sent: tuple[Tensor, Tensor] | None = None

    def _num_tensors(self) -> int:
        return sum(1 for s in self.view.slabs if not self.view.space.tensors[s.tensor].buffer)

    def join(self, tickets: Sequence[Ticket], models: Sequence[bytes]) -> None:
        """Take the servers' model as base; sequence numbers start anew.

        An update that was in flight is forgotten; velocity stays.

        Args:
            tickets: one per shard.
            models: one frame of kind MODEL per shard, of this session's record.

        Raises:
            MalformedError: a frame is not what this session holds.
        """
        frames = [decode_frame(m, max_size=None) for m in models]
        for part, frame in zip(self.parts, frames, strict=True):
            sizes = (frame.header.size, len(frame.tail))
            if frame.header.kind != FrameKind.MODEL or sizes != (part.size, part.tail_size):
                raise MalformedError(
                    f"the server sent a model of {sizes[0]} coordinates and {sizes[1]} buffer "
                    f"values; this worker holds {part.size} and {part.tail_size}"
                )
        for i, (part, frame) in enumerate(zip(self.parts, frames, strict=True)):
            values = np.frombuffer(frame.body, dtype="<f4").astype(np.float32)
            self.base[part.local] = torch.from_numpy(values).to(self.base.device)
            self._take_buffers(part, frame)
            self._versions[i] = frame.header.version
        self._tickets = list(tickets)
        self.sequence, self.pending, self._sent = 0, None, None

    def resume(self, tickets: Sequence[Ticket]) -> None:
        """Go on with the sessions of an earlier incarnation; re-stamp what was in flight."""
        self._tickets = list(tickets)
        if self.pending is not None:
            self.pending = [
                restamp(frame, ticket.incarnation)
                for frame, ticket in zip(self.pending, tickets, strict=True)
            ]

    @property
    def tickets(self) -> list[Ticket]:
        """The sessions, one per shard."""
        return list(self._tickets)

    def collect(self, progress: Callable[[int], Tensor]) -> list[bytes]:
        """Take in the progress of a round and make the update of it, one frame per shard.

        Args:
            progress: called once per tensor, in order, with its position; returns what the inner
                optimizer took off it (start - end), flat, float32, finite.

        Returns:
            The frames, which also stay in `pending` until their replies are absorbed.

        Raises:
            NonFiniteError: a velocity has overflowed; names the tensor.
        """
        if self.pending is not None:
            raise ConfigError("the last exchange has not been answered yet; absorb it first")
        chosen, values = self._select(progress)
        indices_np = chosen.cpu().numpy()
        values_np = values.to("cpu").numpy()
        bad = first_non_finite(values_np)
        if bad is not None:
            name = self.view.name_at(int(indices_np[bad]))
            raise NonFiniteError(
                f"the velocity of tensor {name!r} is not finite any more; lower the learning "
                "rate, or restart from the server's model"
            )
        frames, decoded = [], [np.zeros(0, dtype=np.float32)]
        for shard, part in enumerate(self.parts):
            inside = slice(*np.searchsorted(indices_np, (part.local.start, part.local.stop)))
            local = indices_np[inside] - part.local.start
            encoded = encode_body(local, values_np[inside], part.segment_sizes, self._config.values)
            decoded.append(encoded.decoded)
            header = self._header(shard, self.sequence + 1, len(local))
            tail = self.buffers[self._tail(part)].astype("<f4")
            frames.append(encode_frame(header, encoded.body, tail))
        update = torch.from_numpy(np.concatenate(decoded)).to(self.base.device)
        self._rule.settle(chosen, update)
        self._sent = (chosen, update)
        self.sequence += 1
        self.pending = frames
        return frames

    def _select(self, progress: Callable[[int], Tensor]) -> tuple[Tensor, Tensor]:
        device = self.base.device
        indices = [torch.zeros(0, dtype=torch.int64, device=device)]
        values = [torch.zeros(0, dtype=torch.float32, device=device)]
        for unit, part in enumerate(self.ranges):
            candidates = self._rule.accumulate(part, progress(unit))
            chosen = self._selector.select(candidates, unit, self._config.density)
            values.append(candidates[chosen])
            indices.append(chosen + part.start)
        return torch.cat(indices), torch.cat(values)

    def _header(self, shard: int, seq: int, count: int) -> Header:
        ticket = self._tickets[shard]
        return Header(
            kind=FrameKind.UPDATE,
            values=self._config.values,
            worker_id=ticket.worker_id,
            member=ticket.member,
            shard=shard,
            run=ticket.run,
            incarnation=ticket.incarnation,
            seq=seq,
            version=self._versions[shard],
            size=self.parts[shard].size,
            nnz=count,
        )

    def absorb(self, replies: Sequence[bytes]) -> Answer:
        """Bring the base to what the servers' records of it now are.

        Args:
            replies: one per shard, to the frames that `collect` made.

        Raises:
            MalformedError: a reply is not one to this exchange; the base is unchanged.
            ChecksumError: a reply was damaged on its way; the base is unchanged.
        """
        frames = [decode_frame(r, max_size=None) for r in replies]
        bodies = []
        for part, frame in zip(self.parts, frames, strict=True):
            bodies.append(_read_difference(part, frame, self.sequence))
        for part, frame, (indices, values) in zip(self.parts, frames, bodies, strict=True):
            where = torch.from_numpy(indices + part.local.start).to(self.base.device)
            what = torch.from_numpy(values).to(self.base.device)
            if frame.header.replaces:
                self.base[where] = what
            else:
                self.base[where] += what
            self._take_buffers(part, frame)
        headers = [f.header for f in frames]
        self._versions = [h.version for h in headers]
        self.pending = None
        return Answer(
            staleness=max(h.staleness for h in headers),
            version=max(self._versions),
            diverged=any(self._differs(p, f) for p, f in zip(self.parts, frames, strict=True)),
            received=sum(h.nnz for h in headers),
        )

    def blank(self) -> list[bytes]:
        """Replace an update that a server refused by an empty one of the same number.

        A shard that has applied its part answers with the reply that it keeps; one that refused
        it applies nothing. So all shards go on from the same sequence number. What was refused is
        dropped: it has left the velocity.
        """
        self._sent = None
        self.pending = []
        for shard, part in enumerate(self.parts):
            nothing = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
            body = encode_body(*nothing, part.segment_sizes, self._config.values).body
            tail = self._averaged[self._tail(part)].astype("<f4")
            self.pending.append(encode_frame(self._header(shard, self.sequence, 0), body, tail))
        return self.pending

    def _differs(self, part: Part, frame: Frame) -> bool:
        """Tell whether the frame carries a hash that the base does not have."""
        hashed = frame.header.hash
        return hashed is not None and hashed != digest(self.base[part.local].cpu().numpy())

    def _tail(self, part: Part) -> slice:
        first = self.view.num_parameters
        return slice(part.local_tail.start - first, part.local_tail.stop - first)

    def _take_buffers(self, part: Part, frame: Frame) -> None:
        self.buffers[self._tail(part)] = frame.tail
        self._averaged[self._tail(part)] = frame.tail

    def start(self, unit: int) -> Tensor:
        """Return where the next round starts in one tensor: the base, or ahead of it.

        With ``view="compensated"`` this is ``base - waiting``: the replica plus the worker's own
        progress that the servers do not have yet. Not to be modified.
        """
        part = self.ranges[unit]
        if self._config.view == "base":
            return self.base[part]
        waiting = self._rule.waiting(part)
        return self.base[part] if waiting is None else self.base[part] - waiting

    def start_in_flight(self, into: Tensor) -> None:
        """Write where the next round starts while an exchange is in flight.

        Args:
            into: flat float32; holds the progress of the last round and is overwritten with
                ``base - progress`` or, compensated, ``base - waiting - update in flight``.
        """
        if self._config.view == "base":
            torch.sub(self.base, into, out=into)
            return
        for unit, part in enumerate(self.ranges):
            into[part] = self.start(unit)
        if self._sent is not None:
            indices, update = self._sent
            into[indices] -= update

    def state(self) -> dict[str, Any]:
        """Return everything that the next exchange depends on, as copies.

        Tensors, numbers and lists of numbers only, so that it can be stored without pickle.
        """
        state: dict[str, Any] = {
            "base": self.base.clone(),
            "buffers": torch.from_numpy(self.buffers.copy()),
            "averaged": torch.from_numpy(self._averaged.copy()),
            "selection": self._selector.state(),
            "sequence": self.sequence,
            "versions": list(self._versions),
            "in_flight": len(self.pending or ()),
            "runs": [t.run for t in self._tickets],
            "incarnations": [t.incarnation for t in self._tickets],
        }
        state |= {f"rule.{name}": t.clone() for name, t in self._rule.state().items()}
        for shard, frame in enumerate(self.pending or ()):
            state[f"pending.{shard}"] = torch.frombuffer(bytearray(frame), dtype=torch.uint8)
        if self._sent is not None:
            state["sent.indices"], state["sent.update"] = (t.clone() for t in self._sent)
        return state

    def check_state(self, state: dict[str, Any]) -> None:
        """Check that a saved state is one of this model, rule and number of shards.

        Raises:
            ConfigError: it is not; says in what.
        """
        _check_saved(state, self._rule.state(), self.base, len(self.parts), self._config.rule)

    def load_velocity(self, state: dict[str, Any]) -> None:
        """Take what waits from a saved, checked state, but not the base."""
        self._selector.load_state(state["selection"])
        for name, tensor in self._rule.state().items():
            tensor.copy_(state[f"rule.{name}"])

    def load_state(self, state: dict[str, Any]) -> None:
        """Take a saved, checked state whole; `resume` must follow with the new tickets."""
        self.load_velocity(state)
        self.base.copy_(state["base"])
        self.buffers[:] = state["buffers"].cpu().numpy()
        self._averaged[:] = state["averaged"].cpu().numpy()
        self.sequence = state["sequence"]
        self._versions = list(state["versions"])
        count = state["in_flight"]
        self.pending = (
            [state[f"pending.{i}"].cpu().numpy().tobytes() for i in range(count)] if count else None
        )
        self._sent = None
        if "sent.indices" in state:
            device = self.base.device
            self._sent = (state["sent.indices"].to(device), state["sent.update"].to(device))


def _read_difference(part: Part, frame: Frame, seq: int) -> tuple[Int64Array, FloatArray]:
    h = frame.header
    got = (h.kind, h.seq, h.size, len(frame.tail))
    wanted = (FrameKind.DIFFERENCE, seq, part.size, part.tail_size)
    if got != wanted:
        raise MalformedError(
            f"the server's reply (kind, sequence number, size, buffers) is {got}, expected {wanted}"
        )
    indices, values = decode_body(frame.body, part.segment_sizes, h.values, h.nnz)
    if first_non_finite(values) is not None:
        raise MalformedError("the server's reply holds NaN or Inf")
    return indices, values


def _check_saved(
    state: dict[str, Any], rule_state: dict[str, Tensor], base: Tensor, shards: int, rule: str
) -> None:
    saved = {k: v for k, v in state.items() if k.startswith("rule.")}
    mine = {f"rule.{k}": v for k, v in rule_state.items()}
    if saved.keys() != mine.keys():
        raise ConfigError(
            f"the saved state holds {sorted(saved)}, rule={rule!r} needs {sorted(mine)}; use the "
            "rule that the state was saved with"
        )
    for name, tensor in {**mine, "base": base}.items():
        if state[name].shape != tensor.shape:
            raise ConfigError(
                f"the saved state is of a model with {state[name].numel()} coordinates, this one "
                f"has {tensor.numel()}"
            )
    if len(state["versions"]) != shards:
        raise ConfigError(
            f"the saved state is of {len(state['versions'])} servers, this run has {shards}"
        )
