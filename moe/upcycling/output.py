"""A directory that appears whole or not at all, and goes on where it was interrupted."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, uint8

from moe.errors import CheckpointError, UpcycleError
from moe.upcycling.plan import Piece
from moe.upcycling.source import DTYPES, INDEX, SINGLE

__all__ = ["Output", "as_shards", "claim"]

PLAN = ".upcycle-plan"
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT_BYTES = 8
CARRIED = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template*",
    "preprocessor_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
"""Files that go along as they are, by patterns."""


@contextmanager
def claim(target: Path, overwrite: bool) -> Iterator[Path]:
    """Give the directory in which a result is built, for one process alone.

    Args:
        target: where the result will be.
        overwrite: whether a checkpoint that is there may be replaced.

    Raises:
        UpcycleError: the target exists, or another process builds it.
    """
    if target.exists() and not overwrite:
        raise UpcycleError(f"{target} exists; give another directory, or --overwrite")
    if target.exists() and not (target / "config.json").is_file():
        raise UpcycleError(f"{target} is not a checkpoint, so it is not overwritten; move it away")
    partial = target.with_name(target.name + ".partial")
    if partial.exists() and not (partial / PLAN).is_file():
        raise UpcycleError(f"{partial} was not left by a conversion; move it away")
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / PLAN).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UpcycleError(f"another process is writing {partial}") from error
        yield partial


class Output:
    """Writes a checkpoint into a claimed directory.

    Args:
        partial: from `claim`.
        target: what it is called in the end.
        fingerprint: of everything that decides the result; what was left by a conversion with
            another one is thrown away.
    """

    def __init__(self, partial: Path, target: Path, fingerprint: str) -> None:
        self.partial = partial
        self.target = target
        told = partial / PLAN
        if told.read_text() != fingerprint:
            for path in partial.iterdir():
                if path != told:
                    _remove(path)
            told.write_text(fingerprint)  # not replaced: its lock belongs to the file

    def write_shards(
        self,
        shards: Sequence[Sequence[Piece]],
        make: Callable[[Piece], Iterable[Tensor]],
        done: Callable[[int, str], None],
    ) -> None:
        """Write safetensors files and their index, those left out that are there already.

        Args:
            shards: pieces of each file.
            make: yields a piece in parts.
            done: told the bytes of each piece, and the piece's name.

        Raises:
            CheckpointError: the disk is full, or fails otherwise.
        """
        mapping: dict[str, str] = {}
        for number, pieces in enumerate(shards, start=1):
            file = SINGLE if len(shards) == 1 else _file_name(number, len(shards))
            mapping |= {piece.name: file for piece in pieces}
            if (self.partial / file).exists():
                done(sum(piece.bytes for piece in pieces), file)
                continue
            begun = self.partial / (file + ".begun")
            _write_shard(begun, pieces, make, done)
            begun.rename(self.partial / file)
        if len(shards) > 1:
            total = sum(piece.bytes for pieces in shards for piece in pieces)
            told = {"metadata": {"total_size": total}, "weight_map": dict(sorted(mapping.items()))}
            self.write_json(INDEX, told)

    def write_json(self, name: str, told: object) -> None:
        """Write a JSON file and make it durable."""
        with (self.partial / name).open("w") as file:
            file.write(json.dumps(told, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def carry_over(self, source: Path) -> None:
        """Copy tokenizer, generation settings and licence."""
        for path in sorted({p for pattern in CARRIED for p in source.glob(pattern)}):
            if path.is_file():
                shutil.copyfile(path, self.partial / path.name)

    def publish(self) -> None:
        """Give the directory its name; one that had it is replaced."""
        _sync_directory(self.partial)
        old = self.target.with_name(self.target.name + ".replaced")
        _remove(old)
        if self.target.exists():
            self.target.rename(old)
        self.partial.rename(self.target)
        (self.target / PLAN).unlink()
        _sync_directory(self.target.parent)
        _remove(old)

    def discard(self) -> None:
        """Leave nothing behind."""
        _remove(self.partial)


def as_shards(pieces: Sequence[Piece], most_bytes: int) -> list[list[Piece]]:
    """Share pieces out over files of at most so many bytes, or one piece.

    Args:
        pieces: in order.
        most_bytes: of a file.
    """
    shards: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if shards[-1] and size + piece.bytes > most_bytes:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += piece.bytes
    return shards


def _file_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def _header(pieces: Sequence[Piece]) -> bytes:
    told: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for piece in pieces:
        start, end = end, end + piece.bytes
        told[piece.name] = {
            "dtype": NAMES[piece.dtype],
            "shape": list(piece.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(told, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text


def _write_shard(
    path: Path,
    pieces: Sequence[Piece],
    make: Callable[[Piece], Iterable[Tensor]],
    done: Callable[[int, str], None],
) -> None:
    """Write one file whose places are all known beforehand, so that nothing is collected."""
    try:
        with path.open("wb", buffering=0) as file:
            _write_all(file.fileno(), memoryview(_header(pieces)))
            for piece in pieces:
                written = 0
                for part in make(piece):
                    if part.dtype != piece.dtype:
                        raise CheckpointError(f"{piece.name} came out as {part.dtype}")
                    if part.numel():
                        flat = part.contiguous().view(-1).view(uint8).numpy()
                        written += _write_all(file.fileno(), flat.data)
                if written != piece.bytes:
                    raise CheckpointError(f"{piece.name} has {written} bytes, not {piece.bytes}")
                done(piece.bytes, piece.name)
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error}; nothing is left of it") from error


def _write_all(file: int, data: memoryview) -> int:
    end = 0
    while end < len(data):
        end += os.write(file, data[end:])
    return end


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
