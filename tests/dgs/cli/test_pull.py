"""What `dgs pull` writes is the whole model, or nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dgs.cli.main import main
from tests.helpers.scripts.train import make_model


def test_file_loads_strictly_into_the_plain_model(
    shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model.safetensors"
    out.write_text("an old file")
    assert main(["pull", "--server", shards, "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    given, model = make_model(seed=1), make_model(seed=2)
    model.load_state_dict(load_file(out), strict=True)
    for name, tensor in given.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    with safe_open(out, framework="pt") as file:
        metadata = file.metadata()
    assert metadata == {"format": "pt", "version": "0,0", "run": told["run"]}
    assert len(set(told["run"].split(","))) == 2
    assert (told["out"], told["version"], told["bytes"]) == (str(out), "0,0", out.stat().st_size)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    other = tmp_path / "other"
    other.touch()
    assert out.stat().st_mode == other.stat().st_mode


def test_plain_answer_is_one_line(
    shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model.safetensors"
    assert main(["pull", "--server", shards, "--out", str(out)]) == 0
    assert re.fullmatch(
        r"wrote .*model\.safetensors: 8 tensors, 899 values, [\d.]+ kB, version 0,0\n",
        capsys.readouterr().out,
    )


def test_empty_server_is_told_of_at_once(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pull", "--server", server, "--out", str(tmp_path / "m")]) == 1
    assert f"{server} has no model yet" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_shards_in_wrong_order_or_number_are_refused(
    shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = shards.split(",")
    for listed in (f"{b},{a}", a):
        assert main(["pull", "--server", listed, "--out", str(tmp_path / "m")]) == 1
        assert "list all servers, in their order" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_unreachable_server_is_named_with_the_time_spent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["pull", "--server", "127.0.0.1:1", "--out", str(tmp_path / "m"), "--timeout-s", "0.3"]
    assert main(argv) == 1
    said = capsys.readouterr().err
    assert re.search(r"gave up on server 127\.0\.0\.1:1 after \d+\.\d s and \d+ attempts?", said)
    assert "connection refused" in said


def test_place_that_cannot_be_written_is_named_before_anything_is_fetched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "missing" / "m"
    assert main(["pull", "--server", "127.0.0.1:1", "--out", str(missing)]) == 1
    assert f"there is no directory {str(missing.parent)!r}" in capsys.readouterr().err
    assert main(["pull", "--server", "127.0.0.1:1", "--out", str(tmp_path)]) == 1
    assert "not a regular file" in capsys.readouterr().err
