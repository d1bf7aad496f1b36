"""States on disk: a worker's whole state in one safetensors file, whole or not at all.

A state is what `DistributedOptimizer.state_dict` returns: nested dictionaries, lists and tuples of
numbers, strings, bytes and tensors. Tensors are stored as such, everything around them as JSON in
the file's metadata; nothing in it is ever executed. A file is written aside, put on the disk and
renamed, so a crash leaves the earlier one; a checksum covers all of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from base64 import b64decode, b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dgs.errors import ConfigError

__all__ = ["read_state", "state_file", "write_state"]

FORMAT: Final = "dgs-state-1"

_STORED: Final = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool}
    | {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}
)
"""Types that every version of safetensors knows; tensors of others are stored as bytes."""


def state_file(place: str | os.PathLike[str], worker: str) -> Path:
    """Return where a worker's state is kept.

    Args:
        place: a file; or a folder (one that is there, or a path that ends with a slash), for a
            file in it that has the worker's name.
        worker: the name; empty if none was given.

    Raises:
        ConfigError: a folder needs a name, to find the file again.

    Example:
        >>> str(state_file("states/", "worker-0")), str(state_file("a.safetensors", ""))
        ('states/worker-0.safetensors', 'a.safetensors')
    """
    path = Path(place)
    if not os.fspath(place).endswith(("/", os.sep)) and not path.is_dir():
        return path
    if not worker:
        raise ConfigError(
            f"checkpoint={os.fspath(place)!r} is a folder, in which each worker has a file of its "
            "name: give worker=NAME, set DGS_WORKER, or name a file instead"
        )
    return path / f"{quote(worker, safe=' ')}.safetensors"


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write a state, whole or not at all; an existing file is replaced.

    Args:
        path: the file; its folder is made if it is not there.
        state: dictionaries with keys that are strings or whole numbers, lists, tuples, numbers,
            strings, bytes, booleans, None, and tensors of any type.

    Raises:
        ConfigError: the file cannot be written, or the state holds something else; an existing
            file is as it was.
    """
    tensors: list[Tensor] = []
    structure = json.dumps(_to_json(state, tensors, "the state"), separators=(",", ":"))
    metadata = {
        "format": FORMAT,
        "structure": structure,
        "crc32": f"{_checksum(structure, tensors):08x}",
    }
    aside = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(_by_number(tensors), aside, metadata)
        _flush(aside)
        aside.replace(path)
        _flush(path.parent)
    except (OSError, SafetensorError) as e:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise ConfigError(
            f"cannot write checkpoint {path}: {e}. Make room or name another place; training can "
            "go on, but a crash falls back to the last file that was written"
        ) from e


def read_state(path: Path) -> dict[str, Any]:
    """Read what `write_state` wrote; tensors come on the CPU.

    Raises:
        ConfigError: there is no such file, or it is damaged or of another kind.
    """
    try:
        with path.open("rb"):  # safe_open's own words for a missing file lack its name
            pass
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            count = len(file.keys())
            tensors = [file.get_tensor(str(i)).clone() for i in range(count)]
    except SafetensorError as e:
        raise ConfigError(_unusable(path, str(e))) from e
    except OSError as e:
        raise ConfigError(f"cannot read checkpoint {path}: {e.strerror or e}") from e
    if metadata.get("format") != FORMAT:
        raise ConfigError(_unusable(path, f"it is not of the format {FORMAT!r}"))
    structure = metadata.get("structure", "")
    if metadata.get("crc32") != f"{_checksum(structure, tensors):08x}":
        raise ConfigError(_unusable(path, "its checksum does not match"))
    state: dict[str, Any] = _from_json(json.loads(structure), tensors)
    return state


def _unusable(path: Path, why: str) -> str:
    return (
        f"checkpoint {path} is damaged, or not one of a worker: {why}. Delete it to start without "
        "it: the worker then starts from the servers' model, and what is lost is its velocity"
    )


def _to_json(value: Any, tensors: list[Tensor], place: str) -> Any:
    """Describe a value in JSON; tensors are appended to `tensors` and referred to by number."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, bytes):
        return {"bytes": b64encode(value).decode("ascii")}
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        tensors.append(_storable(value, place))
        return {"tensor": [len(tensors) - 1, dtype, list(value.shape)]}
    if isinstance(value, list | tuple):
        items = [_to_json(v, tensors, f"{place}[{i}]") for i, v in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str | int) or isinstance(key, bool):
                raise ConfigError(f"{place} has the key {key!r}; keys are strings or whole numbers")
        return {"dict": [[k, _to_json(v, tensors, f"{place}[{k!r}]")] for k, v in value.items()]}
    raise ConfigError(
        f"{place} is a {type(value).__name__}, which a checkpoint cannot hold; it holds numbers, "
        "strings, bytes, tensors, and dictionaries, lists and tuples of these"
    )


def _storable(tensor: Tensor, place: str) -> Tensor:
    """Return a tensor's values as safetensors takes them: dense, contiguous, on the CPU."""
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise ConfigError(f"{place} is a sparse or quantized tensor, which cannot be stored")
    values = tensor.detach().cpu().contiguous()
    return values if values.dtype in _STORED else _bytes_of(values)


def _by_number(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Name tensors by their position; of those that share memory, all but the first are copied."""
    named: dict[str, Tensor] = {}
    seen: set[int] = set()
    for number, tensor in enumerate(tensors):
        memory = tensor.untyped_storage().data_ptr()
        named[str(number)] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return named


def _from_json(value: Any, tensors: Sequence[Tensor]) -> Any:
    """Rebuild what `_to_json` described."""
    if isinstance(value, list):
        return [_from_json(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    if kind == "bytes":
        return b64decode(content)
    if kind == "tuple":
        return tuple(_from_json(v, tensors) for v in content)
    if kind == "dict":
        return {k: _from_json(v, tensors) for k, v in content}
    number, name, shape = content
    dtype = getattr(torch, name)
    if 0 in shape:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return tensors[number].reshape(-1).view(dtype).reshape(shape)


def _bytes_of(tensor: Tensor) -> Tensor:
    if not tensor.numel():  # whose strides may be such that no view is possible
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    return tensor.reshape(-1).view(torch.uint8)


def _checksum(structure: str, tensors: Sequence[Tensor]) -> int:
    """Return the CRC-32 of the structure and of all tensors' bytes, in order."""
    checksum = zlib.crc32(structure.encode())
    for tensor in tensors:
        checksum = zlib.crc32(_bytes_of(tensor).numpy().data, checksum)
    return checksum


def _flush(path: Path) -> None:
    """Have the system put a file, or a folder's entries, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
