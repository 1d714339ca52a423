"""Loss and accuracy on held-out samples."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter.calibration.npz import Batch, NpzSamples, static_size
from rewriter.errors import ErrorCode, QatError
from rewriter.manifest import Manifest
from rewriter.training.losses import class_layout, dims
from rewriter.training.runtime import TrainingSession


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Loss and, for cross entropy, share of the labels that the largest score hits."""

    loss: float
    accuracy: float | None


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Samples to evaluate on, read batch by batch."""

    samples: NpzSamples
    batch_size: int
    file: pathlib.Path

    @classmethod
    def open(cls, file: pathlib.Path, inputs: Sequence[ir.Value], batch_size: int) -> HeldOut:
        return cls(NpzSamples.open(file, inputs), batch_size, file)


def evaluate(
    session: TrainingSession, held_out: HeldOut, scoring: Scoring | None, stop: Callable[[], bool]
) -> Evaluation | None:
    """Means over the samples; None when `stop` says so before the end.

    Where the batch size is fixed, the last batch repeats its last sample: its loss then counts by the samples
    that are new.
    """
    module, samples = session.module, held_out.samples
    module.eval()
    total, hits, labels, done = 0.0, 0, 0, 0
    for batch in samples.batches(held_out.batch_size):
        if stop():
            return None
        if scoring is not None:
            scoring.require_labels(batch, held_out.file)
        outputs = module(*batch.values())
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        count = min(len(next(iter(batch.values()))), len(samples) - done)
        total += float(np.ravel(outputs[0])[0]) * count
        done += count
        if scoring is not None:
            hit = scoring.hits(outputs, batch)[:count]
            hits, labels = hits + int(hit.sum()), labels + hit.size
    return Evaluation(total / len(samples), hits / labels if scoring is not None else None)


@dataclasses.dataclass(frozen=True)
class Scoring:
    """Top-1 accuracy of a cross-entropy model.

    Attributes:
        index: position of the scores among the eval model's outputs, after the loss at 0.
        axis: class axis of the scores.
        classes: how many, None where that is not known.
        labels: name of the label input.
    """

    index: int
    axis: int
    classes: int | None
    labels: str

    @classmethod
    def of(cls, model: ir.Model, manifest: Manifest) -> Scoring | None:
        """For an eval model; None when its loss is another, or its scores are no output."""
        outputs = [value.name for value in model.graph.outputs]
        if manifest.training.loss_kind != "cross_entropy" or manifest.training.output not in outputs:
            return None
        index = outputs.index(manifest.training.output)
        shape = model.graph.outputs[index].shape
        layout = None if shape is None else class_layout(dims(shape))
        target = manifest.training.target
        if shape is None or layout is None or target is None:
            return None
        return cls(index, layout.axis, static_size(shape[layout.axis]), target.name)

    def hits(self, outputs: Sequence[npt.NDArray[Any]], batch: Batch) -> npt.NDArray[np.bool_]:
        """Whether the largest score is that of the label; shape of the labels."""
        labels = batch[self.labels]
        found: npt.NDArray[np.bool_] = outputs[self.index].argmax(self.axis).reshape(labels.shape) == labels
        return found

    def require_labels(self, batch: Batch, file: pathlib.Path) -> None:
        """The loss kernel reads out of bounds for a label that is no class."""
        labels = batch[self.labels]
        if labels.min() < 0 or (self.classes is not None and labels.max() >= self.classes):
            known = "any" if self.classes is None else str(self.classes)
            raise QatError(
                ErrorCode.DATA_LABEL_OUT_OF_RANGE,
                f"The labels lie in {labels.min()}..{labels.max()}; they count from 0, "
                f"and the number of classes is {known}.",
                field=self.labels,
                file=file.name,
            )
