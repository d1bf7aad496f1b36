"""The program that upcycles: exit codes, progress, JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import moe
from moe.upcycle import UpcycleConfig, main, upcycle
from moe.upcycling import Options
from tests.moe.upcycling.models import weights, write_plain


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return write_plain(tmp_path / "dense")


def _arguments(dense: Path, target: Path, line: str = "") -> list[str]:
    fixed = ["--from", str(dense), "--to", str(target), "--no-measure"]
    return [*fixed, "--experts", "8", "--top-k", "4", *line.split()]


def test_the_program_writes_what_the_function_writes(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "--method virtual-group --granularity 2 --scaling down --seed 5 --layers 0-1 --json"
    assert main(_arguments(dense, tmp_path / "one", line)) == 0
    said = capsys.readouterr()
    told = json.loads(said.out)
    assert told["format"] == "mixtral"
    assert "100 % of " in said.err
    config = UpcycleConfig(8, 4, 2, "virtual-group", scaling="down", seed=5, layers=(0, 1))
    report = upcycle(dense, tmp_path / "two", config, options=Options(measure=False))
    assert report["parameters"] == told["parameters"]
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(bool((one[name] == two[name]).all()) for name in one)


def test_the_report_is_printed_for_people(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_arguments(dense, tmp_path / "moe", "--routing softmax-topk")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("qwen2_moe: ")
    assert lines[1] == "function preservation not measured: it was not asked for"
    assert lines[2].startswith("warning: the dense function is not preserved")


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("--granularity 2", 2, "virtual-group"),
        ("--method virtual-group --granularity 8", 2, "not a multiple of the 8 routed shards"),
        ("--layers 7", 2, "layer 7 does not exist"),
        ("--layers some", 2, "such as 0-3,8"),
        ("--text nowhere.txt", 1, "cannot read the text nowhere.txt"),
    ],
)
def test_what_cannot_be_done_ends_with_one_line(
    line: str,
    code: int,
    words: str,
    dense: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(_arguments(dense, tmp_path / "moe", line)) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert words in said.err
    assert said.err.count("\n") == 1
    assert not (tmp_path / "moe").exists()


def test_a_missing_source_ends_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(_arguments(tmp_path / "nowhere", tmp_path / "moe")) == 1
    assert "nowhere is not a directory" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["", "--from a --to b --experts eight --top-k 2"])
def test_wrong_arguments_end_with_2(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        main(line.split())
    assert ending.value.code == 2
    assert "usage: python -m moe.upcycle" in capsys.readouterr().err


def test_errors_are_the_packages_own() -> None:
    assert issubclass(moe.UpcycleError, moe.MoeError)
    assert issubclass(moe.CheckpointError, moe.MoeError)
