"""The program that shows mappings: a table, JSON, and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from moe.layout import main, table
from moe.parallel.dims import AXES, ParallelDims
from tests.helpers.source_tree import ROOT


def _words(line: str) -> list[str]:
    return line.split()


DOCUMENTED = _words("--world 64 --tp 2 --cp 1 --pp 2 --ep 8 --etp 1")


def test_the_documented_command_prints_every_group_as_json(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*DOCUMENTED, "--experts", "64", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    dims = ParallelDims(64, tp=2, pp=2, ep=8)
    assert told["groups"] == {axis: dims.groups(axis) for axis in AXES}
    assert told["sizes"] == {"tp": 2, "cp": 1, "dp": 16, "pp": 2, "ep": 8, "etp": 1, "edp": 4}
    assert (told["world"], told["order"], told["experts_per_rank"]) == (64, "pp-outermost", 8)


def test_the_table_shows_both_mappings_and_every_rank(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(_words("--world 8 --tp 2 --cp 2 --ep 8 --experts 16")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "world 8 = attention tp2 x cp2 x dp2 x pp1 = experts etp1 x ep8 x edp1 x pp1"
    )
    assert "    cp     2       4  [0,2] [1,3] [4,6] [5,7]" in lines
    assert "    ep     8       1  [0,1,2,3,4,5,6,7]" in lines
    assert "16 experts, 2 on each ep rank" in lines
    assert "     5   0   1   0   1  |    0   5  0" in lines


def test_a_large_world_is_shown_in_lines_that_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(_words("--world 4096 --tp 4 --cp 2 --pp 8 --ep 16 --etp 2")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 20
    assert max(map(len, lines)) <= 100
    assert "  4095  " in table(ParallelDims(4096), with_ranks=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--world 64 --tp 3", "world=64 is not divisible by tp*cp*pp = 3*1*1 = 3"),
        ("--world 64 --ep 8 --experts 63", "63 experts cannot be shared out evenly over ep=8"),
        ("--world 8 --tp 2 --pp 2 --ep 4 --order listing-1", "use order 'pp-outermost'"),
    ],
)
def test_a_mapping_that_is_not_legal_ends_with_2_and_one_line(
    arguments: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_words(arguments)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert words in said.err
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("arguments", ["", "--world eight", "--wolrd 8"])
def test_wrong_arguments_end_with_2(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        main(_words(arguments))
    assert ending.value.code == 2
    assert "usage: python -m moe.layout" in capsys.readouterr().err


@pytest.mark.dist
def test_layouts_are_shown_without_loading_torch() -> None:
    program = (
        "import sys, runpy\n"
        f"sys.argv = ['moe.layout', *{DOCUMENTED!r}]\n"
        "try: runpy.run_module('moe.layout', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("world 64 = attention")
