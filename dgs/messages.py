"""Control messages: from the service's protobuf types to the library's own, and back.

What a peer sends is checked here once: a message that does not parse, or that names what cannot
be, never reaches the state machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from dgs._proto import parameter_server_pb2 as pb
from dgs.errors import MalformedError, ViewError
from dgs.space import (
    MAX_MEMBERS,
    MAX_NAMES,
    MAX_NUMBERS,
    MAX_RANK,
    MAX_SLABS,
    ParameterSpace,
    TensorSpec,
)
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


def space_from_message(tensors: Sequence[pb.TensorSpec]) -> ParameterSpace:
    """Rebuild a model's index space.

    Raises:
        ViewError: the tensors do not make a model; see `ParameterSpace`.
    """
    names = len(tensors) + sum(len(t.aliases) for t in tensors)
    if names > MAX_NAMES:
        raise ViewError(f"the model has {names} names; at most {MAX_NAMES} are possible")
    specs = []
    for t in tensors:
        if len(t.shape) > MAX_RANK:  # before they are copied: there may be millions
            raise ViewError(
                f"tensor {t.name[:80]!r} has {len(t.shape)} dimensions; at most {MAX_RANK} are "
                "possible"
            )
        specs.append(TensorSpec(t.name, tuple(t.shape), t.buffer, tuple(t.aliases)))
    return ParameterSpace(tuple(specs))


def views_to_message(views: Iterable[View]) -> list[pb.View]:
    """List the members' views as the service spells them."""
    return [
        pb.View(slabs=[pb.Slab(tensor=s.tensor, offset=s.offset, shape=s.shape) for s in v.slabs])
        for v in views
    ]


def views_from_message(space: ParameterSpace, views: Sequence[pb.View]) -> list[View]:
    """Rebuild the members' views; none at all means one member that holds everything.

    Raises:
        ViewError: a slab does not fit the model, see `View`; or there are too many.
    """
    if len(views) > MAX_MEMBERS:
        raise ViewError(f"the worker has {len(views)} members; at most {MAX_MEMBERS} are possible")
    count = sum(len(v.slabs) for v in views)
    if count > MAX_SLABS:
        raise ViewError(f"the views list {count} slabs; at most {MAX_SLABS} are possible")
    listed, numbers = [], 0
    for v in views:
        slabs = []
        for s in v.slabs:
            offset, shape = s.offset, s.shape
            if len(offset) > MAX_RANK or len(shape) > MAX_RANK:  # before they are copied
                raise ViewError(
                    f"a slab of tensor {s.tensor} has {len(offset)} first indices and "
                    f"{len(shape)} extents; at most {MAX_RANK} are possible"
                )
            numbers += len(shape)
            slabs.append(Slab(s.tensor, tuple(offset), tuple(shape)))
        if numbers > MAX_NUMBERS:
            raise ViewError(f"the views list more than {MAX_NUMBERS} extents")
        listed.append(View(space, tuple(slabs)))
    return listed or [View.whole(space)]
