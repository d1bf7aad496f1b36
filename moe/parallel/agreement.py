"""Ranks stop together: one number before the first exchange, the reason only when there is one.

A rank whose input is bad must not leave the others waiting in a collective that it will never
join. So all of them tell each other how they are before they exchange anything else; if one is not
well, all learn which and why, and raise the same error with the same words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from moe.errors import CollectiveError, LayoutError, MoeError, RoutingError
from moe.parallel.collectives import all_reduce_sum, most_severe
from moe.parallel.groups import Group

__all__ = ["together"]

Result = TypeVar("Result")

KINDS: tuple[type[MoeError], ...] = (CollectiveError, LayoutError, RoutingError)
MESSAGE_BYTES = 512


def together(work: Callable[[], Result], group: Group, device: torch.device) -> Result:
    """Return the result of local work if it succeeded on every rank of a group.

    Args:
        work: is done on this rank; communicates with nobody.
        group: the ranks that stop together.
        device: where the group's collectives want their tensors.

    Raises:
        MoeError: the work failed somewhere; names the first such rank and what it said, and is the
            same on every rank. A `LayoutError` or `RoutingError` is passed on as such, all else as
            a `CollectiveError`.
    """
    if group.size == 1:
        return work()
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
    worst = most_severe(_code(failure, group), group, device)
    if worst:
        kind, behind = divmod(worst - 1, group.size)
        first = group.size - 1 - behind
        words = _told(str(failure) if first == group.index else "", group, device)
        raise KINDS[kind](f"rank {group.ranks[first]}: {words}") from failure
    return result


def _code(failure: Exception | None, group: Group) -> int:
    """Return 0, or a number that is larger for a more telling failure and for a lower rank."""
    if failure is None:
        return 0
    kind = next((k for k, known in enumerate(KINDS) if isinstance(failure, known)), 0)
    return 1 + kind * group.size + (group.size - 1 - group.index)


def _told(words: str, group: Group, device: torch.device) -> str:
    """Return what the one rank that has something to say says."""
    said = words.encode("ascii", "backslashreplace")[:MESSAGE_BYTES]
    letters = torch.zeros(MESSAGE_BYTES, dtype=torch.int32)
    letters[: len(said)] = torch.tensor(list(said), dtype=torch.int32)
    letters = all_reduce_sum(letters.to(device), group)
    return bytes(letter for letter in letters.tolist() if letter).decode("ascii")
