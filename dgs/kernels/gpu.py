"""Accumulation and selection on a GPU, for all tensors of a model in a few launches.

`Units` does what `dgs.kernels.reference` defines, for many tensors at once and without waiting: the
counts stay on the device until the caller copies them, so a step needs one synchronisation:

    selected = units.accumulate_and_select(velocity, base, parameters, thresholds)
    (counts,) = to_host(selected.counts).wait()
    redone = {}
    for u in ...:                                   # units whose count is not acceptable
        chosen = exact_top_k(velocity[ranges[u]], k[u])
        redone[u] = (chosen, velocity[ranges[u]][chosen])
    indices, values = units.assemble(selected, counts, redone)
    copy = to_host(indices, values)

Quantising and coding stay on the host. What crosses is about 1 % of the model, with indices of as
many bytes as values, and the sums behind the scales of `int2` and `sign` are defined one by one in
float64, in order.

Sums of float32 are those of IEEE 754, subnormal numbers included. Only where one is NaN, its sign
and payload are the processor's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import triton
from torch import Tensor

from dgs.errors import ConfigError
from dgs.kernels import gpu_passes as passes

__all__ = ["HostCopy", "Selected", "Units", "exact_top_k", "to_host"]

_BLOCK: Final = 2048
_ENTRIES_PER_WARP: Final = 256  # two loads of 16 bytes per operand and thread, all in flight
_WORDS_TOGETHER: Final = 1024
_UNITS_TOGETHER: Final = 1024
_INFINITY_BITS: Final = 0x7F800000
_ACCUMULATE: Final[int] = passes.ACCUMULATE.value
_ADD: Final[int] = passes.ADD.value
_SUBTRACT: Final[int] = passes.SUBTRACT.value
_KEPT: Final[int] = passes.KEPT.value

Operand = Tensor | Sequence[Tensor]


class Selected(NamedTuple):
    """What was selected, on the device; the next call on the same `Units` overwrites it.

    Attributes:
        indices: flat indices, unit after unit, ascending.
        values: the candidates there, float32.
        counts: entries selected of each unit, int64, also those that there was no room for.
    """

    indices: Tensor
    values: Tensor
    counts: Tensor


class HostCopy:
    """Tensors on their way to the host.

    Attributes:
        event: when they are there; None where they are already.
    """

    def __init__(self, tensors: Sequence[Tensor], event: torch.cuda.Event | None) -> None:
        """Take the copies, and the event after which they are complete."""
        self._tensors = tuple(tensors)
        self.event = event

    def wait(self) -> tuple[Tensor, ...]:
        """Wait until the copies are complete and return them."""
        if self.event is not None:
            self.event.synchronize()
        return self._tensors


def to_host(
    *tensors: Tensor, stream: torch.cuda.Stream | None = None, after: HostCopy | None = None
) -> HostCopy:
    """Copy tensors to the host without waiting, into pinned memory where they are on a GPU.

    Args:
        tensors: all on one device. Later work on the current stream may overwrite them only where
            `stream` is None; otherwise, once the copy is complete.
        stream: where the copies run, beside what the current stream is given later. None is the
            current stream.
        after: for another `stream`: what the copies run after, where the tensors were complete
            before that. None: after all that the current stream has been given so far.

    Example:
        >>> to_host(torch.tensor([3, 4])).wait()[0].tolist()
        [3, 4]
    """
    if not tensors or not tensors[0].is_cuda:
        return HostCopy([t.clone() for t in tensors], None)
    current = torch.cuda.current_stream(tensors[0].device)
    stream = stream or current
    if after is not None and after.event is not None:
        stream.wait_event(after.event)
    elif stream != current:
        stream.wait_stream(current)
    copies = []
    with torch.cuda.stream(stream):
        for tensor in tensors:
            copy = torch.empty_like(tensor, device="cpu", pin_memory=True)
            copies.append(copy.copy_(tensor, non_blocking=True))
            tensor.record_stream(stream)
        event = torch.cuda.Event()
        event.record(stream)
    return HostCopy(copies, event)


def exact_top_k(values: Tensor, k: int) -> Tensor:
    """Return the indices of the `k` entries of largest magnitude, ascending, zeros left out.

    What `dgs.select.top_k_indices` returns for finite values. NaN counts as larger than infinity,
    and all NaN as equal.

    Args:
        values: shape ``(n,)``, float32; not modified.
        k: number of entries wanted, in ``[0, n]``.

    Returns:
        int64; fewer than `k` only where fewer entries differ from zero. Ties go to the lower index.

    Example:
        >>> exact_top_k(torch.tensor([1.0, -3.0, 2.0, -2.0]), 2).tolist()
        [1, 2]
    """
    bits = (values.view(torch.int32) & 0x7FFFFFFF).clamp_(max=_INFINITY_BITS + 1)
    if k >= bits.numel():
        return bits.nonzero().flatten()
    if k <= 0:
        return torch.zeros(0, dtype=torch.int64, device=values.device)
    smallest = torch.topk(bits, k, sorted=False).values.min()
    chosen = bits > smallest
    ties = ((bits == smallest) & (bits > 0)).nonzero().flatten()
    chosen[ties[: k - int(chosen.sum())]] = True
    return chosen.nonzero().flatten()


class Units:
    """The tensors of a model, one after the other in flat memory, prepared for selection.

    Operands are float32 on the device, contiguous: either flat, or one tensor per unit. Nothing
    waits for the device, and nothing is allocated on it per call but the scratch of a prefix sum.

    Args:
        sizes: entries of each unit; may be 0.
        room: the most entries of each unit that are written.
        device: a GPU; or the CPU, under Triton's interpreter.
        block: entries that one program of the first pass takes, a power of two from 128 on.

    Raises:
        ConfigError: what was given does not fit together, or the device cannot run Triton.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        room: Sequence[int],
        device: torch.device,
        *,
        block: int = _BLOCK,
    ) -> None:
        """Allocate the tables, the bits and the room."""
        if len(sizes) != len(room) or min([*sizes, *room], default=0) < 0:
            raise ConfigError("sizes and room must be lists of the same length, none negative")
        if block < 128 or block & (block - 1):
            raise ConfigError(f"block={block} is not valid: a power of two, at least 128")
        if device.type == "cpu" and not passes.INTERPRETED:
            raise ConfigError(
                "these kernels run on a GPU; on the CPU only by Triton's interpreter, with "
                "TRITON_INTERPRET=1 in the environment from the start"
            )
        self.device = torch.empty(0, device=device).device  # with the number of the GPU
        self._sizes, self._size_list = np.array(sizes, np.int64), list(sizes)
        ends = np.cumsum(self._sizes)
        self._starts = ends - self._sizes
        self._total = int(self._sizes.sum())
        self._room = np.minimum(np.array(room, np.int64), self._sizes)
        self._block = block
        self._allocate()

    def _allocate(self) -> None:
        per_unit = -(-self._sizes // self._block)
        first = np.concatenate(([0], np.cumsum(per_unit)))
        units, self._blocks = len(self._sizes), int(first[-1])
        unit_of = np.repeat(np.arange(units, dtype=np.int32), per_unit)
        begins = self._starts[unit_of] + self._block * (np.arange(self._blocks) - first[unit_of])
        self._unit_of = torch.from_numpy(unit_of).to(self.device)
        self._begins = torch.from_numpy(begins).to(self.device)
        self._stops = torch.from_numpy(self._starts + self._sizes).to(self.device)
        self._first_blocks = torch.from_numpy(first).to(self.device)
        self._room_there = torch.from_numpy(self._room).to(self.device)
        self._step = self._empty((3, units), torch.int64)
        self._words = self._empty(self._blocks * (self._block // passes.WORD.value), torch.int32)
        self._counts = self._empty(self._blocks, torch.int32)
        self._before = torch.zeros(self._blocks + 1, dtype=torch.int64, device=self.device)
        self._places = self._empty((2, units), torch.int64)
        index = torch.int32 if self._total < 2**31 else torch.int64
        self._indices = self._empty(int(self._room.sum()), index)
        self._values = self._empty(int(self._room.sum()), torch.float32)
        self._unit_counts = self._empty(units, torch.int64)

    def _empty(self, shape: int | tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    @property
    def scratch_bytes(self) -> int:
        """Bytes on the device that are held between calls."""
        mine = [t for t in vars(self).values() if isinstance(t, Tensor)]
        return sum(t.numel() * t.element_size() for t in mine)

    def accumulate_and_select(
        self, held: Tensor, start: Operand, end: Operand, thresholds: Sequence[float]
    ) -> Selected:
        """Compute ``held += start - end`` and select ``|held| >= threshold``, unit by unit.

        Args:
            held: flat; changed in place, completely, whatever room there is.
            start: where the round started, such as the flat base.
            end: where it ended, such as the parameters.
            thresholds: one per unit, not negative; at 0, all that is not zero is selected, at
                infinity nothing that is finite.

        Raises:
            ConfigError: an operand or a threshold is not valid; nothing was done.
        """
        return self._run(_ACCUMULATE, held, start, end, thresholds)

    def add_and_select(
        self, held: Tensor, progress: Operand, thresholds: Sequence[float]
    ) -> Selected:
        """Compute ``held += progress`` and select; see `accumulate_and_select`."""
        return self._run(_ADD, held, progress, progress, thresholds)

    def scan(self, model: Operand, replica: Operand, thresholds: Sequence[float]) -> Selected:
        """Select where ``|model - replica| >= threshold``; the values are ``model - replica``."""
        return self._run(_SUBTRACT, self._values, model, replica, thresholds)

    def offsets(self, counts: Tensor) -> list[int]:
        """Return where each unit starts in what was selected, and where the last one ends.

        Args:
            counts: those of `Selected`, on the host.
        """
        written = np.minimum(counts.numpy(), self._room)
        return [0, *np.cumsum(written).tolist()]

    def assemble(
        self,
        selected: Selected,
        counts: Tensor,
        redone: Mapping[int, tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Return the flat indices and the values that were selected, with some units replaced.

        Args:
            selected: what a call of this object has just returned.
            counts: its counts, on the host.
            redone: for units to be replaced, the ascending indices within the unit, and the values.

        Returns:
            Two tensors of the same length; where nothing is replaced, parts of `selected`.
        """
        offsets = self.offsets(counts)
        if not redone:
            return selected.indices[: offsets[-1]], selected.values[: offsets[-1]]
        indices, values, done = [], [], 0
        for unit, (within, candidates) in sorted(redone.items()):
            flat = within + int(self._starts[unit])
            indices += [selected.indices[done : offsets[unit]], flat.to(self._indices.dtype)]
            values += [selected.values[done : offsets[unit]], candidates]
            done = offsets[unit + 1]
        indices.append(selected.indices[done : offsets[-1]])
        values.append(selected.values[done : offsets[-1]])
        return torch.cat(indices), torch.cat(values)

    def _run(
        self, mode: int, held: Tensor, left: Operand, right: Operand, thresholds: Sequence[float]
    ) -> Selected:
        if mode != _SUBTRACT:
            self._checked(held, self._total, "held")
        step = np.stack(
            [self._addresses(left, "left"), self._addresses(right, "right"), self._bits(thresholds)]
        )
        selected = Selected(self._indices, self._values, self._unit_counts)
        if not self._blocks:
            self._unit_counts.zero_()
            return selected
        self._upload(step)
        with torch.cuda.device(-1 if self.device.type == "cpu" else self.device):
            self._first_pass(held, mode)
            self._second_pass(held, _SUBTRACT if mode == _SUBTRACT else _KEPT)
        return selected

    def _upload(self, step: npt.NDArray[np.int64]) -> None:
        host = torch.from_numpy(step)
        if self.device.type == "cuda":  # else the copy would wait for the device
            host = host.pin_memory()
        self._step.copy_(host, non_blocking=True)

    def _first_pass(self, held: Tensor, mode: int) -> None:
        passes.select_blocks[(self._blocks,)](
            held,
            self._begins,
            self._unit_of,
            self._stops,
            self._step,
            self._words,
            self._counts,
            len(self._sizes),
            MODE=mode,
            BLOCK=self._block,
            num_warps=max(1, min(16, self._block // _ENTRIES_PER_WARP)),
            enable_fp_fusion=False,
        )

    def _second_pass(self, held: Tensor, mode: int) -> None:
        torch.cumsum(self._counts, 0, out=self._before[1:])
        passes.place_units[(1,)](
            self._before,
            self._first_blocks,
            self._room_there,
            self._unit_counts,
            self._places,
            len(self._sizes),
            CHUNK=_UNITS_TOGETHER,
            enable_fp_fusion=False,
        )
        tile = max(_WORDS_TOGETHER, self._block // passes.WORD.value)
        passes.gather_words[(triton.cdiv(self._blocks * self._block, tile * passes.WORD.value),)](
            held,
            self._begins,
            self._unit_of,
            self._step,
            self._words,
            self._before,
            self._places,
            self._indices,
            self._values,
            len(self._sizes),
            self._blocks,
            MODE=mode,
            BLOCK=self._block,
            TILE=tile,
            enable_fp_fusion=False,
        )

    def _checked(self, tensor: Tensor, size: int, name: str) -> Tensor:
        if (
            tensor.dtype != torch.float32
            or tensor.numel() != size
            or tensor.device != self.device
            or not tensor.is_contiguous()
        ):
            raise ConfigError(
                f"{name} must hold {size} float32 values, contiguous, on {self.device}; it is "
                f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
            )
        return tensor

    def _addresses(self, operand: Operand, name: str) -> npt.NDArray[np.int64]:
        if isinstance(operand, Tensor):
            start = self._checked(operand, self._total, name).data_ptr()
            return np.full(self._sizes.shape, start, np.int64)
        if len(operand) != len(self._sizes):
            raise ConfigError(f"{name} has {len(operand)} tensors, there are {len(self._sizes)}")
        parts = [
            self._checked(tensor, size, f"tensor {unit} of {name}").data_ptr()
            for unit, (tensor, size) in enumerate(zip(operand, self._size_list, strict=True))
        ]
        return np.array(parts, np.int64) - 4 * self._starts

    def _bits(self, thresholds: Sequence[float]) -> npt.NDArray[np.int64]:
        given = np.array(thresholds, np.float64)
        if given.shape != self._sizes.shape or not (given >= 0.0).all():
            raise ConfigError(
                f"there must be {len(self._sizes)} thresholds, none negative or NaN; they are "
                f"{thresholds}"
            )
        with np.errstate(over="ignore"):  # what float32 cannot hold is as good as infinite
            bits = given.astype(np.float32).view(np.int32) & 0x7FFFFFFF
        return np.maximum(bits, 1).astype(np.int64)
