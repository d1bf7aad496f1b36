"""`dgs status` shows what the servers say, to people and to programs."""

from __future__ import annotations

import json
import signal
import sys
from datetime import datetime

import pytest

import dgs
from dgs.cli.main import main
from tests.dgs.cli.conftest import join
from tests.helpers.processes import Spoken


def test_json_lists_shards_and_their_workers(
    shards: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", "--server", shards, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert datetime.fromisoformat(told["time"]).tzinfo is not None
    servers = told["servers"]
    assert [s["address"] for s in servers] == shards.split(",")
    assert [(s["shard"], s["num_shards"]) for s in servers] == [(0, 2), (1, 2)]
    assert servers[0]["range"][1] == servers[1]["range"][0]
    assert servers[1]["range"][1] == 899
    assert [w["worker"] for s in servers for w in s["workers"]] == ["first", "first"]


def test_tables_have_one_row_per_shard_and_per_worker(
    shards: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", "--server", shards]) == 0
    lines = capsys.readouterr().out.splitlines()
    for shard, address in enumerate(shards.split(",")):
        (row,) = (line for line in lines if line.startswith(address))
        assert f"{shard}/2" in row
    (row,) = (line for line in lines if line.startswith("first"))
    assert " s ago " in row
    assert all(len(line) <= 80 for line in lines)


def test_server_without_a_model_says_so(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--server", server]) == 0
    assert "no model yet" in capsys.readouterr().out


def test_counts_are_those_of_the_exchanges(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    opt = join(server, seed=1)
    opt.step()
    assert main(["status", "--server", server, "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["servers"]
    opt.close()
    assert (told["version"], told["workers"][0]["exchanges"]) == (1, 1)
    assert (told["bytes_up"], told["bytes_down"]) == (opt.stats.bytes_up, opt.stats.bytes_down)


def test_worker_that_does_not_exchange_falls_behind(
    server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    idle, busy = join(server, seed=1, worker="idle"), join(server, seed=1, worker="busy")
    for _ in range(3):
        busy.step()
    assert main(["status", "--server", server, "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["servers"]
    assert {w["worker"]: w["behind"] for w in told["workers"]} == {"idle": 3, "busy": 0}
    assert main(["status", "--server", server]) == 0
    lines = capsys.readouterr().out.splitlines()
    (columns,) = (line.split() for line in lines if line.startswith("worker "))
    (row,) = (line.split("ago")[1].split() for line in lines if line.startswith("idle"))
    assert row[columns.index("behind") - 2] == "3"
    for opt in (idle, busy):
        opt.close()


@pytest.mark.dist
@pytest.mark.parametrize("form", [[], ["--json"]], ids=["lines", "json"])
def test_watch_outlives_a_server_that_goes_away_and_ends_on_ctrl_c(form: list[str]) -> None:
    with dgs.serve("127.0.0.1:0") as handle:
        address = handle.address
        argv = ["status", "--server", address, "--watch", "0.05", *form]
        here = '"ready": false' if form else "no model yet"
        away = '"error": ' if form else f"server {address} does not answer: "
        watch = Spoken(sys.executable, "-m", "dgs", *argv)
        with watch:
            watch.line_with(here)
            handle.stop()
            watch.line_with(away)
            with dgs.serve(address):
                watch.line_with(here)
                watch.process.send_signal(signal.SIGINT)
                assert watch.ends_with() == 130
            assert watch.lines[-1] == "dgs: interrupted"
            assert "Traceback" not in watch.output
    stamp = json.loads(watch.lines[0])["time"] if form else watch.lines[0]
    assert (
        abs(
            (
                datetime.now().astimezone() - datetime.fromisoformat(stamp).astimezone()
            ).total_seconds()
        )
        < 600
    )


def test_unreachable_server_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--server", "127.0.0.1:1", "--timeout-s", "0.3"]) == 1
    assert "gave up on server 127.0.0.1:1 after" in capsys.readouterr().err
