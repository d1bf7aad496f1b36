"""A worker's side of the exchange, without a network and without an optimizer.

`Worker` owns the base (its exact replica of the model) and what the momentum rule holds back. It
turns progress into one update frame per shard, and replies into a new base. All state that an
interrupted run needs to go on bit for bit is in here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dgs.config import WorkerConfig
from dgs.dialog import Dialog, Ticket
from dgs.errors import ConfigError, NonFiniteError
from dgs.frame import Header
from dgs.kernels import kernels
from dgs.momentum import make_rule
from dgs.quantize import first_non_finite
from dgs.select import make_selector
from dgs.space import FloatArray
from dgs.sparsify import DeviceSparsifier, HostSparsifier, Rounds, Sparsifier
from dgs.tracker import digest
from dgs.view import Part, View

__all__ = ["Answer", "Worker"]

_LARGEST = torch.finfo(torch.float32).max


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
        device = device or torch.device("cpu")  # not the default one that a user may have set
        self.view = view
        self.parts = [Part(view, a, b) for a, b in view.space.shard_ranges(num_shards)]
        self.base = torch.zeros(view.num_parameters, dtype=torch.float32, device=device)
        self.buffers = np.zeros(view.size - view.num_parameters, dtype=np.float32)
        self._averaged = self.buffers.copy()  # what the servers last said of the buffers
        self._config = config
        self._rule = make_rule(config.rule, view.num_parameters, config.momentum, device)
        bounds = view.offsets[view.offsets <= view.num_parameters].tolist()
        self.ranges = [slice(a, b) for a, b in pairwise(bounds)][: self._num_tensors()]
        self._selector = make_selector(config.selection, len(self.ranges), config.dense_below)
        fast = kernels(view.num_parameters)
        self._sparsifier: Sparsifier = (
            HostSparsifier(fast, self._selector, self.ranges, config.density)
            if device.type == "cpu"
            else DeviceSparsifier(self._selector, self.ranges)
        )
        self.dialog = Dialog(self.parts, config.values, fast)
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
        frames = self.dialog.begin(tickets, models)
        for part, frame in zip(self.parts, frames, strict=True):
            values = np.frombuffer(frame.body, dtype="<f4").astype(np.float32)
            self.base[part.local] = torch.from_numpy(values).to(self.base.device)
            self._take_buffers(part, frame.tail)
        self._sent = None

    def collect(
        self,
        rounds: Rounds,
        send: Callable[[int, bytes], object] = lambda shard, frame: None,
    ) -> None:
        """Take in the progress of a round and make the update of it, one frame per shard.

        Args:
            rounds: called once per tensor, in order, with its position; returns where the round
                started and where it ended, flat, float32, finite: progress is the difference.
            send: called with each shard and its frame as soon as that is ready, in order. The
                frames also stay in `dialog.pending` until their replies are absorbed.

        Raises:
            NonFiniteError: a velocity has overflowed; names the tensor.
        """
        self.dialog.check_idle()
        chosen = self._sparsifier.collect(self._rule, rounds, self._config.density)
        bad = first_non_finite(chosen.values)
        if bad is not None:
            name = self.view.name_at(int(chosen.indices[bad]))
            raise NonFiniteError(
                f"the velocity of tensor {name!r} is not finite any more; nothing was sent, and "
                "what is not finite is dropped. Lower the learning rate"
            )
        tails = [self.buffers[self._tail(part)] for part in self.parts]
        decoded = self.dialog.compose(chosen.indices, chosen.values, tails, send)
        update = torch.from_numpy(decoded).to(self.base.device)
        self._rule.settle(chosen.positions, update)
        self._sent = (chosen.positions, update)

    def absorb(self, replies: Sequence[bytes]) -> Answer:
        """Bring the base to what the servers' records of it now are.

        Args:
            replies: one per shard, to the frames that `collect` made.

        Raises:
            MalformedError: a reply is not one to this exchange; the base is unchanged.
            ChecksumError: a reply was damaged on its way; the base is unchanged.
        """
        received = self.dialog.read(replies)
        for part, one in zip(self.parts, received, strict=True):
            where = torch.from_numpy(one.indices + part.local.start).to(self.base.device)
            what = torch.from_numpy(one.values).to(self.base.device)
            if one.header.replaces:
                self.base[where] = what
            else:
                self.base[where] = (self.base[where] + what).clamp_(-_LARGEST, _LARGEST)
            self._take_buffers(part, one.tail)
        headers = [r.header for r in received]
        return Answer(
            staleness=max(h.staleness for h in headers),
            version=max(h.version for h in headers),
            diverged=any(self._differs(p, h) for p, h in zip(self.parts, headers, strict=True)),
            received=sum(h.nnz for h in headers),
        )

    def blank(self, shards: Collection[int]) -> list[bytes]:
        """Replace what some shards refused; see `Dialog.blank`.

        What was refused is dropped: it has left the velocity.
        """
        self._sent = None
        return self.dialog.blank(shards, [self._averaged[self._tail(p)] for p in self.parts])

    def _differs(self, part: Part, header: Header) -> bool:
        """Tell whether the reply carried a hash that the base does not have."""
        hashed = header.hash
        return hashed is not None and hashed != digest(self.base[part.local].cpu().numpy())

    def _tail(self, part: Part) -> slice:
        first = self.view.num_parameters
        return slice(part.local_tail.start - first, part.local_tail.stop - first)

    def _take_buffers(self, part: Part, tail: FloatArray) -> None:
        self.buffers[self._tail(part)] = tail
        self._averaged[self._tail(part)] = tail

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
            **self.dialog.state(),
        }
        state |= {f"rule.{name}": t.clone() for name, t in self._rule.state().items()}
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
        if state["selection"].shape == self._selector.state().shape:  # else: another selection
            self._selector.load_state(state["selection"])
        for name, tensor in self._rule.state().items():
            tensor.copy_(state[f"rule.{name}"])

    def forget_velocity(self, shards: Iterable[int]) -> None:
        """Drop what waits for some shards."""
        for shard in shards:
            for tensor in self._rule.state().values():
                tensor[self.parts[shard].local] = 0.0

    def drop_non_finite(self) -> None:
        """Set what waits to 0 where it is NaN or infinite."""
        for tensor in self._rule.state().values():
            torch.nan_to_num_(tensor, nan=0.0, posinf=0.0, neginf=0.0)

    @staticmethod
    def saved_model(state: dict[str, Any]) -> FloatArray:
        """Return the base and the averaged buffers of a saved state: a whole view's flat model."""
        both = torch.cat([state["base"].cpu(), state["averaged"].cpu()])
        return np.array(both.numpy(), dtype=np.float32)

    def load_state(self, state: dict[str, Any]) -> None:
        """Take a saved, checked state whole; `dialog.resume` must follow with the new tickets."""
        self.load_velocity(state)
        self.base.copy_(state["base"])
        self.buffers[:] = state["buffers"].cpu().numpy()
        self._averaged[:] = state["averaged"].cpu().numpy()
        self.dialog.load_state(state)
        self._sent = None
        if "sent.indices" in state:
            device = self.base.device
            self._sent = (state["sent.indices"].to(device), state["sent.update"].to(device))


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
