"""Text as one long array of tokens, and where its documents begin.

Bytes are tokens 0 to 255, and each document begins with token 256, which also tells the one before
it that it has ended. Tokens that were made elsewhere are mapped from disk, never read whole.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moe.config import ConfigError

__all__ = ["BEGIN", "Corpus", "of_bytes", "of_standard_library", "of_text", "of_tokens"]

BEGIN = 256
"""Token that each document of bytes begins with."""

VOCABULARY = 257
TOKEN_TYPES = ("uint8", "uint16", "uint32", "int32", "int64")
PIECE = 1 << 24


@dataclass(frozen=True)
class Corpus:
    """Tokens, and the documents that they are.

    Args:
        tokens: of all documents one after another, possibly mapped from disk.
        starts: where each document begins; int64, ascending, the first is 0.
        vocabulary: every token is below it.
        name: what errors and logs call it.
    """

    tokens: npt.NDArray[np.integer]
    starts: npt.NDArray[np.int64]
    vocabulary: int
    name: str

    def __len__(self) -> int:
        return len(self.tokens)


def of_bytes(documents: Iterable[bytes], name: str = "bytes") -> Corpus:
    """Join documents, each with `BEGIN` before it; those without a byte are left out.

    Example:
        >>> corpus = of_bytes([b"ab", b"", b"c"])
        >>> corpus.tokens.tolist(), corpus.starts.tolist()
        ([256, 97, 98, 256, 99], [0, 3])
    """
    begin = np.array([BEGIN], np.uint16)
    parts: list[npt.NDArray[np.uint16]] = []
    starts, length = [], 0
    for document in documents:
        if document:
            starts.append(length)
            parts += [begin, np.frombuffer(document, np.uint8).astype(np.uint16)]
            length += 1 + len(document)
    tokens = np.concatenate(parts) if parts else np.empty(0, np.uint16)
    return Corpus(tokens, np.array(starts, np.int64), VOCABULARY, name)


def of_text(path: Path) -> Corpus:
    """Read the bytes of any file as one document.

    Raises:
        ConfigError: it cannot be read, or is empty.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"text {path} cannot be read: {error.strerror}") from error
    if not content:
        raise ConfigError(f"text {path} is empty; give a file with something to learn")
    return of_bytes([content], str(path))


def of_standard_library(most_bytes: int | None = None) -> Corpus:
    """Read the sources of the standard library, a document for each module at its top.

    They are on every machine that runs this, which no other text is. Their contents depend on the
    version of Python.

    Args:
        most_bytes: stop before the document that would make it more.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    documents, held = [], 0
    for path in sorted(folder.glob("*.py")):
        content = path.read_bytes()
        if most_bytes is not None and held + len(content) > most_bytes:
            break
        documents.append(content)
        held += len(content)
    return of_bytes(documents, "the standard library's source")


def of_tokens(path: Path, vocabulary: int) -> Corpus:
    """Map tokens that were made elsewhere.

    Args:
        path: a one-dimensional array of whole numbers as ``numpy.save`` writes it; beside it may
            stand NAME.starts.npy, int64, with where each document begins.
        vocabulary: of the model.

    Raises:
        ConfigError: a file is missing, damaged or of another type, or a token or a start is out of
            range; names it.
    """
    tokens = _map(path)
    if tokens.ndim != 1 or tokens.dtype.name not in TOKEN_TYPES:
        raise ConfigError(
            f"{path} holds {tokens.dtype} of shape {list(tokens.shape)}; give one dimension of "
            f"{', '.join(TOKEN_TYPES)}"
        )
    for first in range(0, len(tokens), PIECE):
        piece = tokens[first : first + PIECE]
        if int(piece.min()) < 0 or int(piece.max()) >= vocabulary:
            wrong = first + int(np.argmax((piece < 0) | (piece >= vocabulary)))
            raise ConfigError(
                f"{path}: token {wrong} is {tokens[wrong]}, and the model's vocabulary has "
                f"{vocabulary}; make tokens and model with the same tokenizer"
            )
    beside = path.with_suffix(".starts.npy")
    starts = np.array(_map(beside), np.int64) if beside.exists() else np.zeros(1, np.int64)
    if not starts.size or starts[0] != 0 or (np.diff(starts) <= 0).any():
        raise ConfigError(f"{beside} must begin with 0 and ascend")
    if starts[-1] >= len(tokens):
        raise ConfigError(f"{beside}: a document begins at {starts[-1]} of {len(tokens)} tokens")
    return Corpus(tokens, starts, vocabulary, str(path))


def _map(path: Path) -> npt.NDArray[np.integer]:
    try:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise ConfigError(f"there are no tokens at {path}") from error
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"{path} is not an array that numpy.save wrote: {error}") from error
    if not isinstance(mapped, np.ndarray):
        raise ConfigError(f"{path} holds several arrays; save one with numpy.save")
    return mapped
