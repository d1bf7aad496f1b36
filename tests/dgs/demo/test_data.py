"""The demonstration's images: real digits, and CIFAR-10's binary files whole and damaged."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dgs.demo.data import (
    CIFAR_FOLDER,
    CIFAR_PAD,
    CIFAR_TEST,
    CIFAR_TRAIN,
    batches,
    find_cifar10,
    load_cifar10,
    load_digits,
    random_crop_flip,
)
from dgs.errors import ConfigError

RECORDS = 3
RECORD_BYTES = 3073


def _record(label: int, seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, RECORD_BYTES - 1, dtype=np.uint8)
    return bytes([label]) + pixels.tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / CIFAR_FOLDER
    made.mkdir()
    for number, name in enumerate(CIFAR_TRAIN + CIFAR_TEST):
        records = [_record((number + i) % 10, 10 * number + i) for i in range(RECORDS)]
        (made / name).write_bytes(b"".join(records))
    return made


def test_digits_are_split_the_same_way_every_time() -> None:
    first, second = load_digits(), load_digits()
    assert first.train.shape == (1300, 1, 8, 8)
    assert first.test.shape == (497, 1, 8, 8)
    assert torch.equal(first.test, second.test)
    assert torch.equal(first.train_labels, second.train_labels)
    assert len(torch.bincount(first.test_labels)) == 10


def test_digits_do_not_appear_on_both_sides_of_the_split() -> None:
    images = load_digits()
    train = {bytes(t.flatten().tolist()) for t in images.train}
    test = {bytes(t.flatten().tolist()) for t in images.test}
    assert not train & test


def test_pixels_are_scaled_by_the_training_set() -> None:
    images = load_digits()
    scaled = images.scaled(images.train)
    assert abs(float(scaled.mean())) < 1e-5
    assert float(scaled.std(correction=0)) == pytest.approx(1.0, abs=1e-5)


def test_missing_scikit_learn_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'dgs\[experiments\]'"):
        load_digits()


def test_cifar_batches_are_read_in_order_with_planes_of_colours(folder: Path) -> None:
    images = load_cifar10(folder, records=RECORDS)
    assert images.train.shape == (5 * RECORDS, 3, 32, 32)
    assert images.test.shape == (RECORDS, 3, 32, 32)
    assert images.train_labels.tolist() == [(n + i) % 10 for n in range(5) for i in range(RECORDS)]
    raw = (folder / "data_batch_2.bin").read_bytes()[RECORD_BYTES : 2 * RECORD_BYTES]
    image = images.train[RECORDS + 1]
    assert image[0, 0, :5].tolist() == list(raw[1:6])
    assert image[1, 0, 0] == raw[1 + 1024]
    assert image[2, 31, 31] == raw[-1]


def test_mean_and_deviation_are_those_of_the_training_images(folder: Path) -> None:
    images = load_cifar10(folder, records=RECORDS)
    pixels = images.train.double()
    torch.testing.assert_close(
        images.mean.flatten().double(), pixels.mean((0, 2, 3)), rtol=1e-6, atol=0
    )
    deviation = pixels.std((0, 2, 3), correction=0)
    torch.testing.assert_close(images.deviation.flatten().double(), deviation, rtol=1e-6, atol=0)


def test_cifar_is_found_in_the_folder_and_in_the_one_above(folder: Path) -> None:
    assert find_cifar10(folder) == find_cifar10(folder.parent) == folder


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _mislabel(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[RECORD_BYTES] = 10
    path.write_bytes(bytes(raw))


def _replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (Path.unlink, "is missing"),
    "truncated": (_truncate, "is truncated: 9218 bytes, expected 9219"),
    "too long": (_lengthen, "is too long: 9220 bytes, expected 9219"),
    "empty": (_empty, "is truncated: 0 bytes"),
    "mislabelled": (_mislabel, "is damaged: image 1 has label 10"),
    "a folder": (_replace_by_folder, "cannot be read"),
}


@pytest.mark.parametrize("name", ["data_batch_3.bin", "test_batch.bin"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file_is_named_with_what_to_do(folder: Path, name: str, damage: str) -> None:
    apply, words = DAMAGES[damage]
    apply(folder / name)
    with pytest.raises(ConfigError, match=f"{name} {words}.*cifar-10-binary.tar.gz"):
        load_cifar10(folder, records=RECORDS)


def test_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no folder .*nowhere; download"):
        load_cifar10(tmp_path / "nowhere")


def test_folder_without_batches_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no CIFAR-10 batches; download"):
        load_cifar10(tmp_path)


def test_python_version_of_cifar_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"\x80")
    with pytest.raises(ConfigError, match="holds the Python version of CIFAR-10; download"):
        load_cifar10(tmp_path)


def test_crops_and_mirrors_are_windows_of_the_padded_image() -> None:
    pixels = torch.arange(3 * 2 * 6 * 6, dtype=torch.uint8).reshape(3, 2, 6, 6) + 1
    changed = random_crop_flip(pixels, torch.Generator().manual_seed(0))
    assert changed.shape == pixels.shape
    assert changed.dtype == torch.uint8
    padded = torch.nn.functional.pad(pixels, (CIFAR_PAD,) * 4)
    for image, window in zip(padded, changed, strict=True):
        windows = image.unfold(1, 6, 1).unfold(2, 6, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
        candidates = torch.cat([windows, windows.flip(-1)])
        assert (candidates == window).flatten(1).all(1).any()


def test_crops_and_mirrors_follow_the_seed() -> None:
    pixels = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    a, b, c = (random_crop_flip(pixels, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_every_image_is_seen_once_per_pass() -> None:
    stream = batches(12, 4, torch.Generator().manual_seed(0))
    first, second = (torch.cat([next(stream) for _ in range(3)]) for _ in range(2))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(12))
    assert first.tolist() != second.tolist()


@pytest.mark.parametrize("size", [0, 13])
def test_impossible_batch_size_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=rf"batch={size} is not valid"):
        next(batches(12, size, torch.Generator()))
