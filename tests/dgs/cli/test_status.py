"""`dgs status` shows what the servers say, to people and to programs."""

from __future__ import annotations

import json
import signal
import sys
import time
from datetime import datetime

import pytest

import dgs
from dgs._proto import parameter_server_pb2 as pb
from dgs.cli.console import print_table
from dgs.cli.main import main
from dgs.cli.status import describe_reply
from dgs.cli.status_tables import Described, tables, troubles
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
        first, *_ = (line for line in lines if line.startswith(address))
        assert f"{shard}/2" in first
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


def faked(**storage: object) -> Described:
    """Return what a server with everything there is to tell would be described as."""
    reply = pb.StatusReply(run=7, ready=True, version=12, num_shards=1, range_stop=899, evicted=3)
    reply.workers.add(worker="first", exchanges=12)
    limits = pb.Limits(
        max_workers=1024,
        record_bytes=3_596,
        reply_bytes=1_500_000,
        max_reply_bytes=2_000_000,
        max_in_flight_bytes=1_000_000_000,
        in_flight_bytes=2_500_000,
        put_off=4,
        lease_s=3600.0,
    )
    reply.limits.CopyFrom(limits)
    if storage:
        reply.storage.CopyFrom(pb.Storage(**storage))
    return {"time": "2024-01-02T03:04:05+00:00", "servers": [describe_reply("ps:7070", reply)]}


def by_column(status: Described, title: str) -> dict[str, str]:
    ((_, columns, (row,)),) = (t for t in tables(status) if t[0].startswith(title))
    return dict(zip(columns, row, strict=True))


def test_limits_are_shown_in_human_units() -> None:
    assert by_column(faked(), "memory") == {
        "server": "ps:7070",
        "sessions": "1/1024",
        "records": "3.6 kB",
        "replies": "1.5 MB/2.0 MB",
        "in flight": "2.5 MB/1.0 GB",
    }
    assert by_column(faked(), "turned away") == {
        "server": "ps:7070",
        "put off": "4",
        "evicted": "3",
        "lease": "1 h 0 min",
    }


def test_storage_is_shown_where_there_is_any_and_its_trouble_below() -> None:
    fields = {
        "position": 120,
        "durable": 118,
        "snapshot_position": 100,
        "snapshot_age_s": 75.0,
        "log_bytes": 2_000_000,
    }
    well = faked(**fields)
    assert by_column(well, "storage") == {
        "server": "ps:7070",
        "applied": "120",
        "on disk": "118",
        "snapshot": "100",
        "age": "1 min 15 s",
        "log": "2.0 MB",
        "state": "ok",
    }
    assert troubles(well) == []
    ill = faked(**fields, trouble="No space left on device")
    assert by_column(ill, "storage")["state"] == "TROUBLE"
    assert troubles(ill) == ["server ps:7070 acknowledges nothing: No space left on device"]
    assert [title for title, _, _ in tables(faked()) if title.startswith("storage")] == []


def test_json_holds_limits_evictions_and_storage_by_the_names_of_the_service() -> None:
    told = json.loads(json.dumps(faked(position=5, durable=5)))["servers"][0]
    assert (told["evicted"], told["limits"]["in_flight_bytes"]) == (3, 2_500_000)
    assert set(told["limits"]) == {f.name for f in pb.Limits.DESCRIPTOR.fields}
    assert set(told["storage"]) == {f.name for f in pb.Storage.DESCRIPTOR.fields}
    assert told["storage"]["trouble"] == ""
    assert describe_reply("ps:7070", pb.StatusReply())["limits"] is None


def test_tables_fit_an_ordinary_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    for parts in tables(faked(position=1, trouble="it is full")):
        print_table(*parts)
    assert all(len(line) <= 80 for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize(("days", "trouble"), [(300.0, False), (3.0, True), (-3.0, True)])
def test_the_end_of_a_certificate_is_shown_and_a_near_one_is_a_trouble(
    days: float, trouble: bool
) -> None:
    ends_s = time.time() + days * 86400
    reply = pb.StatusReply(
        security=pb.Security(tls=True, tokens=True, certificate_ends_s=ends_s, turned_away=3)
    )
    status = {"time": "", "servers": [describe_reply("ps:7070", reply)]}
    (rows,) = [rows for title, _, rows in tables(status) if title.startswith("security")]
    (row,) = rows
    assert row[:3] == ["ps:7070", "yes", "token"]
    assert row[3].startswith(time.strftime("%Y-%m-%d", time.gmtime(ends_s)))
    assert ("EXPIRED" in row[3]) is (days < 0)
    assert row[4] == "3"
    assert bool(troubles(status)) is trouble
    if trouble:
        assert "needs a new certificate" in troubles(status)[0]
