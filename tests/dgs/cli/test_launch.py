"""`dgs launch` runs a user's script as it is, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

import dgs
from dgs.cli.course import exit_code
from dgs.cli.launch import worker_commands
from dgs.cli.main import main
from dgs.cli.revival import choose_folders
from dgs.errors import ConfigError
from tests.helpers.credentials import Credentials
from tests.helpers.processes import Spoken, has_ended
from tests.helpers.scripts import act, train
from tests.helpers.source_tree import ROOT

pytestmark = pytest.mark.dist

ACT = str(Path(act.__file__))
NOBODY = ("--server", "127.0.0.1:1")
"""Servers that are never spoken to: for workers without a model."""

NO_NAME = "a" * 64
"""Too long for the name of a host, so that no resolver needs to be asked."""


def launch(*argv: str) -> int:
    return main(["launch", *argv])


def loss(model: torch.nn.Module) -> float:
    inputs, labels = train.make_data()
    with torch.no_grad():
        return functional.cross_entropy(model.eval()(inputs), labels).item()


def test_script_trains_one_model_on_two_shards_and_the_model_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    saved = tmp_path / "model.safetensors"
    options = ("--workers", "4", "--servers", "2", "--save", str(saved))
    assert launch(*options, train.__file__, "--steps", "60") == 0
    said = capsys.readouterr()
    for worker in range(4):
        assert f"[worker {worker}] exchanges 60\n" in said.out
    assert re.search(r"4 workers, server 127\.0\.0\.1:\d+,127\.0\.0\.1:\d+\n", said.err)
    assert f"wrote {saved}: " in said.err
    assert said.err.endswith("the model after 240 updates\n")
    assert "no worker has joined" not in said.err
    model = train.make_model(seed=0)
    before = loss(model)
    model.load_state_dict(load_file(saved), strict=True)
    assert loss(model) < 0.7 * before


def test_failed_worker_is_started_again_and_rejoins_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    init, model = tmp_path / "init.safetensors", train.make_model(seed=9)
    save_file(model.state_dict(), init)
    options = ("--workers", "1", "--max-restarts", "1", "--init", str(init), "--no-prefix")
    assert launch(*options, train.__file__, "--steps=20", f"--fail-once={tmp_path / 'x'}") == 0
    said = capsys.readouterr()
    starts = [float(line.split()[1]) for line in said.out.splitlines() if line[:6] == "start "]
    weight = model.get_parameter("0.weight")
    assert starts[0] == weight.double().sum().item()
    assert starts[1] not in (
        starts[0],
        train.make_model(seed=0).get_parameter("0.weight").double().sum().item(),
    )
    assert "worker 0 ended with exit code 5; restart 1 of 1" in said.err
    assert "exchanges 20" in said.out


def test_arguments_and_environment_reach_the_script(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    own = ("all:tell", "--workers", "9", "-m", "x", "--", "--debug")
    assert launch("--workers", "2", *NOBODY, ACT, *own) == 0
    said = capsys.readouterr()
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert sorted(said.out.splitlines()) == [
        f"[worker {i}] {list(own)} DGS_NUM_WORKERS=2 DGS_RANK={i} DGS_SERVER=127.0.0.1:1 "
        f"DGS_WORKER=worker-{i} OMP_NUM_THREADS={threads} PYTHONUNBUFFERED=1"
        for i in range(2)
    ]
    assert said.err.count("OMP_NUM_THREADS") == 1


def test_module_is_run_like_a_script(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert launch("--workers", "1", *NOBODY, "--no-prefix", "-m", act.__name__, "0:tell", "-m") == 0
    assert capsys.readouterr().out.startswith("['0:tell', '-m'] ")


@pytest.mark.parametrize(
    ("action", "code", "words"),
    [
        ("exit=7", 7, "ended with exit code 7"),
        ("kill=9", 137, "was ended by SIGKILL"),
        ("signal=15", 143, ""),
        ("signal=2", 130, "interrupted: waiting for the workers"),
        ("again=2", 130, "interrupted: waiting for the workers"),
    ],
)
def test_run_ends_with_the_worker_that_fails_or_the_signal_that_came(
    action: str, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch("--workers", "3", *NOBODY, ACT, f"1:{action}") == code
    assert words in capsys.readouterr().err


def test_restarts_are_counted_per_worker_and_used_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    actions = [f"{i}:once={tmp_path / str(i)}" for i in range(2)]
    assert launch("--workers", "2", "--max-restarts", "1", *NOBODY, ACT, *actions) == 0
    assert capsys.readouterr().err.count("restart 1 of 1") == 2
    assert launch("--workers", "1", "--max-restarts", "2", *NOBODY, ACT, "0:exit=4") == 4
    assert "restart 2 of 2" in capsys.readouterr().err


def test_ctrl_c_ends_everything_with_130() -> None:
    argv = ("launch", "--workers", "1", ACT, "0:family")
    with Spoken(sys.executable, "-m", "dgs", *argv) as launcher:
        family = [int(pid) for pid in launcher.line_with("family").split()[-2:]]
        launched = [pid for pid in children(launcher.process.pid) if pid not in family]
        launcher.process.send_signal(signal.SIGINT)
        assert launcher.ends_with() == 130
        assert len(launched) == 2, "the server, and the watchdog"
        assert all(has_ended(pid) for pid in family + launched)


def children(pid: int) -> list[int]:
    listings = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for listing in listings for child in listing.read_text().split()]


def test_server_that_dies_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert launch("--workers", "1", "--save", str(tmp_path / "m"), ACT, "0:server") == 1
    said = capsys.readouterr().err
    assert "server 0 was ended by SIGKILL while workers were training" in said
    assert f"nothing was saved to {tmp_path / 'm'}: the model was in the server that has" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("action", "code"), [("exit=7", 7), ("kill=9", 137), ("signal=2", 130), ("signal=15", 143)]
)
def test_run_that_does_not_end_well_saves_what_it_has_reached(
    shards: str, action: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "model.safetensors"
    options = ("--workers", "2", "--server", shards, "--save", str(saved))
    assert launch(*options, ACT, f"1:{action}") == code
    model = train.make_model(seed=0)
    model.load_state_dict(load_file(saved), strict=True)
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"dgs: wrote {saved}: ")
    assert "the model after 0 updates; what was reached" in said


def test_run_that_could_not_save_says_so(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m"
    for address, action, code, why in (
        (server, "exit=7", 7, f"{server} has no model yet: no worker has joined"),
        (NOBODY[1], "again=2", 130, "interrupted twice"),
    ):
        options = ("--workers", "1", "--server", address, "--save", str(out))
        assert launch(*options, ACT, f"0:{action}") == code
        said = capsys.readouterr().err.splitlines()[-1]
        assert said == f"dgs: nothing was saved to {out}: {why}"
    assert list(tmp_path.iterdir()) == []


def test_reader_that_goes_away_ends_the_run_quietly_and_the_model_is_saved(
    shards: str, tmp_path: Path
) -> None:
    saved = tmp_path / "m"
    command = f"{sys.executable} -m dgs launch --workers 2 --server {shards} --save {saved}"
    with Spoken("sh", "-c", f"({command} {ACT} all:talk; echo code $? >&2) | head -n 1") as shell:
        assert shell.ends_with() == 0
    assert shell.lines[-1] == "code 141", shell.output
    assert "Traceback" not in shell.output
    assert f"dgs: wrote {saved}: " in shell.output
    assert saved.stat().st_size > 0


def test_run_that_no_worker_has_joined_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert launch("--workers", "1", "--save", str(tmp_path / "m"), ACT, "0:exit=0") == 1
    said = capsys.readouterr().err
    assert "no worker has joined the server" in said
    assert "dgs.DistributedOptimizer" in said
    assert re.search(r"dgs: error: nothing was saved to .*/m: .* has no model yet", said)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["no-such-script.py"], "no script 'no-such-script.py'"),
        (["--save", "no-such-folder/m", ACT], "no directory 'no-such-folder'"),
        (["--init", "no-such-file", ACT], "cannot read no-such-file"),
        (["--save", "/proc/x", ACT], "cannot write /proc/x: no file can be made in /proc"),
        (["--server", "nowhere", ACT], "'nowhere' is not a server address"),
        (["--server", f"127.0.0.1:1,{NO_NAME}:1", ACT], f"the name '{NO_NAME}' does not resolve"),
    ],
)
def test_what_cannot_work_is_told_before_anything_is_started(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch("--workers", "2", *options) == 1
    said = capsys.readouterr().err
    assert words in said
    assert said.startswith("dgs: error: ")
    assert said.count("\n") == 1


def test_threads_are_shared_among_workers_unless_chosen() -> None:
    several = worker_commands(["a"], ["b:1"], 4096, {})
    assert {c.env["OMP_NUM_THREADS"] for c in several} == {"1"}
    assert len({c.env["DGS_WORKER"] for c in several}) == len({c.label for c in several}) == 4096
    (chosen,) = worker_commands(["a"], ["b:1"], 1, {"OMP_NUM_THREADS": "3"})
    assert "OMP_NUM_THREADS" not in chosen.env


def test_exit_codes_are_those_of_a_shell() -> None:
    assert [exit_code(c) for c in (0, 1, 255, -2, -15)] == [0, 1, 255, 130, 143]


@pytest.mark.slow
def test_killed_server_is_started_again_and_the_next_launch_goes_on_from_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    state, saved = tmp_path / "state", tmp_path / "model.safetensors"
    options = ("--workers", "2", "--servers", "2", "--state-dir", str(state), "--save", str(saved))
    script = (train.__file__, "--steps", "30", "--kill-server-at", "10")
    assert launch(*options, *script) == 0
    said = capsys.readouterr()
    assert re.search(
        r"server 0 was ended by SIGKILL; it is started again on 127\.0\.0\.1:\d+ \(restart 1 of",
        said.err,
    )
    assert "recovered version" in said.out
    for worker in range(2):
        assert f"[worker {worker}] exchanges 30\n" in said.out
    assert said.err.endswith("the model after 60 updates\n")
    assert "going on" not in said.err
    model = train.make_model(seed=0)
    before = loss(model)
    model.load_state_dict(load_file(saved), strict=True)
    assert loss(model) < before
    without_servers = ("--workers", "1", "--state-dir", str(state), "--save", str(saved))
    assert launch(*without_servers, ACT, "0:exit=0") == 0
    said = capsys.readouterr()
    assert f"going on from version 60 in {state}" in said.err
    assert said.err.endswith("the model after 60 updates\n")
    assert launch(*options[:2], "--servers", "3", "--state-dir", str(state), ACT) == 1
    assert "holds the states of 2 servers (shard-0, shard-1), expected" in capsys.readouterr().err


def test_server_that_does_not_start_again_ends_the_run_with_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    state = tmp_path / "state"
    options = ("--workers", "1", "--state-dir", str(state), "--save", str(tmp_path / "m"))
    assert launch(*options, ACT, f"0:ruin={state / 'shard-0'}") == 1
    said = capsys.readouterr().err
    assert said.count("it is started again") == 3
    assert "server 0 ended with exit code 1 before it listened, 3 times in a row" in said
    assert "dgs: error: " in said
    assert "are not a manifest" in said
    assert f"dgs snapshot export --state-dir {state} --out FILE" in said
    assert not (tmp_path / "m").exists()


def test_restarts_of_a_server_are_used_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    options = ("--workers", "1", "--state-dir", str(tmp_path / "s"), "--max-server-restarts", "0")
    assert launch(*options, ACT, "0:server") == 1
    said = capsys.readouterr().err
    assert "server 0 was ended by SIGKILL after 0 restarts in a row" in said
    assert f"is in {tmp_path / 's'}: launch again to go on" in said


@pytest.mark.parametrize(
    ("made", "count", "words"),
    [
        (["shard-0", "shard-1"], 1, "of 2 servers (shard-0, shard-1), expected those of 1"),
        (["shard-0"], 2, "of 1 servers (shard-0), expected those of 2"),
        (["shard-0", "shard-2"], None, "of 2 servers (shard-0, shard-2), expected those of 2"),
        (["."], None, "holds the state of one 'dgs server"),
    ],
)
def test_folder_of_other_servers_is_refused(
    made: list[str], count: int | None, words: str, tmp_path: Path
) -> None:
    for name in made:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "snapshot-00000000000000000000.json").touch()
    with pytest.raises(ConfigError, match=re.escape(words)):
        choose_folders(tmp_path, count)


def test_as_many_servers_are_started_as_there_are_states(tmp_path: Path) -> None:
    folders = [tmp_path / f"shard-{i}" for i in range(3)]
    assert choose_folders(tmp_path / "new", None) == ([tmp_path / "new" / "shard-0"], True)
    assert choose_folders(tmp_path, 3) == (folders, True)
    for folder in folders:
        folder.mkdir()
    assert choose_folders(tmp_path, 2) == (folders[:2], True)  # made, but never used
    for folder in folders:
        (folder / "snapshot-00000000000000000000.json").touch()
    assert choose_folders(tmp_path, None) == (folders, False)


def test_servers_of_its_own_are_reached_whatever_the_user_has_set_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for variable in ("DGS_TLS_CA", "DGS_TLS_CERT", "DGS_TLS_KEY", "DGS_TOKEN_FILE"):
        monkeypatch.setenv(variable, str(tmp_path / "of-another-server"))
    saved = tmp_path / "model.safetensors"
    options = ("--workers", "1", "--save", str(saved))
    assert launch(*options, train.__file__, "--steps", "2") == 0
    assert saved.exists()


def test_workers_reach_a_server_with_the_certificate_and_the_token_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    files = Credentials(tmp_path)
    monkeypatch.setenv("DGS_TLS_CA", str(files.ca.path))
    monkeypatch.setenv("DGS_TOKEN_FILE", str(files.add_token("worker-*", "exchange")))
    saved = tmp_path / "model.safetensors"
    with dgs.serve("127.0.0.1:0", security=files.serving(tokens=True)) as handle:
        options = ("--workers", "2", "--server", handle.address, "--save", str(saved))
        assert launch(*options, train.__file__, "--steps", "2") == 0
    assert saved.exists()
