"""The program's help, errors and exit codes."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

import pytest

from dgs.cli.main import main, make_parser
from dgs.errors import ConfigError
from tests.helpers.processes import Spoken
from tests.helpers.source_tree import ROOT

COMMANDS = ("server", "launch", "pull", "status", "snapshot", "demo")


def test_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.startswith("dgs ")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_shows_an_example_that_parses(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    lines = capsys.readouterr().out.partition("example")[2].splitlines()[1:]
    examples = [line.split() for line in lines if line.strip().startswith("dgs ")]
    assert examples
    for words in examples:
        assert make_parser().parse_args(words[1:]).run is not None


def test_no_command_is_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "launch" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["train"],
        ["server"],
        ["pull", "--server", "127.0.0.1:1"],
        ["server", "--listen", "127.0.0.1:0", "--max-workers", "0"],
        ["server", "--listen", "127.0.0.1:0", "--hash-interval", "-1"],
        ["status", "--server", "127.0.0.1:1", "--timeout-s", "nan"],
        ["launch", "--workers", "2"],
        ["launch", "--workers", "2", "-m"],
        ["launch", "--workers", "2", "--unknown", "train.py"],
        ["launch", "--workers", "2", "--servers", "1", "--server", "127.0.0.1:1", "train.py"],
        ["launch", "--workers", "2", "--server", "127.0.0.1:1", "--init", "a", __file__],
        ["launch", "--workers", "2", "--server", "127.0.0.1:1", "--state-dir", "a", __file__],
        ["launch", "--workers", "2", "--max-server-restarts", "2", __file__],
    ],
    ids=" ".join,
)
def test_wrong_use_ends_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    assert "dgs" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["pull", "--server", "127.0.0.1:1", "--out", "m", "--wrong"],
        ["status", "--server", "127.0.0.1:1", "--wrong"],
        ["server", "--listen", "127.0.0.1:0", "--wrong"],
        ["launch", "--workers", "2", "--wrong", "train.py"],
        ["demo", "--wrong"],
    ],
    ids=lambda argv: argv[0],
)
def test_unknown_option_shows_the_usage_of_its_command(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    said = capsys.readouterr().err
    assert said.startswith(f"usage: dgs {argv[0]} ")
    assert "--wrong" in said


def test_error_is_one_line_and_debug_shows_where_it_was_raised(
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong = ["status", "--server", "nowhere"]
    assert main(wrong) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("dgs: error: 'nowhere' is not a server address")
    assert said.err.count("\n") == 1
    for argv in (["--debug", *wrong], [*wrong, "--debug"]):
        with pytest.raises(ConfigError, match="nowhere"):
            main(argv)


def test_ctrl_c_ends_with_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(args: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("dgs.cli.status.run", interrupted)
    assert main(["status", "--server", "127.0.0.1:1"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.dist
def test_reader_that_goes_away_ends_the_program_quietly(server: str) -> None:
    status = f"{sys.executable} -m dgs status --server {server} --watch 0.01 --json"
    with Spoken("sh", "-c", f"({status}; echo code $? >&2) | head -n 1") as shell:
        shell.line_with('"address"')
        assert shell.ends_with() == 0
        assert shell.lines[1:] == ["code 141"], shell.output


SLOW_TORCH = """
import sys, threading
print("importing torch", flush=True)
try:
    threading.Event().wait(60.0)
except BaseException:  # as some modules do
    pass
sys.exit("nobody interrupted the import")
"""


@pytest.mark.dist
@pytest.mark.parametrize("command", ["status", "launch", "server"])
def test_ctrl_c_while_torch_is_imported_ends_quietly_with_130(command: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(SLOW_TORCH)
    with Spoken(sys.executable, "-m", "dgs", command, PYTHONPATH=f"{tmp_path}:{ROOT}") as program:
        program.line_with("importing torch")
        program.process.send_signal(signal.SIGINT)
        assert program.ends_with() == 130
        assert program.lines == ["importing torch", "dgs: interrupted"]
