"""A request to join, held to everything that does not depend on the server's state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self, cast, get_args

from dgs._proto import parameter_server_pb2 as pb
from dgs.config import Selection, ServerConfig, Values, is_worker_name
from dgs.cover import check_cover
from dgs.errors import MalformedError, ModelMismatchError, TooLargeError
from dgs.frame import WIRE_VERSION
from dgs.messages import space_from_message, views_from_message
from dgs.space import ParameterSpace
from dgs.view import Part, View

__all__ = ["MAX_SHARDS", "Joining"]

MAX_SHARDS: Final = 1024
"""Servers that a model is split over."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Joining:
    """A checked request to join."""

    worker: str
    incarnation: int
    member: int
    shard: int
    num_shards: int
    view: View
    part: Part
    """What the session exchanges with this shard. Nothing of it can fail later; `Part.prepare` may
    take memory in proportion to the shard, so first compare the model with the server's."""
    download_density: float
    values: Values
    selection: Selection
    dense_below: int
    may_initialise: bool
    take_over: bool
    restore: bool
    """Whether the worker brings a saved model for a server that has trained nothing."""
    resume: int
    """Incarnation of the session to continue, 0 for none ..."""
    resume_seqs: range
    """... and the sequence numbers of its last exchange with which it can be."""

    @classmethod
    def from_message(cls, message: pb.JoinRequest, config: ServerConfig | None = None) -> Self:
        """Check everything that does not depend on the server's state.

        Args:
            message: the request.
            config: the server's limits.

        Raises:
            ModelMismatchError: the protocol differs.
            ViewError: the model or the views are impossible, leave gaps or overlap.
            TooLargeError: the model is larger than this server accepts.
            MalformedError: another field is out of range; names it.
        """
        m = message
        _check_fields(m)
        space = space_from_message(m.tensors)
        _check_size(space, m.num_shards, config or ServerConfig())
        views = views_from_message(space, m.views)
        _require(m.member < len(views), "member", f"below {len(views)}, the number of views")
        check_cover(space, views)
        view = views[m.member]
        part = Part(view, *space.shard_ranges(m.num_shards)[m.shard])
        part.prepare_segments()
        return cls(
            worker=m.worker,
            incarnation=m.incarnation,
            member=m.member,
            shard=m.shard,
            num_shards=m.num_shards,
            view=view,
            part=part,
            download_density=m.download_density,
            values=cast(Values, m.values),
            selection=cast(Selection, m.selection),
            dense_below=m.dense_below,
            may_initialise=m.may_initialise,
            take_over=m.take_over,
            resume=m.resume_incarnation,
            resume_seqs=range(m.resume_seq, m.resume_seq + 1 + m.resume_in_flight),
            restore=m.restore,
        )


def _check_fields(m: pb.JoinRequest) -> None:
    """Check what a request says of its worker and of its replies, but not the model."""
    if m.protocol != WIRE_VERSION:
        raise ModelMismatchError(
            f"the worker speaks wire version {m.protocol}, this server {WIRE_VERSION}; "
            "install the same release on both sides"
        )
    _require(is_worker_name(m.worker), "worker", "1 to 128 printable characters")
    _require(m.incarnation > 0, "incarnation", "above 0")
    _require(0 < m.num_shards <= MAX_SHARDS, "num_shards", f"1 to {MAX_SHARDS}")
    _require(m.shard < m.num_shards, "shard", f"below num_shards, which is {m.num_shards}")
    _require(0.0 < m.download_density <= 1.0, "download_density", "a fraction in (0, 1]")
    values, selections = get_args(Values), get_args(Selection)
    _require(m.values in values, "values", "one of " + ", ".join(values))
    _require(m.selection in selections, "selection", "one of " + ", ".join(selections))


def _check_size(space: ParameterSpace, num_shards: int, config: ServerConfig) -> None:
    most = config.max_parameters
    if space.size > most * num_shards:
        raise TooLargeError(
            f"the model has {space.size} values on {num_shards} server(s), each of which accepts "
            f"{most} (ServerConfig.max_parameters); use more servers, or let them accept more"
        )


def _require(condition: bool, name: str, wanted: str) -> None:
    if not condition:
        raise MalformedError(f"the Join request's field {name} is not valid: it must be {wanted}")
