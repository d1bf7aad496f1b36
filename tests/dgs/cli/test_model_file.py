"""Models are read from safetensors files only, and every refusal names the file and the reason."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dgs.cli.model_file import read_model
from dgs.errors import ConfigError, DgsError, NonFiniteError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_floats_are_read_as_float32_and_integers_are_left_out(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    path = tmp_path / "m.safetensors"
    tensors = {"a": torch.randn(3, 4).to(dtype), "b": torch.tensor(2.5).to(dtype)}
    save_file({**tensors, "steps": torch.tensor(7), "mask": torch.ones(2, dtype=torch.bool)}, path)
    model, ignored = read_model(path)
    assert sorted(ignored) == ["mask", "steps"]
    assert sorted(model) == ["a", "b"]
    for name, tensor in tensors.items():
        assert torch.equal(torch.from_numpy(model[name]), tensor.float())


def test_header_of_any_length_is_no_pickle(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    starts = set()
    for length in range(1, 257, 8):
        save_file({"a" * length: torch.ones(1)}, path)
        starts.add(path.read_bytes()[:1])
        assert read_model(path)[1] == []
    assert b"\x80" in starts


def pickled(*, zipped: bool) -> bytes:
    file = io.BytesIO()
    torch.save({"a": torch.ones(3)}, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def wrong_files() -> dict[str, tuple[bytes, str]]:
    def saved(tensor: torch.Tensor) -> bytes:
        from safetensors.torch import save

        return save({"a": tensor})

    whole = saved(torch.ones(100))
    return {
        "empty": (b"", "not a safetensors file, or is damaged"),
        "other": (b"not a model at all", "not a safetensors file, or is damaged"),
        "cut": (whole[:-8], "not a safetensors file, or is damaged"),
        "zip": (pickled(zipped=True), "pickled PyTorch file"),
        "pickle": (pickled(zipped=False), "pickled PyTorch file"),
        "integers": (saved(torch.ones(2, dtype=torch.int64)), "holds no float tensors"),
        "complex": (saved(torch.ones(2, dtype=torch.complex64)), "is of type torch.complex64"),
        "overflow": (saved(torch.tensor([1e300], dtype=torch.float64)), "holds NaN or Inf"),
        "nan": (saved(torch.tensor([1.0, torch.nan])), "holds NaN or Inf"),
    }


@pytest.mark.parametrize("kind", wrong_files())
def test_wrong_file_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    content, reason = wrong_files()[kind]
    path.write_bytes(content)
    with pytest.raises(DgsError, match=reason) as caught:
        read_model(path)
    assert str(path) in str(caught.value)
    assert isinstance(caught.value, ConfigError | NonFiniteError)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*absent: No such file"):
        read_model(tmp_path / "absent")
