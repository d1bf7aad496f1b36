"""The images of the demonstration: scikit-learn's digits, or CIFAR-10 in its binary layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dgs.errors import ConfigError

__all__ = ["Images", "batches", "find_cifar10", "load_cifar10", "load_digits", "random_crop_flip"]

DIGITS_TEST = 497
"""Digits kept for testing; the other 1300 are trained on."""

SPLIT_SEED = 20200817
"""Seed of the digits' split, which is the same in every run whatever its other seeds are."""

CIFAR_SHAPE = (3, 32, 32)
CIFAR_RECORD_BYTES = 1 + 3 * 32 * 32
CIFAR_RECORDS = 10_000
CIFAR_TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
CIFAR_TEST = ("test_batch.bin",)
CIFAR_FOLDER = "cifar-10-batches-bin"
CIFAR_REMEDY = (
    "download cifar-10-binary.tar.gz (the binary version) from "
    "https://www.cs.toronto.edu/~kriz/cifar.html, unpack it, and pass the folder "
    f"{CIFAR_FOLDER} or the one that holds it"
)
CIFAR_PAD = 4


@dataclass(frozen=True, slots=True)
class Images:
    """A training set and a test set, as they are stored: pixels are scaled when they are used."""

    train: Tensor
    """uint8, shape ``(n, channels, height, width)``."""
    train_labels: Tensor
    """int64, shape ``(n,)``."""
    test: Tensor
    """uint8, shape ``(n, channels, height, width)``."""
    test_labels: Tensor
    """int64, shape ``(n,)``."""
    mean: Tensor
    """Per channel, of the pixels, shape ``(channels, 1, 1)``."""
    deviation: Tensor
    """Per channel, of the pixels, shape ``(channels, 1, 1)``."""

    def scaled(self, pixels: Tensor) -> Tensor:
        """Return float32 pixels with zero mean and unit deviation."""
        return (pixels.float() - self.mean) / self.deviation

    def to(self, device: torch.device) -> Images:
        """Return the same images on a device."""
        moved = (getattr(self, name).to(device) for name in self.__slots__)
        return Images(*moved)


def load_digits() -> Images:
    """Load scikit-learn's digits: 1797 real grey images of 8 x 8 pixels, in a fixed split.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load  # an extra: not needed for training
    except ImportError as e:
        raise ConfigError(
            "the demo trains on scikit-learn's digits, and scikit-learn is not installed: "
            "pip install 'dgs[experiments]', or give it CIFAR-10 with --data-dir"
        ) from e
    digits = load()
    pixels = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(digits.target).to(torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    test, train = order[:DIGITS_TEST], order[DIGITS_TEST:]
    return _images(pixels[train], labels[train], pixels[test], labels[test])


def find_cifar10(folder: Path) -> Path:
    """Return the folder with the binary batches: `folder` itself, or the one inside it.

    Raises:
        ConfigError: neither holds them; says how to get them.
    """
    for candidate in (folder, folder / CIFAR_FOLDER):
        if any((candidate / name).is_file() for name in CIFAR_TRAIN + CIFAR_TEST):
            return candidate
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}; {CIFAR_REMEDY}")
    if any(folder.glob("**/data_batch_1")):
        raise ConfigError(f"{folder} holds the Python version of CIFAR-10; {CIFAR_REMEDY}")
    raise ConfigError(f"{folder} holds no CIFAR-10 batches; {CIFAR_REMEDY}")


def load_cifar10(folder: Path, *, records: int = CIFAR_RECORDS) -> Images:
    """Load CIFAR-10 from its official binary files.

    Args:
        folder: ``cifar-10-batches-bin``, or the folder that holds it.
        records: images per file.

    Raises:
        ConfigError: a file is missing, truncated or not what it should be; names it.
    """
    found = find_cifar10(folder)
    train = [_read_batch(found / name, records) for name in CIFAR_TRAIN]
    test = [_read_batch(found / name, records) for name in CIFAR_TEST]
    return _images(
        torch.cat([pixels for pixels, _ in train]),
        torch.cat([labels for _, labels in train]),
        torch.cat([pixels for pixels, _ in test]),
        torch.cat([labels for _, labels in test]),
    )


def _read_batch(path: Path, records: int) -> tuple[Tensor, Tensor]:
    wanted_bytes = records * CIFAR_RECORD_BYTES
    try:
        raw = np.fromfile(path, dtype=np.uint8)
    except FileNotFoundError as e:
        raise ConfigError(f"{path} is missing; {CIFAR_REMEDY}") from e
    except OSError as e:
        raise ConfigError(f"{path} cannot be read ({e}); {CIFAR_REMEDY}") from e
    if raw.size != wanted_bytes:
        state = "truncated" if raw.size < wanted_bytes else "too long"
        raise ConfigError(
            f"{path} is {state}: {raw.size} bytes, expected {wanted_bytes}; {CIFAR_REMEDY}"
        )
    table = raw.reshape(records, CIFAR_RECORD_BYTES)
    labels = table[:, 0]
    if int(labels.max()) > 9:
        bad = int((labels > 9).argmax())
        raise ConfigError(
            f"{path} is damaged: image {bad} has label {labels[bad]}, labels are 0 to 9; "
            f"{CIFAR_REMEDY}"
        )
    pixels = torch.from_numpy(table[:, 1:].reshape(records, *CIFAR_SHAPE))
    return pixels, torch.from_numpy(labels.astype(np.int64))


def _images(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> Images:
    """Put the sets together; mean and deviation are those of the training set alone."""
    # of a histogram, because a float copy of CIFAR-10 takes 600 MB in every worker
    counts = torch.stack(
        [torch.bincount(train[:, c].flatten().int(), minlength=256) for c in range(train.shape[1])]
    ).double()
    share = counts / counts.sum(1, keepdim=True)
    levels = torch.arange(256, dtype=torch.float64)
    mean = share @ levels
    variance = share @ levels.square() - mean.square()
    shape = (-1, 1, 1)
    deviation = variance.clamp(min=0).sqrt().clamp(min=1.0)
    return Images(
        train,
        train_labels,
        test,
        test_labels,
        mean.float().reshape(shape),
        deviation.float().reshape(shape),
    )


def random_crop_flip(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by up to four pixels, with a black border, and mirror every other one.

    Args:
        pixels: uint8, shape ``(n, channels, height, width)``.
        generator: on the CPU; decides shifts and mirrors.

    Returns:
        A new tensor of the same shape, type and device.
    """
    n, _, height, width = pixels.shape
    device = pixels.device
    shift = torch.randint(0, 2 * CIFAR_PAD + 1, (2, n), generator=generator).to(device)
    mirror = (torch.rand(n, generator=generator) < 0.5).to(device)
    padded = torch.nn.functional.pad(pixels, (CIFAR_PAD,) * 4)
    columns = torch.arange(width, device=device).expand(n, width)
    columns = torch.where(mirror[:, None], width - 1 - columns, columns) + shift[1][:, None]
    rows = torch.arange(height, device=device) + shift[0][:, None]
    which = torch.arange(n, device=device)[:, None, None]
    cut = padded.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]]
    return cut.permute(0, 3, 1, 2).contiguous()


def batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield the indices of batches for ever, in a new order each time all were seen.

    Args:
        count: images there are.
        size: images in a batch; a rest that does not fill one is left out.
        generator: on the CPU; decides the order.

    Example:
        >>> stream = batches(5, 2, torch.Generator().manual_seed(0))
        >>> len({int(i) for _ in range(2) for i in next(stream)})
        4
    """
    if not 0 < size <= count:
        raise ConfigError(f"batch={size} is not valid: give a number in [1, {count}]")
    while True:
        order = torch.randperm(count, generator=generator)
        for first in range(0, count - size + 1, size):
            yield order[first : first + size]
