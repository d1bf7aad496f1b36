"""A record's differences are those of comparing everything, however little is compared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from dgs.config import Values
from dgs.kernels import reference
from dgs.shard import Shard
from dgs.space import ParameterSpace
from dgs.tracker import Record
from dgs.view import Part, Slab, View
from tests.helpers.records import PlainRecord
from tests.helpers.sites import space_of

FloatArray = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]
VALUES: list[Values] = list(get_args(Values))
SPACE = space_of([(40, 50), (), (700,), (0, 3), (30, 20), (9,), (1200,)], [(40,)])


class Pair:
    """A session's record, and its definition, which must agree bit for bit."""

    def __init__(self, part: Part, shard: Shard, config: dict[str, Any]) -> None:
        """Open both with the shard's model."""
        self.part = part
        self.record = Record(part, shard.model, **config)
        self.record.follow(shard)
        self.plain = PlainRecord(part, shard.model, **config)

    def exchange(self, shard: Shard, indices: Int64Array, values: FloatArray) -> int:
        """Apply an update of the session's part, answer it, and compare."""
        where = self.part.coordinates
        places = indices + where.start if isinstance(where, slice) else where[indices]
        assert shard.apply(places, values) == -1
        got, expected = self.record.advance(), self.plain.advance(shard.model)
        assert got == expected
        self.check()
        return got.count

    def check(self) -> None:
        """Compare what the worker has, for a hash or a pull."""
        assert self.record.replica.tobytes() == self.plain.replica.tobytes()


def parts(space: ParameterSpace, num_shards: int) -> Iterator[tuple[Part, Part, Part]]:
    """Yield for each shard the part of a whole view, and of two halves cut along a column."""
    whole = View.whole(space)
    left, right = [], []
    for i, spec in enumerate(space.tensors):
        if len(spec.shape) == 2 and spec.size:
            rows, columns = spec.shape
            left.append(Slab(i, (0, 0), (rows, columns // 2)))
            right.append(Slab(i, (0, columns // 2), (rows, columns - columns // 2)))
        else:
            left.append(Slab(i, (0,) * len(spec.shape), spec.shape))
    views = whole, View(space, tuple(left)), View(space, tuple(right))
    for start, stop in space.shard_ranges(num_shards):
        a, b, c = (Part(view, start, stop) for view in views)
        yield a, b, c


def draw_update(
    rng: np.random.Generator, size: int, share: float, scale: float
) -> tuple[Int64Array, FloatArray]:
    """Draw a sparse update."""
    indices = np.flatnonzero(rng.random(size) < share)
    return indices, (scale * rng.standard_normal(indices.size)).astype(np.float32)


@seed(0)
@settings(max_examples=150, deadline=None)
@given(
    number=st.integers(0, 1 << 20),
    density=st.sampled_from([0.004, 0.02, 0.3, 1.0]),
    selection=st.sampled_from(["exact", "tracked"]),
    values=st.sampled_from(VALUES),
    num_shards=st.sampled_from([1, 1, 3]),
)
def test_any_schedule_is_answered_as_if_everything_was_compared(
    number: int, density: float, selection: str, values: Values, num_shards: int
) -> None:
    rng = np.random.default_rng(number)
    config = {
        "density": density,
        "selection": selection,
        "dense_below": int(rng.choice([0, 32, 800])),
        "values": values,
    }
    for choices in parts(SPACE, num_shards):
        size = choices[0].stop - choices[0].start
        shard = Shard(rng.standard_normal(size).astype(np.float32))
        live = [Pair(choices[int(rng.integers(3))], shard, config) for _ in range(3)]
        straggler = Pair(choices[0], shard, config)
        share = float(rng.choice([0.0005, 0.003, 0.2]))
        last = None
        for step in range(30):
            scale = 1.0 if step < 15 else float(rng.choice([1.0, 1e3, 1e-3]))
            pair = live[int(rng.integers(len(live)))]
            if rng.random() < 0.1:  # one leaves, another one joins
                live.remove(pair)
                pair = Pair(choices[int(rng.integers(3))], shard, config)
                live.append(pair)
            if last is not None and last[0] is pair and rng.random() < 0.5:
                update = last[1], -last[2]  # cancels the one before, exactly or nearly
            else:
                update = draw_update(rng, pair.part.size, share, scale)
            pair.exchange(shard, *update)
            last = pair, *update
            if step % 14 == 13:
                straggler.check()
                straggler.exchange(shard, *draw_update(rng, straggler.part.size, share, scale))
        for pair in live:
            pair.check()


def sparse_world(size: int, **config: Any) -> tuple[Shard, list[Pair], np.random.Generator]:
    """Build a shard with 4 sessions, to which updates come that are small beside the model."""
    rng = np.random.default_rng(3)
    space = space_of([(size // 2,), (100,), (size // 2 - 100,)])
    shard = Shard(rng.standard_normal(size).astype(np.float32))
    whole = Part(View.whole(space), 0, size)
    given = {"selection": "tracked", "dense_below": 32, "values": "float32", **config}
    return shard, [Pair(whole, shard, given) for _ in range(4)], rng


@pytest.mark.parametrize("selection", ["exact", "tracked"])
@pytest.mark.parametrize("values", ["float32", "int8", "sign"])
def test_sparse_traffic_is_answered_without_comparing_the_model(
    selection: str, values: str
) -> None:
    size, steps = 60_000, 240
    shard, pairs, rng = sparse_world(size, density=0.001, selection=selection, values=values)
    for step in range(steps):
        pairs[step % 4].exchange(shard, *draw_update(rng, size, 0.001, 1.0))
    compared = sum(p.record.compared for p in pairs)
    assert compared < 0.3 * steps * size
    assert sum(p.record.walked for p in pairs) > 0.8 * steps * 4 * 0.001 * size


@pytest.mark.parametrize("selection", ["exact", "tracked"])
@pytest.mark.parametrize("factor", [1e3, 1e-3])
def test_a_jump_of_the_updates_scale_changes_no_reply(selection: str, factor: float) -> None:
    size = 20_000
    shard, pairs, rng = sparse_world(size, density=0.001, selection=selection)
    for step in range(120):
        scale = factor if 40 <= step < 80 else 1.0
        pairs[step % 4].exchange(shard, *draw_update(rng, size, 0.001, scale))
    assert sum(p.record.walked for p in pairs) > 0


def test_dense_traffic_is_compared_in_one_pass() -> None:
    size = 20_000
    shard, pairs, rng = sparse_world(size, density=0.01)
    for step in range(40):
        pairs[step % 4].exchange(shard, *draw_update(rng, size, 0.05, 1.0))
    assert sum(p.record.walked for p in pairs) == 0
    assert sum(p.record.compared for p in pairs) <= 40 * size


def test_a_session_that_the_log_does_not_reach_back_to_is_compared() -> None:
    size = 20_000
    shard, pairs, rng = sparse_world(size, density=0.001)
    for step in range(400):
        pairs[step % 3].exchange(shard, *draw_update(rng, size, 0.001, 1.0))
    assert not shard.log.reaches(pairs[3].record.version)
    before = pairs[3].record.compared
    pairs[3].exchange(shard, *draw_update(rng, size, 0.001, 1.0))
    assert pairs[3].record.compared == before + size


@pytest.mark.parametrize("share", [0.001, 0.5])
def test_what_a_worker_has_is_a_version_number_where_replies_bring_everything(
    share: float,
) -> None:
    size = 20_000
    shard, pairs, rng = sparse_world(size, density=1.0)
    for step in range(60):
        pair = pairs[step % 3]  # the fourth one waits, until the log is cut
        pair.exchange(shard, *draw_update(rng, size, share, 1.0))
        pairs[3].check()
        pairs[(step + 1) % 3].check()
    if share < 0.01:
        assert all(p.record.nbytes < 1000 for p in pairs)
    count = pairs[3].exchange(shard, *draw_update(rng, size, share, 1.0))
    assert count > share * size
    assert all(p.record.nbytes <= 4 * size + 1000 for p in pairs)


def test_updates_that_cancel_exactly_are_in_no_reply() -> None:
    for density in (0.01, 1.0):
        shard, pairs, _ = sparse_world(2000, density=density, selection="exact")
        shard.model[:] = np.round(shard.model * 64) / np.float32(64)
        for pair in pairs:
            pair.plain.replica[:] = shard.model
            if pair.record._replica is not None:
                pair.record._replica[:] = shard.model
        indices, values = np.arange(3, 9), np.full(6, 0.25, np.float32)
        assert shard.apply(indices, values) == -1
        assert pairs[0].exchange(shard, indices, -values) == 0
        assert pairs[1].exchange(shard, indices[:2], values[:2]) == 2


def test_memory_of_a_session_is_a_replica_and_a_mebibyte() -> None:
    size = 1_000_000
    shard, pairs, rng = sparse_world(size, density=0.1, values="int8", selection="exact")
    for step in range(12):
        indices, values = draw_update(rng, size, 0.002, 1.0)
        shard.apply(indices, values)
        pairs[step % 4].record.advance()
    for pair in pairs:
        assert pair.record.walked > 0
        assert pair.record.nbytes <= 4 * size + (1 << 20)
    assert shard.log.nbytes <= size / 4


def test_the_log_is_bounded_by_a_replica_while_sessions_need_it() -> None:
    size = 40_000
    shard, pairs, rng = sparse_world(size, density=1.0)
    for _ in range(300):
        shard.apply(*draw_update(rng, size, 0.01, 1.0))
        assert shard.log.nbytes <= 4 * size
    assert shard.log.nbytes <= size / 4  # all replicas were made before it was cut
    for pair in pairs:
        assert pair.record.nbytes >= 4 * size
        pair.exchange(shard, *draw_update(rng, size, 0.001, 1.0))


@pytest.mark.parametrize("changed", [{"density": 0.01}, {"values": "int8"}])
def test_settings_that_need_a_replica_bring_it_back(changed: dict[str, Any]) -> None:
    shard, pairs, rng = sparse_world(20_000, density=1.0)
    pair = pairs[0]
    for _ in range(3):
        pairs[1].exchange(shard, *draw_update(rng, 20_000, 0.002, 1.0))
    config = {"density": 1.0, "values": "float32", **changed}
    pair.record.configure(selection="tracked", dense_below=32, **config)
    pair.plain.density, pair.plain.values = config["density"], config["values"]
    pair.check()
    for _ in range(3):
        pair.exchange(shard, *draw_update(rng, 20_000, 0.002, 1.0))


def test_a_model_given_with_negative_zeros_has_none() -> None:
    shard = Shard(np.array([-0.0, 1.0, 0.0], np.float32))
    assert not np.signbit(shard.model).any()


def test_compiled_and_plain_loops_give_the_same_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    replies = []
    for compiled_from in (0, 1 << 60):
        monkeypatch.setattr("dgs.kernels.COMPILED_FROM", compiled_from)
        for density, values in ((0.002, "float32"), (0.002, "int4"), (1.0, "float32")):
            shard, pairs, rng = sparse_world(30_000, density=density, values=values)
            for step in range(40):
                shard.apply(*draw_update(rng, 30_000, 0.002, 1.0))
                replies.append(pairs[step % 4].record.advance())
    assert replies[: len(replies) // 2] == replies[len(replies) // 2 :]
    assert reference.NAME == "reference"
