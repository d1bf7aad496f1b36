"""Context parallelism: which tokens of a sequence each rank holds.

Attention is causal, so a rank with the end of a sequence has more to do than one with its start. A
sequence is therefore cut into ``2 * CP`` chunks, and rank r holds chunks r and ``2 * CP - 1 - r``:
every rank then has the same number of visible pairs. A rank's tokens stand in ascending order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.errors import LayoutError

__all__ = ["chunks_of", "gather_order", "positions_of", "take_tokens"]


def chunks_of(index: int, size: int) -> tuple[int, int]:
    """Return the numbers of the two chunks that a rank holds, of ``2 * size``.

    Example:
        >>> [chunks_of(index, 3) for index in range(3)]
        [(0, 5), (1, 4), (2, 3)]
    """
    return index, 2 * size - 1 - index


def positions_of(length: int, index: int, size: int) -> Tensor:
    """Return where in the sequence a rank's tokens stand.

    Args:
        length: tokens of the whole sequence.
        index: this rank's place in the CP group.
        size: ranks of that group.

    Returns:
        int64, shape ``(length / size,)``, ascending.

    Raises:
        LayoutError: the sequence cannot be cut into equal chunks.

    Example:
        >>> positions_of(8, 1, 2).tolist()
        [2, 3, 4, 5]
    """
    if size == 1:
        return torch.arange(length)
    if length % (2 * size):
        raise LayoutError(
            f"a sequence of {length} tokens cannot be cut into 2 * cp = {2 * size} equal chunks; "
            f"give a multiple of {2 * size}"
        )
    chunk = length // (2 * size)
    return torch.cat([torch.arange(c * chunk, (c + 1) * chunk) for c in chunks_of(index, size)])


def take_tokens(x_BT: Tensor, index: int, size: int) -> Tensor:
    """Return a rank's tokens of whole sequences.

    Args:
        x_BT: of whole sequences, shape ``(batch, length, ...)``.
        index: this rank's place in the CP group.
        size: ranks of that group.

    Raises:
        LayoutError: the sequences cannot be cut into equal chunks.
    """
    return x_BT[:, positions_of(x_BT.shape[1], index, size).to(x_BT.device)]


def gather_order(length: int, size: int) -> Tensor:
    """Return, for each token of a sequence, its place in all ranks' tokens one after another.

    Example:
        >>> gather_order(8, 2).tolist()
        [0, 1, 4, 5, 6, 7, 2, 3]
    """
    return torch.cat([positions_of(length, index, size) for index in range(size)]).argsort()
