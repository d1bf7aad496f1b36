"""Corpora: what documents become, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moe.config import ConfigError
from moe.training.corpus import BEGIN, of_bytes, of_standard_library, of_text, of_tokens


def test_every_document_begins_with_the_token_that_says_so() -> None:
    corpus = of_bytes([b"one", b"", b"\x00\xff"])
    assert (corpus.tokens[corpus.starts] == BEGIN).all()
    assert (corpus.tokens == BEGIN).sum() == len(corpus.starts) == 2
    assert max(corpus.tokens) < corpus.vocabulary


def test_the_standard_library_is_there_and_can_be_bounded() -> None:
    corpus = of_standard_library(100_000)
    assert 10_000 < len(corpus) <= 100_000 + len(corpus.starts)
    assert np.array_equal(corpus.tokens, of_standard_library(100_000).tokens)


def test_a_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"abc")
    assert of_text(path).tokens.tolist() == [BEGIN, 97, 98, 99]


@pytest.mark.parametrize("content", [None, b""])
def test_a_text_that_is_missing_or_empty_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=str(path)):
        of_text(path)


def test_tokens_are_mapped_and_not_read(tmp_path: Path) -> None:
    path = tmp_path / "tokens.npy"
    np.save(path, np.arange(10, dtype=np.uint16))
    np.save(tmp_path / "tokens.starts.npy", np.array([0, 4]))
    corpus = of_tokens(path, 10)
    assert isinstance(corpus.tokens, np.memmap)
    assert corpus.starts.tolist() == [0, 4]
    (tmp_path / "tokens.starts.npy").unlink()
    assert of_tokens(path, 10).starts.tolist() == [0]


@pytest.mark.parametrize(
    ("tokens", "starts", "words"),
    [
        (np.zeros((2, 2), np.uint16), None, r"shape \[2, 2\]"),
        (np.zeros(3, np.float32), None, "holds float32"),
        (np.array([0, 1, 7, 2], np.uint16), None, "token 2 is 7, and the model's vocabulary has 7"),
        (np.array([0, -1], np.int32), None, "token 1 is -1"),
        (np.zeros(3, np.uint8), np.array([1]), "must begin with 0"),
        (np.zeros(3, np.uint8), np.array([0, 2, 2]), "must begin with 0 and ascend"),
        (np.zeros(3, np.uint8), np.array([0, 3]), "begins at 3 of 3 tokens"),
        (np.zeros(3, np.uint8), np.empty(0, np.int64), "must begin with 0"),
    ],
)
def test_tokens_that_do_not_fit_are_named(
    tmp_path: Path, tokens: np.ndarray, starts: np.ndarray | None, words: str
) -> None:
    path = tmp_path / "tokens.npy"
    np.save(path, tokens)
    if starts is not None:
        np.save(path.with_suffix(".starts.npy"), starts)
    with pytest.raises(ConfigError, match=words):
        of_tokens(path, 7)


@pytest.mark.parametrize("content", [None, b"", b"\x93NUMPY\x01\x00", b"\x80\x04N."])
def test_a_file_that_is_no_array_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "tokens.npy"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=str(path)):
        of_tokens(path, 7)
