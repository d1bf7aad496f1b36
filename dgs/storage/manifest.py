"""The manifest of a snapshot, and the names of its files.

The manifest is JSON, with sorted keys and without blanks, so that there is one way to write it:
position, facts, size and checksum of every part, and the checksum of all that. A part's name has
its checksum in it, so that a snapshot is never written over another one of the same position.
"""

from __future__ import annotations

import json
import re
import zlib
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final, NamedTuple

from dgs.errors import StateError

__all__ = [
    "FORMAT",
    "DamagedError",
    "Manifest",
    "PartFile",
    "decode_manifest",
    "encode_manifest",
    "is_part",
    "list_positions",
    "part_name",
    "position_of_part",
    "snapshot_name",
]

FORMAT: Final = 1

_MANIFEST: Final = re.compile(r"snapshot-(\d{20})\.json")
_PART: Final = re.compile(r"[a-z0-9_-]+")
_PART_FILE: Final = re.compile(r"snapshot-(\d{20})\.[a-z0-9_-]+\.[0-9a-f]{8}\.safetensors")


class DamagedError(Exception):
    """A file of a snapshot is not what it has to be; the text begins with its name."""


class PartFile(NamedTuple):
    """The file of a part, as the manifest has it."""

    name: str
    size_bytes: int
    crc32: int


class Manifest(NamedTuple):
    """What a manifest says; `size_bytes` is the length of all files, its own included."""

    facts: dict[str, Any]
    files: dict[str, PartFile]
    size_bytes: int


def snapshot_name(position: int) -> str:
    """Return the name of a snapshot's manifest.

    Example:
        >>> snapshot_name(7)
        'snapshot-00000000000000000007.json'
    """
    return f"snapshot-{position:020d}.json"


def part_name(position: int, part: str, crc32: int) -> str:
    """Return the name of the file of a part.

    Example:
        >>> part_name(7, "model", 10)
        'snapshot-00000000000000000007.model.0000000a.safetensors'
    """
    return f"snapshot-{position:020d}.{part}.{crc32:08x}.safetensors"


def is_part(part: str) -> bool:
    """Tell whether a word may name a part."""
    return _PART.fullmatch(part) is not None


def position_of_part(name: str) -> int | None:
    """Return the position in the name of the file of a part, if it is one."""
    found = _PART_FILE.fullmatch(name)
    return int(found[1]) if found else None


def list_positions(names: list[str]) -> list[int]:
    """Return the positions of the manifests among the names of files, in order."""
    return [int(found[1]) for found in map(_MANIFEST.fullmatch, names) if found]


def encode_manifest(position: int, facts: dict[str, Any], files: dict[str, PartFile]) -> bytes:
    """Return the bytes of a manifest.

    Args:
        position: records of the log that are in the snapshot.
        facts: whatever JSON can say.
        files: of the parts.

    Raises:
        ValueError: the facts hold what is not finite.
        TypeError: the facts hold what JSON cannot say.
    """
    content = {
        "facts": facts,
        "files": {
            part: {"bytes": file.size_bytes, "crc32": file.crc32} for part, file in files.items()
        },
        "format": FORMAT,
        "library": _library_version(),
        "position": position,
    }
    # once there and back, so that the order of the keys does not depend on what they were
    return _seal(json.loads(_dump(content)))


def _seal(content: dict[str, Any]) -> bytes:
    """Return the manifest's bytes, which are the only ones for this content."""
    checksum = zlib.crc32(_dump(content))
    return _dump({**content, "crc32": checksum}) + b"\n"


def _dump(content: dict[str, Any]) -> bytes:
    text = json.dumps(content, sort_keys=True, allow_nan=False, separators=(",", ":"))
    return text.encode()


def decode_manifest(data: bytes, position: int, label: str) -> Manifest:
    """Read a manifest, and believe it only if its checksum is right.

    Args:
        data: the file.
        position: by the file's name.
        label: of the disk, for messages.

    Raises:
        DamagedError: these are not the bytes that were written.
        StateError: a newer release wrote it.
    """
    name = snapshot_name(position)
    try:
        content = json.loads(data)
        written_by = content["format"]
        if isinstance(written_by, int) and written_by > FORMAT:
            raise StateError(
                f"{label}/{name} was written by a newer release: it has format {written_by}, "
                f"this one reads up to {FORMAT}; start the release that wrote it"
            )
        checksum = content.pop("crc32")
        if _seal(content) != data:
            raise DamagedError(f"{name}: does not match its checksum {checksum}")
        if (written_by, content["position"]) != (FORMAT, position):
            raise DamagedError(
                f"{name}: format {written_by!r} of position {content['position']}, expected "
                f"{FORMAT} of {position}"
            )
        files = {
            part: PartFile(part_name(position, part, file["crc32"]), file["bytes"], file["crc32"])
            for part, file in content["files"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise DamagedError(f"{name}: {len(data)} bytes that are not a manifest ({e})") from e
    size_bytes = len(data) + sum(file.size_bytes for file in files.values())
    return Manifest(content["facts"], files, size_bytes)


@cache
def _library_version() -> str:
    try:
        return version("dgs")
    except PackageNotFoundError:  # run from its sources
        return "unknown"
