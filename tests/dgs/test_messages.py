"""Control messages survive the way to the wire and back."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgs._proto import parameter_server_pb2 as pb
from dgs.errors import DgsError, MalformedError, ViewError
from dgs.messages import (
    parse,
    space_from_message,
    space_to_message,
    views_from_message,
    views_to_message,
)
from dgs.server import ParameterServer
from dgs.space import ParameterSpace, TensorSpec
from dgs.view import Slab, View

SPACE = ParameterSpace(
    (
        TensorSpec("w", (4, 3), aliases=("tied",)),
        TensorSpec("s", ()),
        TensorSpec("mean", (3,), buffer=True),
    )
)


def test_a_model_and_its_views_come_back_equal() -> None:
    again = pb.JoinRequest.FromString(
        pb.JoinRequest(tensors=space_to_message(SPACE)).SerializeToString()
    )
    assert space_from_message(again.tensors) == SPACE
    views = [View(SPACE, (Slab(0, (1, 0), (2, 3)), Slab(2, (0,), (3,)))), View.whole(SPACE)]
    assert views_from_message(SPACE, views_to_message(views)) == views
    assert views_from_message(SPACE, []) == [View.whole(SPACE)]


def test_bytes_that_are_no_message_are_refused_by_its_name() -> None:
    with pytest.raises(MalformedError, match="not a JoinRequest message"):
        parse(pb.JoinRequest, b"\x0a\xff")


@given(
    st.sampled_from(["Join", "PutModel", "Exchange", "PullModel", "Leave", "Status"]),
    st.binary(max_size=200),
)
def test_random_requests_raise_nothing_but_the_librarys_errors(method: str, data: bytes) -> None:
    server = ParameterServer(run=1)
    with contextlib.suppress(DgsError):
        server.handle(method, data)
    assert not server.ready


@given(st.data())
def test_join_requests_of_random_fields_raise_nothing_but_the_librarys_errors(
    data: st.DataObject,
) -> None:
    numbers = st.integers(0, 2**32 - 1)
    sizes = st.lists(st.sampled_from([0, 1, 2, 7, 2**31, 2**63, 2**64 - 1]), max_size=3)
    request = pb.JoinRequest(
        protocol=1,
        worker=data.draw(st.text(max_size=5)),
        incarnation=data.draw(st.integers(0, 2**64 - 1)),
        member=data.draw(numbers),
        shard=data.draw(st.integers(0, 3)),
        num_shards=data.draw(st.integers(0, 3)),
        download_density=data.draw(st.floats()),
        values="float32",
        selection="exact",
        dense_below=data.draw(numbers),
        may_initialise=data.draw(st.booleans()),
        tensors=[
            pb.TensorSpec(name=f"t{i}", shape=shape, buffer=data.draw(st.booleans()))
            for i, shape in enumerate(data.draw(st.lists(sizes, max_size=3)))
        ],
        views=[
            pb.View(
                slabs=[
                    pb.Slab(tensor=i, offset=data.draw(sizes), shape=data.draw(sizes))
                    for i in range(data.draw(st.integers(0, 2)))
                ]
            )
            for _ in range(data.draw(st.integers(0, 2)))
        ],
    )
    server = ParameterServer(run=1)
    with contextlib.suppress(DgsError):
        server.handle("Join", request.SerializeToString())
    assert not server.ready


def test_lists_of_millions_of_numbers_are_refused_before_they_are_copied() -> None:
    long = [1] * 10**6
    with pytest.raises(ViewError, match="tensor 'w' has 1000000 dimensions; at most 64"):
        space_from_message([pb.TensorSpec(name="w", shape=long)])
    tied = pb.TensorSpec(name="w", aliases=["v"] * (5 * 10**5))
    with pytest.raises(ViewError, match="the model has 1500003 names"):
        space_from_message([tied] * 3)
    for offset, shape in ((long, [4, 3]), ([0, 0], long)):
        slab = pb.Slab(tensor=0, offset=offset, shape=shape)
        with pytest.raises(ViewError, match=r"a slab of tensor 0 has .* at most 64 are possible"):
            views_from_message(SPACE, [pb.View(slabs=[slab])])


def test_more_views_or_slabs_than_a_worker_can_have_are_refused() -> None:
    with pytest.raises(ViewError, match="the worker has 65537 members; at most 65536"):
        views_from_message(SPACE, [pb.View()] * (2**16 + 1))
    full = pb.View(slabs=[pb.Slab(tensor=1)] * 2**12)
    with pytest.raises(ViewError, match="the views list 266240 slabs; at most 262144"):
        views_from_message(SPACE, [full] * 65)
    flat = ParameterSpace((TensorSpec("w", (1,) * 64), TensorSpec("v", (1,) * 64)))
    view = pb.View(slabs=[pb.Slab(tensor=i, offset=[0] * 64, shape=[1] * 64) for i in (0, 1)])
    with pytest.raises(ViewError, match="more than 4194304 extents"):
        views_from_message(flat, [view] * (2**15 + 1))
