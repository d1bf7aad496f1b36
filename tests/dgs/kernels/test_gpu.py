"""The GPU's passes compute what their definitions compute, bit for bit.

They run on a GPU where there is one. Elsewhere `test_gpu_interpreted` runs this file once more, in
a process of its own, under Triton's interpreter.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from dgs.errors import ConfigError
from dgs.kernels import reference
from dgs.select import TrackedSelector, top_k_indices
from tests.dgs.kernels.conftest import SHAPES, Floats, make

pytest.importorskip("triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU; test_gpu_interpreted runs these", allow_module_level=True)

from dgs.kernels import gpu, gpu_passes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = (127, 1, 0, 128, 63, 0, 129, 300, 64)
"""Around the words (32) and the blocks of these tests (128); those after 63 are misaligned."""


@pytest.fixture(autouse=True)
def _interpreted_quietly() -> Iterator[None]:
    with np.errstate(all="ignore"):  # the interpreter's arithmetic is numpy's
        yield


class Outcome(NamedTuple):
    """What a pass gave, and what it left in the velocity."""

    counts: list[int]
    indices: list[int]
    values: bytes
    held: bytes


def _ranges(sizes: Sequence[int]) -> list[slice]:
    ends = np.concatenate(([0], np.cumsum(sizes))).tolist()
    return [slice(a, b) for a, b in pairwise(ends)]


def _there(values: Floats) -> Tensor:
    return torch.from_numpy(values.copy()).to(DEVICE)


def _split(values: Floats, sizes: Sequence[int]) -> list[Tensor]:
    return [_there(values[part]) for part in _ranges(sizes)]


def _outcome(units: gpu.Units, selected: gpu.Selected, held: Tensor | None = None) -> Outcome:
    (counts,) = gpu.to_host(selected.counts).wait()
    indices, values = gpu.to_host(*units.assemble(selected, counts, {})).wait()
    left = b"" if held is None else held.cpu().numpy().tobytes()
    return Outcome(counts.tolist(), indices.tolist(), values.numpy().tobytes(), left)


def _expected(
    kernel: str,
    operands: Sequence[Floats],
    sizes: Sequence[int],
    thresholds: Sequence[float],
    room: Sequence[int],
) -> Outcome:
    """Run the definition unit by unit; the first operand is changed, but by `scan`."""
    counts, indices, values = [], [], []
    for part, threshold, most in zip(_ranges(sizes), thresholds, room, strict=True):
        place = np.full(most, -7, np.int64), np.zeros(most, np.float32)
        arrays = [array[part] for array in operands]
        count = getattr(reference, kernel)(*arrays, threshold, *place, first=part.start)
        counts.append(count)
        indices += place[0][: min(count, most)].tolist()
        values.append(place[1][: min(count, most)].tobytes())
    left = b"" if kernel == "scan" else operands[0].tobytes()
    return Outcome(counts, indices, b"".join(values), left)


def _thresholds(values: Floats, sizes: Sequence[int], shares: Sequence[float]) -> list[float]:
    """Return for each unit the magnitude at its share of the order, which is thus selected."""
    found = []
    for part, share in zip(_ranges(sizes), shares, strict=True):
        ordered = np.sort(np.abs(values[part]))
        found.append(float(ordered[int(share * (ordered.size - 1))]) if ordered.size else 0.0)
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_accumulating_selects_and_leaves_what_the_definition_does(shape: str) -> None:
    start, end, held = (make(shape, sum(SIZES), s) for s in range(3))
    shares = (0.3, 1, 0, 0.5, 0.9, 0, 0.99, 0.9, 0.0)
    thresholds = _thresholds(held + (start - end), SIZES, shares)
    room = [127, 0, 0, 20, 5, 3, 128, 300, 60]
    units = gpu.Units(SIZES, room, DEVICE, block=128)
    there = _there(held)
    selected = units.accumulate_and_select(there, _there(start), _split(end, SIZES), thresholds)
    assert _outcome(units, selected, there) == _expected(
        "accumulate_and_select", (held, start, end), SIZES, thresholds, room
    )


@pytest.mark.parametrize("shape", ["heavy-tailed", "ties", "subnormal"])
def test_adding_progress_selects_and_leaves_what_the_definition_does(shape: str) -> None:
    progress, held = make(shape, sum(SIZES), 0), make(shape, sum(SIZES), 1)
    thresholds = [1e-44, 0.0, 0.0, 1.0, 9.0, 0.0, 2.0, 1e-3, float("inf")]
    units = gpu.Units(SIZES, SIZES, DEVICE, block=128)
    there = _there(held)
    selected = units.add_and_select(there, _there(progress), thresholds)
    assert _outcome(units, selected, there) == _expected(
        "add_and_select", (held, progress), SIZES, thresholds, SIZES
    )


@pytest.mark.parametrize("shape", ["normal", "signed-zeros", "subnormal", "extreme"])
def test_scanning_finds_what_the_definition_finds(shape: str) -> None:
    model, replica = make(shape, sum(SIZES), 0), make(shape, sum(SIZES), 1)
    replica[: sum(SIZES) // 2] = model[: sum(SIZES) // 2]
    thresholds = [0.0, 0.0, 0.0, 1e-44, 0.0, 1.0, 0.25, 0.0, 2.0]
    room = [127, 9, 9, 9, 63, 9, 20, 200, 64]
    units = gpu.Units(SIZES, room, DEVICE, block=128)
    selected = units.scan(_split(model, SIZES), _there(replica), thresholds)
    room = np.minimum(room, SIZES).tolist()
    assert _outcome(units, selected) == _expected("scan", (model, replica), SIZES, thresholds, room)


def test_at_threshold_zero_everything_that_differs_is_found() -> None:
    model = make("normal", 5000, 0)
    replica = model.copy()
    differs = [0, 31, 32, 2047, 2048, 4999]
    replica[differs] = np.nextafter(model[differs], np.float32(np.inf))
    units = gpu.Units([5000], [9], DEVICE)
    found = _outcome(units, units.scan(_there(model), _there(replica), [0.0]))
    assert found.indices == differs


def test_more_blocks_than_are_gathered_together_come_in_order() -> None:
    size = 128 * 270 + 5  # 256 blocks of 4 words make a tile of the second pass
    held, progress = make("sparse", size, 0), np.zeros(size, np.float32)
    units = gpu.Units([size], [size], DEVICE, block=128)
    found = _outcome(units, units.add_and_select(_there(held), _there(progress), [0.5]))
    assert found.indices == np.flatnonzero(np.abs(held) >= 0.5).tolist()


@pytest.mark.parametrize("block", [256, 2048])
def test_the_size_of_blocks_changes_nothing(block: int) -> None:
    sizes = (2048, 2600, 3)
    start, end, held = (make("normal", sum(sizes), s) for s in range(3))
    thresholds, room = [4.0, 3.5, 0.0], [40, 30, 3]
    units = gpu.Units(sizes, room, DEVICE, block=block)
    there = _there(held)
    for _ in range(2):  # the second call meets what the first one left
        selected = units.accumulate_and_select(there, _there(start), _there(end), thresholds)
        expected = _expected("accumulate_and_select", (held, start, end), sizes, thresholds, room)
        assert _outcome(units, selected, there) == expected


def test_operands_may_start_anywhere_and_nothing_around_them_is_written() -> None:
    size, room = 389, 50
    whole = [make("normal", size + 9, s) for s in range(3)]
    there = [_there(array) for array in whole]
    held, start, end = (t[i : i + size] for i, t in zip((1, 4, 3), there, strict=True))
    units = gpu.Units([size], [room], DEVICE, block=128)
    indices = torch.full((room + 300,), -7, dtype=torch.int32, device=DEVICE)
    values = torch.full((room + 300,), -7.0, device=DEVICE)
    units._indices, units._values = indices[:room], values[:room]
    selected = units.accumulate_and_select(held, start, end, [0.1])
    operands = [w[i : i + size] for i, w in zip((1, 4, 3), whole, strict=True)]
    expected = _expected("accumulate_and_select", operands, [size], [0.1], [room])
    assert expected.counts[0] > room
    assert _outcome(units, selected, held.contiguous()) == expected
    assert (indices[room:] == -7).all()
    assert (values[room:] == -7.0).all()
    assert there[0].cpu().numpy().tobytes() == whole[0].tobytes()


def test_what_is_not_finite_is_larger_than_any_threshold() -> None:
    held = make("normal", 200, 0)
    held[[3, 130]], held[[64, 199]] = np.nan, (np.inf, -np.inf)
    start, end = np.zeros(200, np.float32), np.zeros(200, np.float32)
    end[7] = np.nan
    units = gpu.Units([200], [9], DEVICE, block=128)
    there = _there(held)
    selected = units.accumulate_and_select(there, _there(start), _there(end), [float("inf")])
    assert _outcome(units, selected).indices == [3, 7, 64, 130, 199]
    held[7] = np.nan
    np.testing.assert_array_equal(there.cpu().numpy(), held)
    np.testing.assert_array_equal(selected.values[:5].cpu().numpy(), held[[3, 7, 64, 130, 199]])


@pytest.mark.parametrize("sizes", [(), (0,), (0, 0, 0)])
def test_a_model_without_entries_selects_nothing(sizes: tuple[int, ...]) -> None:
    units = gpu.Units(sizes, sizes, DEVICE)
    nothing = torch.zeros(0, device=DEVICE)
    selected = units.accumulate_and_select(nothing, nothing, nothing, [0.0] * len(sizes))
    assert _outcome(units, selected) == Outcome([0] * len(sizes), [], b"", b"")


def test_places_of_more_units_than_are_placed_together_follow_each_other() -> None:
    rng = np.random.default_rng(0)
    per_unit, room = rng.integers(0, 4, 11), rng.integers(0, 30, 11)
    per_block = rng.integers(0, 20, per_unit.sum())
    before = np.concatenate(([0], np.cumsum(per_block)))
    first = np.concatenate(([0], np.cumsum(per_unit)))
    counts = torch.zeros(11, dtype=torch.int64, device=DEVICE)
    places = torch.zeros(2, 11, dtype=torch.int64, device=DEVICE)
    tables = [torch.from_numpy(t).to(DEVICE) for t in (before, first, room)]
    gpu_passes.place_units[(1,)](*tables, counts, places, 11, CHUNK=4, enable_fp_fusion=False)
    wanted = np.diff(before[first])
    stops = np.cumsum(np.minimum(wanted, room))
    assert counts.tolist() == wanted.tolist()
    assert places[1].tolist() == stops.tolist()
    starts = stops - np.minimum(wanted, room)
    assert places[0].tolist() == (starts - before[first[:-1]]).tolist()


@pytest.mark.parametrize("shape", SHAPES)
def test_exact_selection_is_that_of_the_definition(shape: str) -> None:
    for size in (0, 1, 65, 577):
        values = make(shape, size, 0)
        for k in {0, 1, size // 100, size // 3, size}:
            if k > size:
                continue
            found = gpu.exact_top_k(_there(values), k)
            assert found.tolist() == top_k_indices(torch.from_numpy(values), k).tolist()


def test_exact_selection_takes_nan_first_and_by_place() -> None:
    values = np.array([1, np.nan, np.inf, -np.nan, 2, 0], np.float32)
    values.view(np.uint32)[3] |= 0x3FFFFF  # another payload
    found = [gpu.exact_top_k(_there(values), k).tolist() for k in (1, 2, 3, 4, 6)]
    assert found == [[1], [1, 3], [1, 2, 3], [1, 2, 3, 4], [0, 1, 2, 3, 4]]


def test_replaced_units_stand_where_the_others_stood() -> None:
    sizes = (4, 3, 0, 5, 2)
    held = np.arange(1, 15, dtype=np.float32)
    units = gpu.Units(sizes, (4, 2, 0, 5, 2), DEVICE, block=128)
    zeros = torch.zeros(14, device=DEVICE)
    selected = units.add_and_select(_there(held), zeros, [3.0, 0.0, 0.0, 99.0, 99.0])
    (counts,) = gpu.to_host(selected.counts).wait()
    assert units.offsets(counts) == [0, 2, 4, 4, 4, 4]
    redone = {
        3: (torch.tensor([1, 4], device=DEVICE), torch.tensor([9.0, 12.0], device=DEVICE)),
        0: (torch.tensor([0], device=DEVICE), torch.tensor([1.0], device=DEVICE)),
    }
    indices, values = units.assemble(selected, counts, redone)
    assert indices.tolist() == [0, 4, 5, 8, 11]
    assert values.tolist() == [1, 5, 6, 9, 12]
    assert indices.dtype == torch.int32


def test_a_step_selects_what_the_tracked_selector_selects() -> None:
    """Launch all, wait once, redo what is off: the worker's step."""
    sizes, density, dense_below = (700, 9, 1000, 130), 0.05, 100
    wanted, ranges = [35, 9, 50, 7], _ranges(sizes)
    room = [2 * k for k in wanted]
    units = gpu.Units(sizes, room, DEVICE, block=256)
    selector = TrackedSelector(len(sizes), dense_below)
    velocity = torch.zeros(sum(sizes), device=DEVICE)
    mirror = torch.zeros(sum(sizes))
    redone_in_all = 0
    for step in range(5):
        scale = np.float32(40.0 if step == 3 else 1.0)  # a jump, after which thresholds are off
        start = make("heavy-tailed", sum(sizes), step) * scale
        end = make("normal", sum(sizes), 100 + step)
        tracked = selector.state()[:, 0].tolist()
        dense = [n < dense_below for n in sizes]
        thresholds = [
            0.0 if whole else t or float("inf") for t, whole in zip(tracked, dense, strict=True)
        ]
        selected = units.accumulate_and_select(
            velocity, _there(start), _split(end, sizes), thresholds
        )
        (counts,) = gpu.to_host(selected.counts).wait()
        redone = {}
        for unit, count in enumerate(counts.tolist()):
            if not dense[unit] and not wanted[unit] / 4 <= count <= 2 * wanted[unit]:
                part = velocity[ranges[unit]]
                chosen = gpu.exact_top_k(part, wanted[unit])
                redone[unit] = (chosen, part[chosen])
        redone_in_all += len(redone)
        indices, values = units.assemble(selected, counts, redone)
        mirror += torch.from_numpy(start - end)
        expected = torch.cat(
            [selector.select(mirror[p], u, density) + p.start for u, p in enumerate(ranges)]
        )
        assert indices.tolist() == expected.tolist()
        assert values.tolist() == mirror[expected].tolist()
        velocity[indices] = 0.0
        mirror[expected] = 0.0
    assert 3 < redone_in_all < 3 * 5


def test_a_copy_on_the_host_does_not_change_any_more() -> None:
    source = torch.arange(5.0, device=DEVICE)
    (copy,) = gpu.to_host(source).wait()
    source.zero_()
    assert copy.tolist() == [0, 1, 2, 3, 4]
    assert copy.device.type == "cpu"
    assert gpu.to_host().wait() == ()


@pytest.mark.gpu
def test_a_copy_beside_other_work_holds_what_there_was_before() -> None:
    source = torch.arange(1 << 22, device=DEVICE)
    copy = gpu.to_host(source, stream=torch.cuda.Stream())
    busy = torch.rand(1 << 22, device=DEVICE).sort()
    assert torch.equal(copy.wait()[0], torch.arange(1 << 22))
    assert copy.wait()[0].is_pinned()
    assert busy.values.is_cuda


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(10, dtype=torch.float64),
        torch.zeros(9),
        torch.zeros(20)[::2],
        [torch.zeros(4)],
        [torch.zeros(4), torch.zeros(5)],
    ],
)
def test_operands_that_would_be_misread_are_refused(wrong: Tensor | list[Tensor]) -> None:
    units = gpu.Units([4, 6], [4, 6], DEVICE, block=128)
    good = torch.ones(10, device=DEVICE)
    bad = [t.to(DEVICE) for t in wrong] if isinstance(wrong, list) else wrong.to(DEVICE)
    for left, right in ((good, bad), (bad, good)):
        with pytest.raises(ConfigError):
            units.accumulate_and_select(good, left, right, [0.0, 0.0])
        with pytest.raises(ConfigError):
            units.scan(left, right, [0.0, 0.0])
    assert (good == 1.0).all()


@pytest.mark.parametrize("thresholds", [[1.0], [1.0, -1.0], [float("nan"), 1.0]])
def test_thresholds_that_are_none_are_refused(thresholds: list[float]) -> None:
    units = gpu.Units([1, 2], [1, 2], DEVICE)
    good = torch.ones(3, device=DEVICE)
    with pytest.raises(ConfigError, match="none negative"):
        units.add_and_select(good, good.clone(), thresholds)
    assert (good == 1.0).all()


@pytest.mark.parametrize(
    ("sizes", "room", "block"), [([1], [1, 2], 128), ([-1], [1], 128), ([1], [1], 96)]
)
def test_units_that_do_not_fit_together_are_refused(
    sizes: list[int], room: list[int], block: int
) -> None:
    with pytest.raises(ConfigError):
        gpu.Units(sizes, room, DEVICE, block=block)
