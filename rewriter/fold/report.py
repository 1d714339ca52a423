"""What folding batch norms did, as plain data: for the training graph, the manifest and calibration."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter.fold.matching import Left
from rewriter.quantization import Statistics


@dataclasses.dataclass(frozen=True)
class BatchNormTensors:
    """What a batch norm is made of, by name; float32, shape [channels]."""

    gamma: str
    beta: str
    running_mean: str
    running_variance: str


@dataclasses.dataclass(frozen=True)
class TrainingFold:
    """How the training graph computes a folded weight and bias.

    Attributes:
        weight, bias: initializers of the folded model: factor * W, and beta - factor * mean.
        original: W; original_name: of its initializer.
        values: gamma, beta, running mean (of the layer without its bias) and running variance.
        weight_index: which input of the folded layer the weight is.
        channel_axis, group: where the output channels are in W; see `rewriter.operators`.
        add: the node that adds the bias, None where the layer does.
    """

    weight: str
    bias: str
    original: ir.TensorProtocol
    original_name: str
    tensors: BatchNormTensors
    values: tuple[npt.NDArray[np.float32], ...]
    epsilon: float
    momentum: float
    weight_index: int
    channel_axis: int | None
    group: int
    add: str | None
    freeze_bn_delay: int | None


@dataclasses.dataclass(frozen=True)
class Folded:
    """A batch norm that became part of a layer: names of the nodes, operator type of the layer.

    `training`: None where it was folded once and for all.
    """

    batch_norm: str
    layer: str
    op: str
    training: TrainingFold | None = None


@dataclasses.dataclass(frozen=True)
class TrainedBatchNorm:
    """A batch norm that stays and trains as one, and why it is not folded."""

    node: str
    reason: str
    tensors: BatchNormTensors
    freeze_bn_delay: int | None


@dataclasses.dataclass(frozen=True)
class FoldReport:
    """What folding did, in graph order.

    Attributes:
        found: how many batch norms the model has.
        training_mode: those that came in training mode; still_in_training_mode: those that stay so.
        statistics: mean and standard deviation per channel, beta and |gamma|, of what batch norms gave in
            training, folded and left ones; float64, shape [channels], by the name that the tensor has now.
    """

    folded: tuple[Folded, ...] = ()
    trained: tuple[TrainedBatchNorm, ...] = ()
    left: tuple[Left, ...] = ()
    statistics: Statistics = dataclasses.field(default_factory=dict)
    found: int = 0
    training_mode: tuple[str, ...] = ()
    still_in_training_mode: tuple[str, ...] = ()
