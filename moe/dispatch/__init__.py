"""Ways of bringing tokens to the ranks that hold their experts, and back."""

from __future__ import annotations

from typing import Any, Literal

from moe.dispatch.allgather import AllGatherDispatcher
from moe.dispatch.alltoall import AllToAllDispatcher
from moe.dispatch.base import Dispatched, Dispatcher, Plan, combine, dispatch
from moe.dispatch.local import LocalDispatcher
from moe.errors import LayoutError
from moe.parallel.groups import ProcessGroups

__all__ = [
    "AllGatherDispatcher",
    "AllToAllDispatcher",
    "Dispatched",
    "Dispatcher",
    "Kind",
    "LocalDispatcher",
    "Plan",
    "combine",
    "dispatch",
    "make_dispatcher",
]

Kind = Literal["auto", "local", "alltoall", "allgather"]
"""``auto`` is ``local`` where every expert is on this rank, whole, and ``alltoall`` elsewhere."""


def make_dispatcher(
    groups: ProcessGroups, num_experts: int, kind: Kind = "auto", *, weights_travel: bool = False
) -> Dispatcher[Any]:
    """Return the dispatcher of a mapping.

    Args:
        groups: of the mapping.
        num_experts: of the layer, over all ranks.
        kind: which one.
        weights_travel: whether the experts apply the weights where tokens are sent row by row; see
            `AllToAllDispatcher`. With the other dispatchers they always do.

    Raises:
        LayoutError: the experts cannot be shared out, or are not all here for ``"local"``.

    Example:
        >>> from moe.parallel.groups import single
        >>> type(make_dispatcher(single(), 8)).__name__
        'LocalDispatcher'
    """
    groups.dims.local_experts(num_experts)
    alone = groups["ep_etp"].size == 1
    if kind == "local" and not alone:
        raise LayoutError(
            f"the experts lie on ep*etp = {groups.dims.ep}*{groups.dims.etp} ranks, which the "
            f"dispatcher 'local' does not reach; use 'auto' or 'alltoall'"
        )
    if kind == "allgather":
        return AllGatherDispatcher(groups, num_experts)
    if kind == "local" or (kind == "auto" and alone):
        return LocalDispatcher()
    return AllToAllDispatcher(groups, num_experts, weights_travel=weights_travel)
