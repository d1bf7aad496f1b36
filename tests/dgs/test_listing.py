"""A state directory can be looked at while a server changes it."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from dgs.errors import StateError
from dgs.listing import LOOKS, look, open_state, steadily
from dgs.storage.disk import FolderDisk
from tests.helpers.states import files, make_states


def test_reader_without_the_lock_changes_and_creates_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    make_states([folder])
    before = files(folder)
    with (
        FolderDisk(folder) as owner,
        open_state(folder, lock=False) as disk,
        closing(disk.open(owner.names()[0])) as file,
    ):
        name = owner.names()[0]
        assert file.read() == before[name]
        for attempt in (
            lambda: disk.open("absent"),
            lambda: disk.remove(name),
            lambda: disk.rename(name, "b"),
            lambda: file.write(b"x"),
            lambda: file.truncate(0),
        ):
            with pytest.raises(OSError, match=r"No such file|reading only|not open for writing"):
                attempt()
        assert files(folder) == before


def test_reader_does_not_keep_a_server_out(tmp_path: Path) -> None:
    make_states([tmp_path])
    with open_state(tmp_path, lock=False), FolderDisk(tmp_path):
        pass
    with open_state(tmp_path, lock=True), pytest.raises(StateError, match="in use by process"):
        FolderDisk(tmp_path)


def test_look_is_repeated_when_files_vanish_under_it(tmp_path: Path) -> None:
    make_states([tmp_path], (3, 6))
    with open_state(tmp_path, lock=False) as disk:
        seen = []

        def see() -> int:
            seen.append(len(disk.names()))
            oldest = sorted(tmp_path.glob("log-*"))[0]
            if len(seen) == 1:
                oldest.unlink()
                raise FileNotFoundError(2, "gone", oldest.name)
            return len(seen)

        assert steadily(disk, see) == 2
        assert len(look(disk).segments) == 1


def test_trouble_that_stays_is_told_and_looks_are_bounded(tmp_path: Path) -> None:
    make_states([tmp_path])
    with open_state(tmp_path, lock=False) as disk:
        tries = []

        def fail() -> None:
            tries.append(1)
            raise StateError("damaged")

        with pytest.raises(StateError, match="damaged"):
            steadily(disk, fail)
        assert len(tries) == 1

        def vanish() -> None:
            tries.append(1)
            next(iter(tmp_path.glob("x*"))).unlink()
            raise StateError("never still")

        tries.clear()
        for number in range(LOOKS):
            (tmp_path / f"x{number}").touch()
        with pytest.raises(StateError, match="never still"):
            steadily(disk, vanish)
        assert len(tries) == LOOKS
