"""Batches: the same sequences whatever the mapping, each once an epoch, none that is held out."""

from __future__ import annotations

import pytest
import torch

from moe.config import ConfigError
from moe.training.batches import Batches, Share
from moe.training.corpus import BEGIN, of_bytes

CORPUS = of_bytes([bytes([n]) * (3 * n + 1) for n in range(20)])


def _sequences(batches: Batches, steps: range, share: Share | None = None) -> list[list[int]]:
    return [
        row.tolist()
        for step in steps
        for batch in batches.at(step, share)
        for row in batch.tokens_BT
    ]


@pytest.mark.parametrize(("count", "micro_batches"), [(1, 1), (2, 1), (1, 6), (3, 2), (2, 3)])
def test_a_step_takes_the_same_sequences_however_it_is_shared_out(
    count: int, micro_batches: int
) -> None:
    batches = Batches(CORPUS, 7, 6, seed=3)
    for step in (0, 5, 40):  # the last one in another epoch
        shares = [Share(index, count, micro_batches) for index in range(count)]
        found = [s for share in shares for s in _sequences(batches, range(step, step + 1), share)]
        assert sorted(found) == sorted(_sequences(batches, range(step, step + 1)))


def test_an_epoch_takes_every_window_once_and_the_next_one_in_another_order() -> None:
    batches = Batches(CORPUS, 7, 1, seed=3)
    epochs = [
        _sequences(batches, range(e * batches.windows, (e + 1) * batches.windows)) for e in (0, 1)
    ]
    whole = [CORPUS.tokens[i * 7 : i * 7 + 7].tolist() for i in range(batches.windows)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(whole)
    assert epochs[0] != epochs[1]
    assert epochs[0] != _sequences(Batches(CORPUS, 7, 1, seed=4), range(batches.windows))


def test_labels_are_the_next_tokens_and_documents_change_where_one_begins() -> None:
    (batch,) = Batches(CORPUS, 50, 4).at(1)
    assert batch.labels_BT[:, :-1].equal(batch.tokens_BT[:, 1:])
    begins = batch.tokens_BT == BEGIN
    assert batch.documents_BT.diff().bool().equal(begins[:, 1:])


def test_what_is_held_out_is_never_trained_on() -> None:
    batches = Batches(CORPUS, 7, 2, held_out=0.25)
    held = [batch.tokens_BT[0].tolist() for batch in batches.evaluation(1000)]
    assert len(held) == batches.held_out == round(0.25 * ((len(CORPUS) - 1) // 7))
    last = [
        CORPUS.tokens[i * 7 : i * 7 + 7].tolist() for i in range(batches.windows, len(CORPUS) // 7)
    ]
    assert held == last[: len(held)]
    assert len(batches.evaluation(2)) == 2


def test_what_cannot_be_cut_or_shared_out_is_refused() -> None:
    with pytest.raises(ConfigError, match="give more text, shorter sequences or a smaller batch"):
        Batches(CORPUS, 7, 1000)
    with pytest.raises(ConfigError, match="give a multiple of 4"):
        Batches(CORPUS, 7, 6).at(0, Share(0, 2, 2))
    with pytest.raises(ConfigError, match="length=0"):
        Batches(CORPUS, 0, 6)
    with pytest.raises(ConfigError, match="held_out=1"):
        Batches(CORPUS, 7, 6, held_out=1.0)


def test_the_order_of_an_epoch_is_that_of_its_seed() -> None:
    first, again = (Batches(CORPUS, 7, 4, seed=9).at(11)[0] for _ in range(2))
    assert torch.equal(first.tokens_BT, again.tokens_BT)
