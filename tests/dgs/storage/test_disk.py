"""Disks: the contract, kept by the real folder and by the one in memory; locks and rights."""

from __future__ import annotations

import os
import random
import re
import resource
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from dgs.errors import StateError
from dgs.storage.disk import LOCK, Disk, FolderDisk, explained
from tests.helpers.disks import ForgetfulDisk, PowerLossError


@pytest.fixture(params=["folder", "memory"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    if request.param == "memory":
        yield ForgetfulDisk()
    else:
        with FolderDisk(tmp_path / "state") as folder:
            yield folder


def put(disk: Disk, name: str, data: bytes) -> None:
    with closing(disk.open(name)) as file:
        file.write(data)
        file.sync()
    disk.sync()


def get(disk: Disk, name: str) -> bytes:
    with closing(disk.open(name)) as file:
        return file.read()


def test_what_is_written_is_read_from_the_start_and_goes_to_the_end(disk: Disk) -> None:
    with closing(disk.open("a")) as file:
        assert file.read() == b""
        file.write(b"one")
        assert file.read() == b"one"
        file.write(b"")
        file.write(b"two")
        assert file.read() == b"onetwo"
    put(disk, "a", b"three")
    assert get(disk, "a") == b"onetwothree"


def test_what_is_truncated_is_written_on_from_there(disk: Disk) -> None:
    with closing(disk.open("a")) as file:
        file.write(b"abcdef")
        file.truncate(2)
        file.write(b"X")
        assert file.read() == b"abX"


def test_two_that_have_a_file_open_see_the_same(disk: Disk) -> None:
    with closing(disk.open("a")) as one, closing(disk.open("a")) as two:
        one.write(b"x")
        two.write(b"y")
        assert one.read() == two.read() == b"xy"


def test_names_are_sorted_and_opening_creates(disk: Disk) -> None:
    assert disk.names() == []
    for name in ("b", "a", "c"):
        disk.open(name).close()
    assert disk.names() == ["a", "b", "c"]


def test_rename_replaces_and_remove_removes(disk: Disk) -> None:
    put(disk, "a", b"new")
    put(disk, "b", b"old")
    disk.rename("a", "b")
    assert disk.names() == ["b"]
    assert get(disk, "b") == b"new"
    disk.remove("b")
    assert disk.names() == []


def test_what_is_not_there_is_not_renamed_or_removed(disk: Disk) -> None:
    with pytest.raises(FileNotFoundError):
        disk.rename("a", "b")
    with pytest.raises(FileNotFoundError):
        disk.remove("a")


def test_close_may_be_repeated(disk: Disk) -> None:
    file = disk.open("a")
    file.close()
    file.close()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a\\b", "a\0", LOCK])
def test_names_that_lead_elsewhere_are_refused(disk: Disk, name: str) -> None:
    put(disk, "a", b"")
    for attempt in (disk.open, disk.remove, lambda n: disk.rename("a", n)):
        with pytest.raises(ValueError, match="does not name a file"):
            attempt(name)
    assert disk.names() == ["a"]


def test_large_writes_come_back_whole(disk: Disk) -> None:
    data = random.Random(1).randbytes(3 << 20)
    put(disk, "a", data)
    assert get(disk, "a") == data


def test_trouble_is_explained_with_place_and_cause(disk: Disk) -> None:
    wanted = f"cannot mend it in {re.escape(disk.label)}: No such file"
    with pytest.raises(StateError, match=wanted), explained(disk, "mend it"):
        disk.remove("a")


def test_second_holder_is_refused_and_told_who_has_it(tmp_path: Path) -> None:
    with (
        FolderDisk(tmp_path),
        pytest.raises(StateError, match=f"in use by process {os.getpid()}; stop"),
    ):
        FolderDisk(tmp_path)


def test_lock_is_released_on_close_and_when_its_holder_is_killed(tmp_path: Path) -> None:
    FolderDisk(tmp_path).close()
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from dgs.storage.disk import FolderDisk\n"
        "disk = FolderDisk(Path(sys.argv[1]))\n"
        "print(os.getpid(), flush=True)\n"
        "sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        try:
            assert holder.stdout is not None
            pid = holder.stdout.readline().strip()
            assert pid == str(holder.pid)
            with pytest.raises(StateError, match=f"process {pid};"):
                FolderDisk(tmp_path)
        finally:
            holder.kill()
    with FolderDisk(tmp_path) as disk:
        assert disk.names() == []


def test_closed_folder_does_nothing_more(tmp_path: Path) -> None:
    disk = FolderDisk(tmp_path)
    disk.close()
    disk.close()
    for attempt in (disk.names, disk.sync, lambda: disk.open("a"), lambda: disk.remove("a")):
        with pytest.raises(OSError, match="Bad file descriptor"):
            attempt()


def test_folder_is_made_with_its_parents_for_its_owner_only(tmp_path: Path) -> None:
    with FolderDisk(tmp_path / "a" / "b") as disk:
        disk.open("x").close()
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "a" / "b" / "x").stat().st_mode) == 0o600


def test_folder_that_is_not_there_is_not_made_for_readers(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="No such file"):
        FolderDisk(tmp_path / "a", create=False)
    assert not (tmp_path / "a").exists()


def test_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StateError, match="cannot use"):
            FolderDisk(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_the_right_to_write_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StateError, match="Permission denied"):
        FolderDisk(tmp_path)


def test_denied_rights_are_explained_for_root_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # only the system's answer is made up here; root is never denied
    def deny(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("dgs.storage.disk.os.open", deny)
    with pytest.raises(StateError, match="Permission denied; name a folder"):
        FolderDisk(tmp_path)


def test_subfolders_links_and_the_lock_are_not_files_of_the_disk(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with FolderDisk(tmp_path) as disk:
        assert disk.names() == []
        with pytest.raises(OSError, match="symbolic links"):
            disk.open("link")
    assert not (tmp_path / "elsewhere").exists()


def test_write_that_does_not_fit_raises_and_leaves_a_part(tmp_path: Path) -> None:
    with FolderDisk(tmp_path) as disk, closing(disk.open("a")) as file:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                file.write(bytes(3000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert file.read() == bytes(1000)


def test_power_loss_takes_only_what_was_not_synced() -> None:
    seen, names = set(), set()
    for seed in range(200):
        disk = ForgetfulDisk()
        put(disk, "a", b"kept")
        disk.open("a").write(b"x" * 40)
        disk.open("b").close()
        found = disk.after_power_loss(random.Random(seed))
        seen.add(get(found, "a"))
        names.add(tuple(found.names()))
    assert all(data.startswith(b"kept") for data in seen)
    assert {b"kept", b"kept" + b"x" * 40} < seen
    assert names == {("a",), ("a", "b")}


def test_power_loss_stops_every_later_operation_and_a_kill_forgets_nothing() -> None:
    disk = ForgetfulDisk()
    file = disk.open("a")
    file.write(b"x")
    disk.fail_at(2)
    with pytest.raises(PowerLossError):
        file.sync()
    with pytest.raises(PowerLossError):
        disk.sync()
    assert get(disk.after_kill(), "a") == b"x"
