"""Ranks stop together: a few numbers before the first exchange, the reason only if there is one.

A rank whose input is bad must not leave the others waiting in a collective that it will never
join. So all of them tell each other how they are before they exchange anything else; if one is not
well, all learn which and why, and raise the same error with the same words. In the same exchange
they compare what later collectives take for granted, such as types and settings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from moe.errors import CollectiveError, LayoutError, MoeError, RoutingError
from moe.parallel.collectives import all_reduce_sum, gather_counts, largest
from moe.parallel.groups import Group

__all__ = ["Fact", "together"]

Result = TypeVar("Result")

KINDS: tuple[type[MoeError], ...] = (CollectiveError, LayoutError, RoutingError)
MESSAGE_BYTES = 512
UNTOLD = -(2**62)


@dataclass(frozen=True, slots=True)
class Fact:
    """A number that ranks have to have in common.

    Args:
        name: what it is, for people.
        value: this rank's, in [-2**61, 2**61].
        remedy: what to do where it differs.
        block: ranks with the same `block` have to agree, others need not.
        blocks: how many such parts there are; the same on every rank.
        words: the number as text.
        kind: what is raised.
    """

    name: str
    value: int
    remedy: str
    block: int = 0
    blocks: int = 1
    words: Callable[[int], str] = str
    kind: type[MoeError] = RoutingError

    def told(self) -> list[int]:
        """Return numbers whose largest over all ranks show whether the ranks agree."""
        numbers = [UNTOLD] * (2 * self.blocks)
        numbers[2 * self.block : 2 * self.block + 2] = [self.value, -self.value]
        return numbers


def together(
    work: Callable[[], Result], group: Group, device: torch.device, facts: Sequence[Fact] = ()
) -> Result:
    """Return the result of local work if it succeeded on every rank of a group.

    Args:
        work: is done on this rank; communicates with nobody.
        group: the ranks that stop together.
        device: where the group's collectives want their tensors.
        facts: what the ranks have to have in common; as many and as wide on every rank. The first
            that differs is told.

    Raises:
        MoeError: the work failed somewhere; names the first such rank and what it said, and is the
            same on every rank. A `LayoutError` or `RoutingError` is passed on as such, all else as
            a `CollectiveError`. Or the work is done everywhere, and a fact differs.
    """
    if group.size == 1:
        return work()
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
    told = [number for fact in facts for number in fact.told()]
    worst, *highest = largest([_code(failure, group), *told], group, device)
    if worst:
        kind, behind = divmod(worst - 1, group.size)
        first = group.size - 1 - behind
        words = _told(str(failure) if first == group.index else "", group, device)
        raise KINDS[kind](f"rank {group.ranks[first]}: {words}") from failure
    for fact in facts:
        mine, highest = highest[: 2 * fact.blocks], highest[2 * fact.blocks :]
        if any(high != -low for high, low in zip(mine[::2], mine[1::2], strict=True)):
            raise fact.kind(_difference(fact, group, device))
    return result


def _difference(fact: Fact, group: Group, device: torch.device) -> str:
    """Return which two ranks differ in a fact, the same on every rank."""
    told = gather_counts(torch.tensor([fact.block, fact.value], device=device), group).tolist()
    seen: dict[int, tuple[int, int]] = {}
    for rank, (block, value) in zip(group.ranks, told, strict=True):
        first, theirs = seen.setdefault(block, (rank, value))
        if theirs != value:
            return (
                f"the ranks differ in {fact.name}: {fact.words(theirs)} on rank {first} and "
                f"{fact.words(value)} on rank {rank}; {fact.remedy}"
            )
    raise AssertionError("ranks that differ were told to")


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
