"""`dgs snapshot` tells what a state directory holds, and gets out of a damaged one what is left."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import dgs
from dgs.cli.main import main
from dgs.durable import Durable
from dgs.state import fingerprint
from dgs.storage.disk import FolderDisk
from tests.dgs.cli.conftest import join
from tests.helpers.states import SPACE, Made, damage, files, flip, make_states

SNAPSHOTS = (3, 6)
NEWEST, OLDER, END = 18, 12, 28
ACTIONS = ("list", "verify", "repair", "export")


@pytest.fixture
def state(tmp_path: Path) -> tuple[Path, Made]:
    folder = tmp_path / "state"
    return folder, make_states([folder], SNAPSHOTS)


def snapshot(action: str, folder: Path, *options: str) -> int:
    out = ("--out", str(folder.parent / "out.safetensors")) if action == "export" else ()
    return main(["snapshot", action, "--state-dir", str(folder), *out, *options])


def told(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def file_of(folder: Path, start: str) -> Path:
    return next(iter(sorted(folder.glob(f"{start}*"))))


def newest(part: str) -> str:
    return f"snapshot-{NEWEST:020d}.{part}"


def start(folder: Path) -> tuple[int, str]:
    """Start a server on the folder."""
    with FolderDisk(folder, create=False) as disk:
        durable = Durable.open(disk)
        durable.close()
        return durable.position, fingerprint(durable.core.state)


def exported(folder: Path) -> dict[str, Any]:
    return load_file(folder.parent / "out.safetensors")


def assert_same_model(found: dict[str, Any], model: Any) -> None:
    wanted = SPACE.unflatten(model)
    assert sorted(found) == sorted(wanted)
    for name, values in wanted.items():
        assert np.array_equal(found[name], values), name


def test_list_shows_snapshots_and_log_newest_first(
    state: tuple[Path, Made], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = state[0]
    before = files(folder)
    assert snapshot("list", folder, "--json") == 0
    seen = told(capsys)
    assert [(s["position"], s["workers"], s["sound"]) for s in seen["snapshots"]] == [
        (NEWEST, 2, True),
        (OLDER, 2, True),
    ]
    assert seen["snapshots"][0]["version"] == 14
    assert [(s["first"], s["records"], s["sound"]) for s in seen["log"]] == [
        (NEWEST, END - NEWEST, True),
        (OLDER, NEWEST - OLDER, True),
    ]
    assert snapshot("list", folder) == 0
    assert capsys.readouterr().out.count("sound") == 4
    assert files(folder) == before


def test_sound_folder_is_proved_sound_and_left_alone(
    state: tuple[Path, Made], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, made = state
    before = files(folder)
    assert snapshot("verify", folder, "--json") == 0
    seen = told(capsys)
    assert (seen["sound"], seen["startable"], seen["problems"]) == (True, True, [])
    assert seen["state"]["fingerprint"] == made.fingerprints[0]
    assert seen["state"]["workers"] == ["site-0", "site-1"]
    assert (seen["state"]["version"], seen["state"]["position"]) == (24, END)
    assert seen["proof"].startswith("snapshot 12 and the 6 requests behind it give snapshot 18")
    assert snapshot("repair", folder) == 0
    assert "nothing is damaged" in capsys.readouterr().out
    assert snapshot("export", folder) == 0
    assert "version 24" in capsys.readouterr().out
    assert_same_model(exported(folder), made.model)
    assert files(folder) == before


HARMS: dict[str, Callable[[Path], object]] = {
    "flipped model": lambda folder: flip(file_of(folder, newest("model")), 0.5),
    "short replica": lambda folder: damage(
        file_of(folder, newest("session")), lambda data: data.__delitem__(slice(100, None))
    ),
    "missing part": lambda folder: file_of(folder, newest("session-1")).unlink(),
    "truncated manifest": lambda folder: damage(
        file_of(folder, newest("json")), lambda data: data.__delitem__(slice(40, None))
    ),
    "empty manifest": lambda folder: file_of(folder, newest("json")).write_bytes(b""),
}


@pytest.mark.parametrize("harm", HARMS)
def test_damaged_newest_snapshot_is_set_aside_and_nothing_is_lost(
    harm: str, state: tuple[Path, Made], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, made = state
    HARMS[harm](folder)
    before = files(folder)
    assert snapshot("verify", folder) == 1
    said = capsys.readouterr().out
    assert f"damaged: snapshot-{NEWEST:020d}." in said
    assert f"dgs snapshot repair --state-dir {folder}" in said
    assert f"dgs snapshot export --state-dir {folder} --out FILE" in said
    assert made.fingerprints[0] in said
    assert snapshot("export", folder) == 0
    assert_same_model(exported(folder), made.model)
    assert snapshot("repair", folder) == 1
    said = capsys.readouterr().out
    assert "nothing is lost" in said
    assert "add --yes" in said
    assert files(folder) == before
    assert snapshot("repair", folder, "--yes") == 0
    after = files(folder)
    assert sorted(before.values()) == sorted(after.values())
    assert all(name in after or f"damaged-{name}" in after for name in before)
    capsys.readouterr()
    assert snapshot("verify", folder, "--json") == 0
    assert told(capsys)["state"]["fingerprint"] == made.fingerprints[0]
    assert start(folder) == (END, made.fingerprints[0])


def test_damaged_middle_of_the_log_ends_the_state_there_and_says_what_is_lost(
    state: tuple[Path, Made], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, made = state
    log = folder / f"log-{NEWEST:020d}.wal"
    flip(log, 0.5)
    before = files(folder)
    assert snapshot("verify", folder, "--json") == 1
    seen = told(capsys)
    reached = seen["state"]["position"]
    assert not seen["startable"]
    assert NEWEST < reached < END
    assert seen["state"]["fingerprint"] == made.history[0][reached]
    assert snapshot("export", folder, "--json") == 0
    part = told(capsys)["shards"][0]
    assert (part["position"], part["version"]) == (reached, reached - 4)
    assert part["lost_bytes"] > 100
    assert f"sound up to request {reached}" in part["notes"][0]
    assert snapshot("repair", folder) == 1
    lost = f"{part['lost_bytes']:,} bytes behind that, with at least {END - reached} requests"
    said = capsys.readouterr().out
    assert lost in said
    assert "join again by themselves" in said
    assert files(folder) == before
    assert snapshot("repair", folder, "--yes") == 0
    assert files(folder)[f"damaged-{log.name}"] == before[log.name]
    assert start(folder) == (reached, made.history[0][reached])
    assert snapshot("verify", folder) == 0


def test_torn_end_of_the_log_is_no_damage(
    state: tuple[Path, Made], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = state[0]
    damage(folder / f"log-{NEWEST:020d}.wal", lambda data: data.__delitem__(slice(-9, None)))
    assert snapshot("verify", folder) == 0
    assert "torn end of the log, never acknowledged" in capsys.readouterr().out
    assert snapshot("list", folder) == 0
    assert "torn end: " in capsys.readouterr().out
    assert snapshot("repair", folder) == 0
    assert start(folder)[0] == END - 1


def test_damage_that_no_start_reads_is_told_and_left_to_the_next_snapshots(
    state: tuple[Path, Made], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, made = state
    flip(folder / f"log-{OLDER:020d}.wal", 0.5)
    assert snapshot("verify", folder, "--json") == 1
    seen = told(capsys)
    assert (seen["sound"], seen["startable"]) == (False, True)
    assert "starts from snapshot 18 all the same" in seen["problems"][0]
    assert snapshot("repair", folder) == 0
    assert start(folder) == (END, made.fingerprints[0])


def test_snapshot_that_the_log_does_not_lead_to_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "state"
    make_states([folder], SNAPSHOTS, rounds=1 + SNAPSHOTS[-1])
    with FolderDisk(folder) as disk:
        durable = Durable.open(disk)
        assert durable.core.state.shard is not None
        durable.core.state.shard.model[0] += 1.0
        durable.finish_snapshot(durable.begin_snapshot())
        durable.close()
    assert snapshot("verify", folder) == 1
    assert "gives another state than snapshot 18" in capsys.readouterr().out


def test_without_a_sound_snapshot_the_model_is_all_that_is_saved(
    state: tuple[Path, Made], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = state[0]
    for position in (NEWEST, OLDER):
        file_of(folder, f"snapshot-{position:020d}.session-1").unlink()
    assert snapshot("verify", folder) == 1
    assert "holds no sound snapshot" in capsys.readouterr().out
    assert snapshot("repair", folder, "--yes") == 1
    assert "dgs snapshot export" in capsys.readouterr().err
    assert snapshot("export", folder) == 0
    said = capsys.readouterr()
    assert "the model of snapshot 18, without any log" in said.err
    assert "version 14" in said.out
    for position in (NEWEST, OLDER):
        flip(file_of(folder, f"snapshot-{position:020d}.model"), 0.7)
    assert snapshot("export", folder) == 1
    assert "no model can be saved" in capsys.readouterr().err


@pytest.mark.parametrize("action", ACTIONS)
def test_newer_format_is_refused_and_nothing_is_touched(
    action: str, state: tuple[Path, Made], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = state[0]
    manifest = folder / newest("json")
    manifest.write_text(manifest.read_text().replace('"format":1', '"format":2'))
    before = files(folder)
    assert snapshot(action, folder) == 1
    said = capsys.readouterr().err
    assert "written by a newer release: it has format 2, this one reads up to 1" in said
    assert files(folder) == before


def test_log_of_another_server_is_told_apart(
    state: tuple[Path, Made], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = state[0]
    make_states([tmp_path / "a", tmp_path / "b"], SNAPSHOTS)
    log = f"log-{NEWEST:020d}.wal"
    (folder / log).write_bytes((tmp_path / "b" / log).read_bytes())
    before = files(folder)
    assert snapshot("verify", folder) == 1
    assert "is of run 12 from record 18 on, expected run 11" in capsys.readouterr().out
    assert snapshot("list", folder) == 0
    assert "is of run 12" in capsys.readouterr().out
    assert snapshot("repair", folder, "--yes") == 1
    assert "put back those of this one" in capsys.readouterr().err
    assert files(folder) == before
    assert snapshot("export", folder) == 0
    assert "the model of snapshot 18, without any log" in capsys.readouterr().err


@pytest.mark.parametrize("action", ACTIONS)
def test_what_is_no_state_directory_is_refused(
    action: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, file = tmp_path / "empty", tmp_path / "file"
    empty.mkdir()
    file.touch()
    for path, words in (
        (empty, "holds no state of a server"),
        (file, "cannot use"),
        (tmp_path / "missing", "No such file or directory"),
    ):
        assert snapshot(action, path) == 1
        assert words in capsys.readouterr().err
    assert list(empty.iterdir()) == []
    assert not (tmp_path / "missing").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everywhere")
@pytest.mark.parametrize("action", ACTIONS)
def test_folder_that_may_not_be_read_is_named(
    action: str, state: tuple[Path, Made], capsys: pytest.CaptureFixture[str]
) -> None:
    state[0].chmod(0)
    assert snapshot(action, state[0]) == 1
    assert "Permission denied" in capsys.readouterr().err
    state[0].chmod(0o700)


def test_folder_in_use_is_listed_and_verified_and_not_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "state"
    with dgs.serve("127.0.0.1:0", state_dir=folder) as server:
        join(server.address, seed=1).close()
        assert snapshot("list", folder, "--json") == 0
        assert told(capsys)["snapshots"][0]["position"] == 0
        assert snapshot("verify", folder) == 0
        said = capsys.readouterr()
        assert f"in use by process {os.getpid()}: it is read as it is" in said.err
        assert said.out.endswith("sound\n")
        for action, words in (("repair", "stop that one first"), ("export", "'dgs pull' writes")):
            assert snapshot(action, folder) == 1
            assert words in capsys.readouterr().err


def test_shards_are_exported_alone_or_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [tmp_path / f"shard-{i}" for i in range(2)]
    made = make_states(folders, SNAPSHOTS)
    assert snapshot("export", folders[1], "--json") == 0
    seen = told(capsys)
    found = exported(folders[1])
    assert seen["missing"] == [t.name for t in SPACE.tensors if t.name not in found]
    wanted = SPACE.unflatten(made.model)
    assert all(np.array_equal(values, wanted[name]) for name, values in found.items())
    assert found
    assert seen["missing"]
    assert snapshot("export", folders[1], "--state-dir", str(folders[0]), "--json") == 0
    seen = told(capsys)
    assert (seen["missing"], seen["version"], seen["run"]) == ([], "24,24", "11,12")
    assert_same_model(exported(folders[0]), made.model)
    out = tmp_path / "again.safetensors"
    assert main(["snapshot", "export", "--state-dir", str(tmp_path), "--out", str(out)]) == 0
    assert_same_model(load_file(out), made.model)
    capsys.readouterr()
    assert main(["snapshot", "verify", "--state-dir", str(tmp_path)]) == 1
    assert "name one of its folders shard-0, shard-1" in capsys.readouterr().err


def test_folders_that_are_not_of_one_model_are_refused(
    state: tuple[Path, Made], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [tmp_path / f"part-{i}" for i in range(2)]
    make_states(folders, SNAPSHOTS)
    assert snapshot("export", folders[0], "--state-dir", str(state[0])) == 1
    assert "give the folders of the 2 servers of one model" in capsys.readouterr().err


def test_server_that_nobody_joined_has_no_model_to_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "state"
    with FolderDisk(folder) as disk:
        Durable.open(disk).close()
    assert snapshot("verify", folder) == 0
    assert snapshot("export", folder) == 1
    assert "no worker has joined" in capsys.readouterr().err


def test_no_action_is_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["snapshot"])
    assert "list, verify, export or repair" in capsys.readouterr().err
