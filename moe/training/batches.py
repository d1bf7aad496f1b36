"""Which tokens a rank trains on in a step: a function of the step's number and nothing else.

A corpus is cut into windows of `length` tokens, which are shuffled anew in each epoch; the last
share of them is held out. Sequence number n of a run is the same whatever the mapping is, and a
step takes the next `batch` numbers, so a run goes on under another mapping with the same batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from moe.config import ConfigError
from moe.training.corpus import Corpus

__all__ = ["Batch", "Batches", "Share"]


@dataclass(frozen=True, slots=True)
class Batch:
    """Whole packed sequences."""

    tokens_BT: Tensor
    """int64."""

    labels_BT: Tensor
    """The token after each; int64."""

    documents_BT: Tensor
    """Number of the document that each token belongs to; int64."""


@dataclass(frozen=True, slots=True)
class Share:
    """Which sequences of a batch one replica takes, and when.

    Args:
        index: of the replica, in [0, count).
        count: of replicas: the data-parallel ranks.
        micro_batches: rounds that a step consists of.
    """

    index: int = 0
    count: int = 1
    micro_batches: int = 1


class Batches:
    """Cut a corpus into batches.

    Args:
        corpus: what is learnt.
        length: tokens of a sequence.
        batch: sequences of a step, over all replicas.
        seed: of the order.
        held_out: share of the windows that are kept for evaluation, in [0, 1).

    Raises:
        ConfigError: the corpus is too short for one batch, or a number is out of range.

    Example:
        >>> from moe.training.corpus import of_bytes
        >>> batches = Batches(of_bytes([bytes(range(200))]), length=8, batch=4)
        >>> batches.at(0, Share(1, 2))[0].tokens_BT.shape
        torch.Size([2, 8])
    """

    def __init__(
        self, corpus: Corpus, length: int, batch: int, seed: int = 0, held_out: float = 0.0
    ) -> None:
        """Count the windows."""
        for name, number in (("length", length), ("batch", batch)):
            if number < 1:
                raise ConfigError(f"{name}={number} is not valid: give a number of at least 1")
        if not 0 <= held_out < 1:
            raise ConfigError(f"held_out={held_out} is not valid: give a share in [0, 1)")
        self.corpus = corpus
        self.length = length
        self.batch = batch
        self._seed = seed
        windows = max(0, (len(corpus) - 1) // length)  # each needs the token after its last
        self.held_out = round(windows * held_out)
        self.windows = windows - self.held_out
        if self.windows < batch:
            raise ConfigError(
                f"{corpus.name} has {len(corpus)} tokens, {self.windows} sequences of {length} to "
                f"train on, and a batch takes {batch}; give more text, shorter sequences or a "
                "smaller batch"
            )

    def at(self, step: int, share: Share | None = None) -> list[Batch]:
        """Return the micro-batches of a step that one replica works on, in order.

        Args:
            step: number of the step, from 0.
            share: which replica; all of the batch at once unless given.

        Raises:
            ConfigError: the batch cannot be shared out evenly.
        """
        share = share or Share()
        parts = share.count * share.micro_batches
        if self.batch % parts:
            raise ConfigError(
                f"a batch of {self.batch} sequences cannot be shared out over {share.count} "
                f"replicas in {share.micro_batches} micro-batches; give a multiple of {parts}"
            )
        each = self.batch // parts
        first = step * self.batch + share.index * each
        return [
            self._batch([self._window(first + m * share.count * each + i) for i in range(each)])
            for m in range(share.micro_batches)
        ]

    def evaluation(self, most: int) -> list[Batch]:
        """Return up to `most` held-out sequences, one by one, the same ones every time."""
        count = min(most, self.held_out)
        return [self._batch([self.windows + i]) for i in range(count)]

    def _window(self, number: int) -> int:
        epoch, place = divmod(number, self.windows)
        return int(_order(self.windows, self._seed, epoch)[place])

    def _batch(self, windows: list[int]) -> Batch:
        firsts = np.array(windows, np.int64) * self.length
        spans = firsts[:, None] + np.arange(self.length + 1)
        tokens = torch.from_numpy(np.asarray(self.corpus.tokens[spans], np.int64))
        documents = np.searchsorted(self.corpus.starts, spans[:, :-1], side="right") - 1
        return Batch(
            tokens[:, :-1].contiguous(),
            tokens[:, 1:].contiguous(),
            torch.from_numpy(documents.astype(np.int64)),
        )


@lru_cache(maxsize=2)
def _order(windows: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order in which an epoch takes the windows."""
    return np.random.default_rng([seed, epoch]).permutation(windows)
