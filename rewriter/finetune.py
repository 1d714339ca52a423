"""A reference training loop over `onnxruntime.training.api`: fine-tunes a bundle on an npz of samples.

The bundle does not depend on it: any loop over the stock API trains it.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter import bundle as bundles
from rewriter.calibration.npz import Batch, NpzSamples, static_size
from rewriter.errors import ErrorCode, QatError
from rewriter.finalize.parameters import require_usable
from rewriter.installation import Device
from rewriter.load import load_from_bundle
from rewriter.manifest import Manifest
from rewriter.progress import Progress, silent
from rewriter.training.derived import derived_values, require_scales
from rewriter.training.losses import class_layout, dims
from rewriter.training.runtime import TrainingSession, open_session


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Loss and, for cross entropy, share of the labels that the largest score hits."""

    loss: float
    accuracy: float | None


@dataclasses.dataclass(frozen=True)
class FinetuneReport:
    """What a fine-tuning did.

    Attributes:
        losses: mean training loss of each epoch.
        before, after: on the evaluation samples, quantized as in training; None without them.
        checkpoint: the file written.
    """

    steps: int
    losses: tuple[float, ...]
    before: Evaluation | None
    after: Evaluation | None
    checkpoint: pathlib.Path

    def summary(self) -> str:
        """A few lines for a person."""
        lines = [
            f"{self.steps} steps, loss per epoch: {', '.join(f'{loss:.4f}' for loss in self.losses)}",
            f"checkpoint: {self.checkpoint}",
        ]
        for moment, result in (("before", self.before), ("after", self.after)):
            if result is not None:
                accuracy = "" if result.accuracy is None else f", top-1 {100 * result.accuracy:.2f} %"
                lines.append(f"{moment} training: loss {result.loss:.4f}{accuracy}")
        return "\n".join(lines)

    __str__ = summary


def finetune(
    bundle: pathlib.Path,
    data: pathlib.Path,
    *,
    evaluation: pathlib.Path | None = None,
    epochs: int = 1,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    device: Device = "cpu",
    seed: int = 0,
    checkpoint: pathlib.Path | None = None,
    checkpoint_out: pathlib.Path | None = None,
    progress: Progress = silent,
) -> FinetuneReport:
    """Train the weights and scales of a bundle, with a learning rate that falls to 0 along a half cosine.

    Args:
        bundle: bundle directory; its own files stay as they are.
        data: npz with one array per input of the training model, samples along the first axis: the model's
            inputs and `labels` or `targets`. Held in memory.
        evaluation: npz of the same form, evaluated before and after training.
        epochs: at least 1.
        batch_size: at least 1; ignored where the model prescribes one. The last, smaller batch of an epoch is
            used where the model allows it.
        learning_rate: of the first step; more than 0.
        seed: of the order of the samples, which changes every epoch.
        checkpoint: where to start from; None: as prepared.
        checkpoint_out: file to write when training is over, no file that `prepare` wrote; None:
            `trained_checkpoint` in the bundle, which `finalize` then uses.

    Raises:
        QatError: `argument_invalid`, `bundle_invalid`, `data_*`, `output_unwritable` (before any training),
            `training_runtime_missing`, `checkpoint_invalid`, `run_failed`; `training_diverged` when the loss,
            or what the last step makes of a parameter, is not finite, and nothing is written then.
    """
    _require_arguments(epochs, batch_size, learning_rate, seed)
    target = checkpoint_out or bundle / bundles.TRAINED_CHECKPOINT
    bundles.require_elsewhere(target, bundle)
    manifest = bundles.read_manifest(bundle, verify_all=True)
    model = load_from_bundle(bundle / bundles.EVAL_MODEL)
    scoring = _Scoring.of(model, manifest) if manifest.training.loss_kind == "cross_entropy" else None
    session = open_session(bundle, checkpoint, device=device)
    inputs = _inputs(model, session)
    samples = NpzSamples.open(data, inputs)
    held_out = None if evaluation is None else _HeldOut.open(evaluation, inputs, batch_size)
    arrays = _in_memory(samples)
    if scoring is not None:
        scoring.require_labels(arrays, data)
    batches = _Batches(len(samples), batch_size, samples.fixed_batch, epochs, data)

    with bundles.new_file(target) as trained:
        before = None if held_out is None else _evaluate(session, held_out, scoring)
        losses = _train(session, list(arrays.values()), batches, learning_rate, seed, progress)
        _require_converged(session, model, manifest)
        after = None if held_out is None else _evaluate(session, held_out, scoring)
        session.save(trained)
    return FinetuneReport(batches.steps, losses, before, after, target)


def _require_arguments(epochs: int, batch_size: int, learning_rate: float, seed: int) -> None:
    largest = float(np.finfo(np.float32).max)
    for name, value, allowed, must_be in (
        ("epochs", epochs, epochs >= 1, "at least 1"),
        ("batch_size", batch_size, batch_size >= 1, "at least 1"),
        ("learning_rate", learning_rate, 0 < learning_rate <= largest, "more than 0, and finite in float32"),
        ("seed", seed, seed >= 0, "at least 0"),
    ):
        if not allowed:
            raise QatError(
                ErrorCode.ARGUMENT_INVALID, f"{name} is {value}; it must be {must_be}.", field=name
            )


def _inputs(model: ir.Model, session: TrainingSession) -> list[ir.Value]:
    """What a step is fed, with the types and shapes that the eval model declares."""
    by_name = {value.name: value for value in model.graph.inputs}
    names = session.module.input_names()
    if not by_name.keys() >= set(names):
        raise QatError(
            ErrorCode.BUNDLE_INVALID,
            "The eval model has other inputs than the training model: prepare the bundle again.",
            file=bundles.EVAL_MODEL,
        )
    return [by_name[name] for name in names]


@dataclasses.dataclass(frozen=True)
class _Batches:
    """How samples come in batches: `fixed` samples each, or up to `wanted`."""

    samples: int
    wanted: int
    fixed: int | None
    epochs: int
    file: pathlib.Path

    def __post_init__(self) -> None:
        if self.fixed is not None and self.samples < self.fixed:
            raise QatError(
                ErrorCode.DATA_SHAPE_MISMATCH,
                f"The model takes batches of {self.fixed} samples, and there are {self.samples}.",
                file=self.file.name,
            )

    @property
    def per_epoch(self) -> int:
        if self.fixed is not None:
            return self.samples // self.fixed
        return math.ceil(self.samples / self.wanted)

    @property
    def steps(self) -> int:
        return self.epochs * self.per_epoch

    def of_epoch(self, order: npt.NDArray[np.intp]) -> Iterator[npt.NDArray[np.intp]]:
        size = self.fixed or self.wanted
        for index in range(self.per_epoch):
            yield order[index * size : (index + 1) * size]


def _train(
    session: TrainingSession,
    arrays: list[npt.NDArray[Any]],
    batches: _Batches,
    learning_rate: float,
    seed: int,
    progress: Progress,
) -> tuple[float, ...]:
    """The mean loss of each epoch."""
    module, optimizer = session.module, session.optimizer
    generator = np.random.default_rng(seed)
    losses, step = [], 0
    module.train()
    progress("train", 0.0)
    for _ in range(batches.epochs):
        total = 0.0
        for chosen in batches.of_epoch(generator.permutation(batches.samples)):
            batch = [array[chosen] for array in arrays]
            loss = float(np.ravel(module(*batch))[0])
            _require_finite(loss, f"at step {step + 1} of {batches.steps}")
            optimizer.set_learning_rate(learning_rate * (1 + math.cos(math.pi * step / batches.steps)) / 2)
            optimizer.step()
            module.lazy_reset_grad()
            total += loss * len(chosen)
            step += 1
            progress("train", step / batches.steps)
        seen = min(batches.samples, batches.per_epoch * (batches.fixed or batches.wanted))
        losses.append(total / seen)
    module.eval()
    outputs = module(*batch)
    _require_finite(float(np.ravel(outputs[0] if isinstance(outputs, tuple) else outputs)[0]), "at the end")
    return tuple(losses)


def _require_finite(loss: float, when: str) -> None:
    if not math.isfinite(loss):
        raise QatError(
            ErrorCode.TRAINING_DIVERGED, f"The loss is {loss} {when}: use a smaller learning rate."
        )


def _require_converged(session: TrainingSession, model: ir.Model, manifest: Manifest) -> None:
    """The loss of a step says nothing of what the last one makes of the parameters."""
    parameters = {name: parameter.data for name, parameter in session.state.parameters}
    try:
        require_usable(manifest, parameters)
        sources = {entry.scale: entry.scale_parameter or entry.scale for entry in manifest.quantizers}
        scales = derived_values(model, parameters, sources)
        require_scales(scales, {name: sources[name] for name in scales})
    except QatError as error:
        raise QatError(
            ErrorCode.TRAINING_DIVERGED,
            f"After the last step the parameter {error.field!r} is not finite, or makes a scale that is 0 or "
            "not finite: use a smaller learning rate.",
            field=error.field,
        ) from error


@dataclasses.dataclass(frozen=True)
class _HeldOut:
    """Samples to evaluate on, read batch by batch."""

    samples: NpzSamples
    batch_size: int
    file: pathlib.Path

    @classmethod
    def open(cls, file: pathlib.Path, inputs: Sequence[ir.Value], batch_size: int) -> _HeldOut:
        return cls(NpzSamples.open(file, inputs), batch_size, file)


def _evaluate(session: TrainingSession, held_out: _HeldOut, scoring: _Scoring | None) -> Evaluation:
    """Means over the samples. Where the batch size is fixed, the last batch repeats its last sample: its loss
    then counts by the samples that are new."""
    module, samples = session.module, held_out.samples
    module.eval()
    total, hits, labels, done = 0.0, 0, 0, 0
    for batch in samples.batches(held_out.batch_size):
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
class _Scoring:
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
    def of(cls, model: ir.Model, manifest: Manifest) -> _Scoring | None:
        outputs = [value.name for value in model.graph.outputs]
        if manifest.training.output not in outputs:
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


def _in_memory(samples: NpzSamples) -> Batch:
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
