"""manifest.json: what a bundle is, what was quantized and what was not, and why."""

from __future__ import annotations

from typing import Final, Literal

import pydantic
from pydantic import BaseModel, ConfigDict

from rewriter.errors import ErrorCode, QatError
from rewriter.recipe import CounterUnit, FoldStatistics, LossKind, OptimizerName, RangeSource, Recipe

SCHEMA_VERSION: Final = 2


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Digest(_Section):
    """What tells a file's content."""

    sha256: str
    bytes: int


class FileEntry(Digest):
    """A file, by its name or its path relative to the one that refers to it."""

    name: str


class Source(Digest):
    """The float model's file, and the files with external data that it refers to."""

    external_data: tuple[FileEntry, ...]


class Normalization(_Section):
    """What the model was brought into before anything was quantized.

    `dynamic_batch`: inputs whose first dimension was 1 and is dynamic now.
    """

    source_opset: int
    opset: int
    changed: tuple[str, ...]
    dynamic_batch: tuple[str, ...]
    warnings: tuple[str, ...]


class QuantizedTensorEntry(_Section):
    """One tensor of a quantizer.

    `on_grid`: an operator that only moves data computes it from a tensor of the same quantizer, so that its
    Q/DQ pair changes nothing; training leaves the pair out.
    """

    tensor: str
    nodes: tuple[str, ...]
    on_grid: bool


class QuantizerEntry(_Section):
    """One quantizer: a scale, a zero point and the tensors that share them.

    Attributes:
        ranges: where the range comes from in training.
        quant_delay: the first training step at which the quantizer acts; 0 and 1: always.
        scale: name of the scale initializer in qat_model.onnx, and of the scale in eval_model.onnx.
        scale_parameter, zero_point_parameter: names of the trained parameters in the checkpoint, null when
            the one or the other is not trained.
        range_states: names of the states in the checkpoint that hold the tracked range: its low end, unless
            that is always 0, and its high end; empty where it is not tracked.
        initial_scale: one value, or one per channel along `axis`.
        initialized: where the initial scale comes from.
    """

    name: str
    tensor: str
    kind: Literal["weight", "activation"]
    bits: int
    symmetric: bool
    qmin: int
    qmax: int
    dtype: str
    axis: int | None
    ranges: RangeSource
    quant_delay: int
    scale: str
    scale_parameter: str | None
    zero_point: str
    zero_point_parameter: str | None
    range_states: tuple[str, ...]
    initial_scale: tuple[float, ...]
    initial_zero_point: tuple[int, ...]
    initialized: str
    existing: bool
    nodes: tuple[str, ...]
    tensors: tuple[QuantizedTensorEntry, ...]


class BatchNormState(_Section):
    """Names in the checkpoint of what a batch norm is made of: two parameters, two states.

    Of a folded batch norm the running mean is that of the layer without its bias.
    """

    gamma: str
    beta: str
    running_mean: str
    running_variance: str


class FoldedEntry(_Section):
    """A batch norm folded into the layer before it.

    Attributes:
        statistics: what the statistics of the batch are taken of in training; null: folded once, with the
            running statistics.
        freeze_bn_delay: the first training step that uses the running statistics; null: none.
        state: null where it was folded once.
    """

    batch_norm: str
    node: str
    op: str
    statistics: FoldStatistics | None
    freeze_bn_delay: int | None
    state: BatchNormState | None


class TrainedBatchNormEntry(_Section):
    """A batch norm that stays one, normalizes with the statistics of the batch and freezes as one.

    `reason`: why it is not folded.
    """

    node: str
    reason: str
    freeze_bn_delay: int | None
    state: BatchNormState


class BatchNorms(_Section):
    """What the model's batch norms were when it came, and what that means.

    Attributes:
        found: BatchNormalization nodes in the model.
        training_mode: how many of them were exported in training mode.
        trained: those that stay batch norms and train.
        note: a sentence on what freeze_bn_delay does for this model.
    """

    found: int
    training_mode: int
    trained: tuple[TrainedBatchNormEntry, ...]
    note: str


class SkippedEntry(_Section):
    node: str
    op: str
    reason: str


class FrozenEntry(_Section):
    """A float parameter that training does not change."""

    parameter: str
    reason: str


class Target(_Section):
    """The input that the loss adds: `labels` (int64) or `targets` (float32).

    `shape`: sizes; a dynamic dimension is its name, or null where it has none.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


class StepCounter(_Section):
    """The state in the checkpoint that counts, and what it counts; the training graph adds one to it."""

    state: str
    counts: CounterUnit


class Training(_Section):
    """What a training loop has to feed, what it gets and what it changes.

    Attributes:
        loss: name of the loss, the first output of the training and of the eval model.
        loss_kind: the built-in loss, "graph" when the model computes its own.
        output: the model output that the loss belongs to.
        attached_to: the tensor that the loss reads: that output, or the scores before its softmax.
        target: null when the model computes its own loss.
        inputs: everything a step is fed, in order, the target last.
        eval_outputs: outputs of the eval model after the loss: those of the model itself.
        trainable: parameters in the checkpoint that training changes, those of scales among them.
        state: what the checkpoint holds and the training graph itself updates: the step counter, ranges and
            running statistics.
        scales: how scale parameters p are trained: "exp" is scale = initial_scale * exp(p); "fixed": not.
    """

    loss: str
    loss_kind: LossKind
    output: str
    attached_to: str
    target: Target | None
    inputs: tuple[str, ...]
    eval_outputs: tuple[str, ...]
    optimizer: OptimizerName
    trainable: tuple[str, ...]
    state: tuple[str, ...]
    step_counter: StepCounter
    scales: Literal["exp", "fixed"]


class Manifest(_Section):
    """Everything a bundle says about itself; see the attributes' classes."""

    schema_version: Literal[2] = SCHEMA_VERSION
    recipe: Recipe
    source: Source
    calibration: Digest | None
    versions: dict[str, str]
    normalization: Normalization
    quantizers: tuple[QuantizerEntry, ...]
    quantized_nodes: tuple[str, ...]
    folded: tuple[FoldedEntry, ...]
    batch_norms: BatchNorms
    skipped: tuple[SkippedEntry, ...]
    frozen: tuple[FrozenEntry, ...]
    training: Training
    warnings: tuple[str, ...]
    files: tuple[FileEntry, ...]

    def to_json(self) -> bytes:
        """UTF-8 JSON, the same bytes for the same content."""
        return (self.model_dump_json(indent=2) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """Read a manifest.

        Raises:
            QatError: `bundle_invalid` when it is not one, or of another schema version.
        """
        try:
            return cls.model_validate_json(data)
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = "".join(f"{part}." for part in first["loc"])
            place = f"{where.removesuffix('.')}: " if where else ""
            raise QatError(
                ErrorCode.BUNDLE_INVALID,
                f"This is no manifest of schema version {SCHEMA_VERSION}: {place}{first['msg']}.",
            ) from error
