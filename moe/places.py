"""Where tokens stand, which decides who sees whom. Nothing is assumed to be contiguous.

Under context parallelism a rank may hold the head and the tail of a sequence; in a packed batch a
row holds several documents; in a padded one, not every token is one. So positions, documents and
real tokens are told, never counted:

    token s is seen by token r  if  document[s] == document[r]  and  position[s] <= position[r]
                                and  position[r] - position[s] < window

Padding sees padding alone, and is seen by nothing else.

Shapes: B rows, S tokens of each on the ranks of a tensor-parallel group together, R and S when
those who look and those who are seen differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe.errors import RoutingError

__all__ = ["FARTHEST", "Places", "visible"]

PADDING = -1
FARTHEST = 1 << 31
"""Positions are below it."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where the tokens of a rank's (dp, cp) part stand; the same on its whole TP group.

    Args:
        positions_BS: number of each token in its row or in its document, int64. Rotary embedding
            turns by it, and what is later is not seen.
        documents_BS: number of each token's document in its row, int64, at least 0; None: a row is
            one document.
        valid_BS: True for real tokens, False for padding, bool; None: all are real.
        plain: rows are whole, and nothing but them: positions 0, 1, 2, ..., no documents and no
            padding. Attention then needs no mask.
    """

    positions_BS: Tensor
    documents_BS: Tensor | None = None
    valid_BS: Tensor | None = None
    plain: bool = False

    @classmethod
    def whole(cls, rows: int, tokens: int, device: torch.device | str | None = None) -> Places:
        """Return the places of whole rows of one document each.

        Example:
            >>> Places.whole(2, 3).positions_BS.tolist()
            [[0, 1, 2], [0, 1, 2]]
        """
        positions_S = torch.arange(tokens, device=device)
        return cls(positions_S.expand(rows, -1), plain=True)

    @property
    def documents(self) -> Tensor | None:
        """Documents with padding as one of its own; None: all tokens of a row are in one."""
        if self.valid_BS is None:
            return self.documents_BS
        known_BS = self.documents_BS
        documents_BS = torch.zeros_like(self.positions_BS) if known_BS is None else known_BS
        return documents_BS.masked_fill(~self.valid_BS, PADDING)

    def check(self, rows: int, tokens: int) -> None:
        """Refuse places that are not those of so many tokens.

        Args:
            rows: B.
            tokens: S.

        Raises:
            RoutingError: a shape or a type is wrong, or `plain` contradicts the rest.
        """
        kinds = {
            "positions_BS": torch.int64,
            "documents_BS": torch.int64,
            "valid_BS": torch.bool,
        }
        for name, kind in kinds.items():
            told = getattr(self, name)
            if told is not None and (told.shape != (rows, tokens) or told.dtype != kind):
                raise RoutingError(
                    f"{name} has shape {tuple(told.shape)} and type {told.dtype}; needed is "
                    f"({rows}, {tokens}) of {kind}"
                )
        if self.plain and (self.documents_BS is not None or self.valid_BS is not None):
            raise RoutingError("plain places have neither documents nor padding; leave out plain")


def visible(
    positions_BR: Tensor,
    positions_BS: Tensor,
    documents_BR: Tensor | None = None,
    documents_BS: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Return which tokens see which: the definition that every attention core follows.

    Args:
        positions_BR: of those who look.
        positions_BS: of those who are seen.
        documents_BR: of those who look, as `Places.documents`; None: one.
        documents_BS: of those who are seen.
        window: how many tokens one sees at most, itself included; None: all before it.

    Returns:
        seen_BRS, bool.

    Example:
        >>> visible(torch.tensor([[0, 1]]), torch.tensor([[0, 1]])).tolist()
        [[[True, False], [True, True]]]
    """
    behind_BRS = positions_BR.unsqueeze(2) - positions_BS.unsqueeze(1)
    seen_BRS = behind_BRS >= 0
    if window is not None:
        seen_BRS &= behind_BRS < window
    if documents_BR is not None and documents_BS is not None:
        seen_BRS &= documents_BR.unsqueeze(2) == documents_BS.unsqueeze(1)
    return seen_BRS
