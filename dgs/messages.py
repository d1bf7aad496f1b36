"""Control messages: from the service's protobuf types to the library's own, and back.

What a peer sends is checked here once: a message that does not parse, or that names what cannot
be, never reaches the state machine.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from dgs._proto import parameter_server_pb2 as pb
from dgs.errors import MalformedError
from dgs.space import ParameterSpace, TensorSpec
from dgs.view import Slab, View

__all__ = [
    "parse",
    "space_from_message",
    "space_to_message",
    "views_from_message",
    "views_to_message",
]

M = TypeVar("M", bound=Message)


def parse(kind: type[M], data: bytes) -> M:
    """Parse a control message.

    Raises:
        MalformedError: `data` is not a message of this kind.
    """
    message = kind()
    try:
        message.ParseFromString(data)
    except (DecodeError, ValueError) as e:  # ValueError: a nesting or size limit of the library
        raise MalformedError(f"the request is not a {kind.DESCRIPTOR.name} message") from e
    return message


def space_to_message(space: ParameterSpace) -> list[pb.TensorSpec]:
    """List a model's tensors as the service spells them."""
    return [
        pb.TensorSpec(name=t.name, shape=t.shape, buffer=t.buffer, aliases=t.aliases)
        for t in space.tensors
    ]


def space_from_message(tensors: Iterable[pb.TensorSpec]) -> ParameterSpace:
    """Rebuild a model's index space.

    Raises:
        ViewError: the tensors do not make a model; see `ParameterSpace`.
    """
    return ParameterSpace(
        tuple(TensorSpec(t.name, tuple(t.shape), t.buffer, tuple(t.aliases)) for t in tensors)
    )


def views_to_message(views: Iterable[View]) -> list[pb.View]:
    """List the members' views as the service spells them."""
    return [
        pb.View(slabs=[pb.Slab(tensor=s.tensor, offset=s.offset, shape=s.shape) for s in v.slabs])
        for v in views
    ]


def views_from_message(space: ParameterSpace, views: Iterable[pb.View]) -> list[View]:
    """Rebuild the members' views; none at all means one member that holds everything.

    Raises:
        ViewError: a slab does not fit the model; see `View`.
    """
    listed = [
        View(space, tuple(Slab(s.tensor, tuple(s.offset), tuple(s.shape)) for s in v.slabs))
        for v in views
    ]
    return listed or [View.whole(space)]
