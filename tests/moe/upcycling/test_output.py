"""The target appears whole or not at all; what was interrupted goes on."""

from __future__ import annotations

import fcntl
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moe.errors import CheckpointError, UpcycleError
from moe.upcycling import Options, UpcycleConfig, upcycle
from moe.upcycling.output import PLAN
from tests.helpers.source_tree import ROOT
from tests.moe.upcycling.models import write_plain

CONFIG = UpcycleConfig(4, 2, method="drop")
SMALL = Options(measure=False, shard_bytes=10_000)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return write_plain(tmp_path / "dense")


def _files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def _interrupt(after_bytes: int) -> Callable[[int, int, str], None]:
    def progress(done: int, total: int, name: str) -> None:
        if done > after_bytes:
            raise KeyboardInterrupt

    return progress


def _begin(dense: Path, target: Path) -> Path:
    with pytest.raises(KeyboardInterrupt):
        upcycle(dense, target, CONFIG, options=SMALL, progress=_interrupt(30_000))
    assert not target.exists()
    return target.with_name(target.name + ".partial")


def test_an_interrupted_conversion_goes_on_and_ends_with_the_same_bytes(
    dense: Path, tmp_path: Path
) -> None:
    partial = _begin(dense, tmp_path / "moe")
    kept = {f.name: f.stat().st_ino for f in partial.glob("*.safetensors")}
    assert len(kept) >= 2
    upcycle(dense, tmp_path / "moe", CONFIG, options=SMALL)
    now = {f.name: f.stat().st_ino for f in (tmp_path / "moe").glob("*.safetensors")}
    assert kept.items() <= now.items()
    upcycle(dense, tmp_path / "other", CONFIG, options=SMALL)
    assert _files(tmp_path / "moe") == _files(tmp_path / "other")
    assert not partial.exists()


def test_a_killed_conversion_goes_on(dense: Path, tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\n"
        "from moe.upcycling import Options, UpcycleConfig, upcycle\n"
        "def die(done, total, name):\n"
        "    if done > 30_000: os.kill(os.getpid(), signal.SIGKILL)\n"
        "config = UpcycleConfig(4, 2, method='drop')\n"
        "options = Options(measure=False, shard_bytes=10_000)\n"
        "upcycle(sys.argv[1], sys.argv[2], config, options=options, progress=die)\n"
    )
    line = [sys.executable, "-c", program, str(dense), str(tmp_path / "moe")]
    assert subprocess.run(line, cwd=ROOT, timeout=60, check=False).returncode == -9
    assert not (tmp_path / "moe").exists()
    upcycle(dense, tmp_path / "moe", CONFIG, options=SMALL)
    upcycle(dense, tmp_path / "other", CONFIG, options=SMALL)
    assert _files(tmp_path / "moe") == _files(tmp_path / "other")


def test_what_another_conversion_left_is_not_built_upon(dense: Path, tmp_path: Path) -> None:
    _begin(dense, tmp_path / "moe")
    other = UpcycleConfig(4, 2, method="drop", seed=1)
    upcycle(dense, tmp_path / "moe", other, options=SMALL)
    upcycle(dense, tmp_path / "fresh", other, options=SMALL)
    assert _files(tmp_path / "moe") == _files(tmp_path / "fresh")


def test_a_partial_directory_holds_no_config_before_its_weights_are_whole(
    dense: Path, tmp_path: Path
) -> None:
    partial = _begin(dense, tmp_path / "moe")
    assert not (partial / "config.json").exists()
    assert any(f.suffix == ".begun" for f in partial.iterdir())


@contextmanager
def _files_end_at(most_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_leaves_nothing(dense: Path, tmp_path: Path) -> None:
    with _files_end_at(20_000), pytest.raises(CheckpointError, match="cannot write"):
        upcycle(dense, tmp_path / "moe", CONFIG, options=Options(measure=False))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense"]


def test_a_disk_without_room_is_noticed_before_a_byte_is_written(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(CheckpointError, match="make room"):
        upcycle(dense, tmp_path / "moe", CONFIG, options=SMALL)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense"]


def test_an_output_that_exists_needs_overwrite(dense: Path, tmp_path: Path) -> None:
    upcycle(dense, tmp_path / "moe", CONFIG, options=SMALL)
    before = _files(tmp_path / "moe")
    again = UpcycleConfig(2, 1)
    with pytest.raises(UpcycleError, match="--overwrite"):
        upcycle(dense, tmp_path / "moe", again, options=SMALL)
    assert _files(tmp_path / "moe") == before
    upcycle(dense, tmp_path / "moe", again, options=Options(measure=False, overwrite=True))
    assert _files(tmp_path / "moe") != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "moe"]


def test_overwrite_replaces_checkpoints_only(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "thesis.tex").write_text("years of work")
    with pytest.raises(UpcycleError, match="is not a checkpoint"):
        upcycle(dense, tmp_path / "moe", CONFIG, options=Options(measure=False, overwrite=True))
    (tmp_path / "new.partial").mkdir()
    with pytest.raises(UpcycleError, match="was not left by a conversion"):
        upcycle(dense, tmp_path / "new", CONFIG, options=SMALL)
    assert (tmp_path / "new.partial").is_dir()


def test_the_source_is_never_the_target(dense: Path) -> None:
    before = _files(dense)
    with pytest.raises(UpcycleError, match="also a source"):
        upcycle(dense, dense, CONFIG, options=Options(measure=False, overwrite=True))
    assert _files(dense) == before


def test_two_conversions_do_not_write_the_same_target(dense: Path, tmp_path: Path) -> None:
    partial = _begin(dense, tmp_path / "moe")
    with (partial / PLAN).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UpcycleError, match="another process"):
            upcycle(dense, tmp_path / "moe", CONFIG, options=SMALL)
    assert partial.is_dir()


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    program = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from moe.upcycling import Options, UpcycleConfig, upcycle\n"
        "from tests.moe.upcycling.models import write_plain\n"
        "torch.set_num_threads(1)\n"
        "def peak():\n"
        "    status = Path('/proc/self/status').read_text().splitlines()\n"
        "    return next(int(s.split()[1]) << 10 for s in status if s.startswith('VmHWM:'))\n"
        "root = Path(sys.argv[1])\n"
        "small, quiet = write_plain(root / 'small', 1, 256, 1024), Options(measure=False)\n"
        "config = UpcycleConfig(4, 2, 2, 'virtual-group')\n"
        "upcycle(small, root / 'small-moe', config, options=quiet)\n"
        "before = peak()\n"
        "upcycle(root / 'large', root / 'moe', config, options=quiet)\n"
        "print(peak() - before)\n"
    )
    write_plain(tmp_path / "large", 30, 256, 1024)  # 120 MB, and twice that as a mixture
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "moe" / "model.safetensors").stat().st_size > 200e6
    group = 3 * 256 * 1024 * 4
    assert int(done.stdout) < 2 * group + 32e6
