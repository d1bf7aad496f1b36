"""Models on disk: safetensors files only, never pickles, never half written."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dgs.errors import ConfigError, NonFiniteError
from dgs.quantize import first_non_finite
from dgs.tracker import FloatArray

__all__ = ["check_writable", "read_model", "write_model"]

CONVERTED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IGNORED = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def read_model(path: Path) -> tuple[dict[str, FloatArray], list[str]]:
    """Read the float tensors of a safetensors file.

    Args:
        path: the file.

    Returns:
        The tensors by name, as float32, and the names of integer and boolean ones, which are left
        out.

    Raises:
        ConfigError: there is no such file, it is not of this format, or it has no float tensors.
        NonFiniteError: a tensor holds NaN or Inf.
    """
    model: dict[str, FloatArray] = {}
    ignored: list[str] = []
    try:
        with path.open("rb") as readable:  # safe_open's own words for a missing file lack its name
            start = readable.read(4)
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                tensor = file.get_tensor(name)
                if tensor.dtype in IGNORED:
                    ignored.append(name)
                else:
                    model[name] = _as_float32(path, name, tensor)
    except SafetensorError as error:
        raise ConfigError(_not_safetensors(path, start, error)) from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    if not model:
        raise ConfigError(f"{path} holds no float tensors, so no model to start from")
    return model, ignored


def _as_float32(path: Path, name: str, tensor: torch.Tensor) -> FloatArray:
    if tensor.dtype not in CONVERTED:
        raise ConfigError(
            f"tensor {name!r} of {path} is of type {tensor.dtype}; a model is trained in float32, "
            "so convert it to that, or to bfloat16 or float16"
        )
    values = tensor.to(torch.float32).numpy()
    bad = first_non_finite(values.reshape(-1))
    if bad is not None:
        raise NonFiniteError(f"tensor {name!r} of {path} holds NaN or Inf as float32")
    return values


def _not_safetensors(path: Path, start: bytes, error: Exception) -> str:
    if start[:1] == b"\x80" or start == b"PK\x03\x04":
        return (
            f"{path} looks like a pickled PyTorch file; reading one can run any code, so it is "
            "refused. Convert it where it comes from: "
            "safetensors.torch.save_file(model.state_dict(), 'model.safetensors')"
        )
    return f"{path} is not a safetensors file, or is damaged: {error}"


def check_writable(path: Path) -> None:
    """Refuse a place that no file can be written to, by writing an empty one next to it.

    Raises:
        ConfigError: the folder is missing or not writable, or the path is something else.
    """
    folder = path.parent
    if not folder.is_dir():
        raise ConfigError(f"cannot write {path}: there is no directory {str(folder)!r}")
    if path.exists() and not path.is_file():
        raise ConfigError(f"cannot write {path}: it is not a regular file")
    aside = _aside(path)
    try:
        aside.touch()  # permissions alone do not tell: a folder may take no files for other reasons
        aside.unlink()
    except OSError as error:
        why = error.strerror or error
        raise ConfigError(f"cannot write {path}: no file can be made in {folder}: {why}") from error


def _aside(path: Path) -> Path:
    """Return where a file is written before it takes its place."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def write_model(path: Path, model: Mapping[str, FloatArray], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, whole or not at all; an existing file is replaced.

    Args:
        path: the file.
        model: tensors by name.
        metadata: strings for the file's header.

    Raises:
        ConfigError: the place cannot be written to, or the disk is full; names the file.
    """
    check_writable(path)
    aside = _aside(path)
    tensors = {name: np.ascontiguousarray(values) for name, values in model.items()}
    try:
        aside.touch()
        mode = aside.stat().st_mode  # as the user's umask has it; save_file lets nobody else read
        save_file(tensors, aside, dict(metadata))
        aside.chmod(mode)
        _flush(aside)
        aside.replace(path)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot write {path}: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def _flush(path: Path) -> None:
    """Have the system put a file, or a folder's entries, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
