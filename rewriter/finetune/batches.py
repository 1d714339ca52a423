"""The samples in memory, and which of them each step is fed."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from rewriter.calibration.npz import Batch, NpzSamples
from rewriter.errors import ErrorCode, QatError

Indices = npt.NDArray[np.intp]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The batches of every step of every epoch: the same for the same numbers, from any step on.

    Attributes:
        batch_size: samples in a batch; the last batch of an epoch is smaller, unless `whole`.
        accumulate: batches of one step.
        whole: whether batches have exactly that size and steps that many of them; the samples that are left
            over sit out an epoch, others each time.
        seed: of the order of the samples, which changes every epoch.
    """

    samples: int
    batch_size: int
    accumulate: int
    whole: bool
    epochs: int
    seed: int

    @classmethod
    def of(
        cls,
        samples: NpzSamples,
        file: pathlib.Path,
        batch_size: int,
        accumulate: int,
        epochs: int,
        seed: int,
    ) -> Plan:
        """A plan with the batch size that the model prescribes, if it does.

        Raises:
            QatError: `data_shape_mismatch`, there are not enough samples for one batch of a prescribed size;
                `argument_invalid`, there are not enough for one step.
        """
        fixed = samples.fixed_batch
        if fixed is not None and len(samples) < fixed:
            raise QatError(
                ErrorCode.DATA_SHAPE_MISMATCH,
                f"The model takes batches of {fixed} samples, and there are {len(samples)}.",
                file=file.name,
            )
        # Only batches of one size have a mean of gradients that is the gradient of the mean.
        whole = fixed is not None or accumulate > 1
        plan = cls(len(samples), fixed or batch_size, accumulate, whole, epochs, seed)
        if plan.per_epoch == 0:
            raise QatError(
                ErrorCode.ARGUMENT_INVALID,
                f"accumulate is {accumulate}; one step then takes {accumulate} batches of {plan.batch_size} "
                f"samples, and there are {len(samples)}.",
                field="accumulate",
            )
        return plan

    @property
    def per_epoch(self) -> int:
        """Steps of one epoch."""
        if self.whole:
            return self.samples // (self.batch_size * self.accumulate)
        return math.ceil(self.samples / self.batch_size)

    @property
    def samples_per_epoch(self) -> int:
        """How many of the samples an epoch uses."""
        if self.whole:
            return self.per_epoch * self.batch_size * self.accumulate
        return self.samples

    @property
    def steps(self) -> int:
        return self.epochs * self.per_epoch

    def epoch_of(self, step: int) -> int:
        """The epoch, from 1, that a step belongs to; steps count from 1, and 0 is before the first."""
        return max(0, step - 1) // self.per_epoch + 1

    def ends_epoch(self, step: int) -> bool:
        return step > 0 and step % self.per_epoch == 0

    def steps_after(self, done: int) -> Iterator[list[Indices]]:
        """The batches of each step that is left after the first `done`."""
        for epoch in range(done // self.per_epoch, self.epochs):
            # Of its own for each epoch, so that a later epoch does not need those before it.
            order = np.random.default_rng((self.seed, epoch)).permutation(self.samples)
            for step in range(max(0, done - epoch * self.per_epoch), self.per_epoch):
                first = step * self.accumulate
                yield [
                    order[batch * self.batch_size : (batch + 1) * self.batch_size]
                    for batch in range(first, first + self.accumulate)
                ]


def in_memory(samples: NpzSamples) -> Batch:
    """All samples, one array per input in the input's type."""
    arrays: Batch = {}
    done = 0
    for batch in samples.batches(_READ_AT_ONCE):
        for name, values in batch.items():
            if name not in arrays:
                arrays[name] = np.empty((len(samples), *values.shape[1:]), values.dtype)
            # Where the batch size is fixed, the last batch repeats its last sample.
            arrays[name][done : done + len(values)] = values[: len(samples) - done]
        done += len(next(iter(batch.values())))
    return arrays


_READ_AT_ONCE: Final = 256


def take(arrays: Batch, chosen: Indices | slice) -> list[npt.NDArray[Any]]:
    """Some of the samples, as a step is fed."""
    return [array[chosen] for array in arrays.values()]
