"""What is learnt: noisy digits by a small network, in plain numpy, fast enough for 1e5 steps."""

from __future__ import annotations

from functools import cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dgs.demo.data import load_digits
from dgs.space import ParameterSpace, TensorSpec

__all__ = ["Digits", "Score"]

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

PIXELS, HIDDEN, CLASSES = 64, 64, 10
NOISE = 1.5
"""Standard deviation of what is added to each pixel, whose own is 1: drawn anew for every batch, so
that there is no end of samples, and no loss of 0."""
TEST_COPIES = 2
SHAPES = {
    "first.weight": (PIXELS, HIDDEN),
    "first.bias": (HIDDEN,),
    "second.weight": (HIDDEN, CLASSES),
    "second.bias": (CLASSES,),
}


class Score(NamedTuple):
    """How good a model is on the test set."""

    loss: float
    accuracy: float


@cache
def _images() -> tuple[Floats, Labels, Floats, Labels]:
    images = load_digits()
    train, test = (
        images.scaled(pixels).flatten(1).numpy().astype(np.float32)
        for pixels in (images.train, images.test)
    )
    return train, images.train_labels.numpy(), test, images.test_labels.numpy()


class Digits:
    """A network of 64, 64 and 10 units, its data, and its loss.

    Args:
        seed: of start and data; the test set is always the same.
    """

    space = ParameterSpace(tuple(TensorSpec(name, shape) for name, shape in SHAPES.items()))

    def __init__(self, seed: int) -> None:
        """Load the images."""
        self._seed = seed
        self._train, self._labels, test, labels = _images()
        noise = np.random.default_rng(0).standard_normal((TEST_COPIES, *test.shape))
        self._test = (test + NOISE * noise).reshape(-1, PIXELS).astype(np.float32)
        self._test_labels = np.tile(labels, TEST_COPIES)

    def start(self) -> Floats:
        """Return the parameters that training starts from, flat."""
        random = np.random.default_rng([self._seed, 0])
        parts = [
            random.standard_normal(shape) * (len(shape) == 2) / np.sqrt(shape[0])
            for shape in SHAPES.values()
        ]
        return np.concatenate([p.ravel() for p in parts]).astype(np.float32)

    def batch(self, stream: int, position: int, size: int) -> tuple[Floats, Labels]:
        """Return one batch of an endless stream; each has its own number."""
        random = np.random.default_rng([self._seed, 1 + stream, position])
        rows = random.integers(0, len(self._train), size)
        noise = random.standard_normal((size, PIXELS), dtype=np.float32)
        return self._train[rows] + np.float32(NOISE) * noise, self._labels[rows]

    def gradient(self, flat: Floats, x: Floats, y: Labels) -> Floats:
        """Return the gradient of the mean cross-entropy of a batch, flat."""
        w1, b1, w2, b2 = _split(flat)
        hidden = np.maximum(x @ w1 + b1, 0)
        slope = _softmax(hidden @ w2 + b2)
        slope[np.arange(len(y)), y] -= 1
        slope /= np.float32(len(y))
        back = (slope @ w2.T) * (hidden > 0)
        parts = (x.T @ back, back.sum(0), hidden.T @ slope, slope.sum(0))
        return np.concatenate([p.ravel() for p in parts])

    def score(self, flat: Floats) -> Score:
        """Measure a model on the test set."""
        w1, b1, w2, b2 = _split(flat)
        chances = _softmax(np.maximum(self._test @ w1 + b1, 0) @ w2 + b2)
        of_truth = chances[np.arange(len(self._test_labels)), self._test_labels]
        right = chances.argmax(1) == self._test_labels
        loss = float(-np.log(np.maximum(of_truth, 1e-12)).mean())
        return Score(round(loss, 5), round(float(right.mean()), 5))


def _split(flat: Floats) -> list[Floats]:
    ends = accumulate(int(np.prod(shape)) for shape in SHAPES.values())
    parts = np.split(flat, list(ends)[:-1])
    return [p.reshape(s) for p, s in zip(parts, SHAPES.values(), strict=True)]


def _softmax(scores: Floats) -> Floats:
    powers = np.exp(scores - scores.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)
