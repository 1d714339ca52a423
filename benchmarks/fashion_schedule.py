"""What every training of `benchmarks.fashion_mnist` has in common, whichever runtime carries it out.

Needs NumPy and the standard library only: one of the runtimes is in an environment of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Batch = tuple[NDArray[np.float32], NDArray[np.int64]]


@dataclass(frozen=True)
class Schedule:
    """Order, augmentation and learning rate of a training.

    Attributes:
        samples: the first that many training images are used.
        learning_rate: of the first step; falls to 0 along a half cosine.
        seed: of the order of the samples and of the flips; both change every epoch.
    """

    samples: int
    epochs: int
    batch_size: int
    learning_rate: float
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return self.samples // self.batch_size

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        return self.learning_rate * (1 + math.cos(math.pi * step / self.steps)) / 2

    def batches(self, pixels: NDArray[np.uint8], labels: NDArray[np.int64]) -> Iterator[Batch]:
        """The batch of each step: images in 0..1, one of two mirrored left to right, and labels.

        Args:
            pixels: uint8 [N, 1, 28, 28], N at least `samples`; those that do not fill a batch are left out.
        """
        for epoch in range(self.epochs):
            random = np.random.default_rng([self.seed, epoch])
            order = random.permutation(self.samples)
            for step in range(self.steps_per_epoch):
                chosen = order[step * self.batch_size : (step + 1) * self.batch_size]
                images = pixels[chosen]
                mirrored = random.random(len(chosen)) < 0.5
                images[mirrored] = images[mirrored, ..., ::-1]
                yield images * np.float32(1 / 255), labels[chosen]


def top1(scores: NDArray[Any], labels: NDArray[np.int64]) -> float:
    """Share of the labels with the largest score, in percent."""
    return 100 * float(np.mean(scores.argmax(axis=1) == labels))
