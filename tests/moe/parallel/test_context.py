"""The split of sequences over context-parallel ranks: complete, equal, and equally much to do."""

from __future__ import annotations

import pytest
import torch

from moe.errors import LayoutError
from moe.parallel.context import gather_order, positions_of, take_tokens


@pytest.mark.parametrize(("chunk", "size"), [(1, 1), (3, 2), (5, 3), (2, 8)])
def test_every_token_is_held_once_and_visible_pairs_are_shared_out_evenly(
    chunk: int, size: int
) -> None:
    length = 2 * size * chunk
    held = [positions_of(length, index, size) for index in range(size)]
    assert torch.cat(held).sort().values.equal(torch.arange(length))
    assert all(bool((own.diff() > 0).all()) for own in held)
    pairs = {int((own + 1).sum()) for own in held}  # a token sees itself and those before it
    assert len(pairs) == 1


def test_tokens_of_all_ranks_are_put_in_order_again() -> None:
    whole_BTD = torch.arange(2 * 12 * 3).view(2, 12, 3)
    parts = [take_tokens(whole_BTD, index, 3) for index in range(3)]
    assert torch.cat(parts, 1)[:, gather_order(12, 3)].equal(whole_BTD)


def test_a_sequence_that_cannot_be_cut_evenly_is_refused() -> None:
    with pytest.raises(LayoutError, match="10 tokens cannot be cut into 2 \\* cp = 4 equal chunks"):
        take_tokens(torch.zeros(1, 10), 0, 2)
    assert positions_of(5, 0, 1).tolist() == [0, 1, 2, 3, 4]
