"""Computes folded weights and biases in a graph from what they were folded of, so that training changes that.

    weight = W * gamma / sqrt(v + epsilon)        bias = beta - m * gamma / sqrt(v + epsilon)

with the running statistics m and v: the form in which the model is evaluated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from rewriter.fold.report import Folded, TrainingFold
from rewriter.initializers import add_initializer, replace_initializer
from rewriter.training.emitter import Emitter
from rewriter.training.state import States


@dataclasses.dataclass(frozen=True)
class BatchNormValues:
    """Values of one batch norm in a graph, shape [channels].

    Attributes:
        deviation: sqrt(running variance + epsilon).
        factor: gamma / deviation.
    """

    gamma: ir.Value
    beta: ir.Value
    mean: ir.Value
    variance: ir.Value
    deviation: ir.Value
    factor: ir.Value


@dataclasses.dataclass(frozen=True)
class Unfolded:
    """A folded layer whose weight and bias a graph computes from what they were folded of.

    Attributes:
        original: W.
        weight, bias: computed; named like the initializers that they replace.
    """

    folded: Folded
    fold: TrainingFold
    values: BatchNormValues
    original: ir.Value
    weight: ir.Value
    bias: ir.Value


def unfold(graph: ir.Graph, folded: Sequence[Folded], emit: Emitter, states: States) -> list[Unfolded]:
    """Compute the weights and biases of the layers that were folded for training, at `emit`, as inference
    does.

    W, gamma and beta become initializers, to be trained; the running statistics states.
    """
    unfolding = _Unfolding(graph, emit, states)
    return [unfolding.unfold(one, one.training) for one in folded if one.training is not None]


class _Unfolding:
    def __init__(self, graph: ir.Graph, emit: Emitter, states: States) -> None:
        self._graph = graph
        self._emit = emit
        self._states = states
        # What layers share: batch norms of the same tensors, weights.
        self._values: dict[tuple[object, ...], BatchNormValues] = {}
        self._weights: dict[str, ir.Value] = {}

    def unfold(self, folded: Folded, fold: TrainingFold) -> Unfolded:
        values = self._batch_norm(fold)
        original = self._weight_before_folding(fold.original_name, fold.original)
        if fold.weight not in self._weights:
            self._weights[fold.weight] = self._weight(fold, original, values.factor)
        bias = self._bias(fold, values)
        return Unfolded(folded, fold, values, original, self._weights[fold.weight], bias)

    def _batch_norm(self, fold: TrainingFold) -> BatchNormValues:
        names = fold.tensors
        key = (names, fold.epsilon)
        if key not in self._values:
            gamma, beta, mean, variance = (
                add_initializer(self._graph, name, ir.tensor(value, name=name))
                for name, value in zip(dataclasses.astuple(names), fold.values, strict=True)
            )
            self._states.adopt(mean)
            self._states.adopt(variance)
            emit, shape = self._emit.at(fold.weight), gamma.shape
            shifted = emit.op("Add", variance, emit.constant(fold.epsilon), shape=shape)
            deviation = emit.op("Sqrt", shifted, shape=shape)
            factor = emit.op("Div", gamma, deviation, shape=shape)
            self._values[key] = BatchNormValues(gamma, beta, mean, variance, deviation, factor)
        return self._values[key]

    def _weight_before_folding(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """The initializer, which is still in the graph where others read it."""
        found = self._graph.initializers.get(name)
        if found is None:
            return add_initializer(self._graph, name, tensor)
        if found.const_value is not tensor:
            raise ValueError(f"another tensor took the name of the folded weight {name!r}")
        return found

    def _weight(self, fold: TrainingFold, original: ir.Value, factor: ir.Value) -> ir.Value:
        emit = self._emit.at(fold.weight)
        replaced = self._graph.initializers[fold.weight]
        replace_initializer(self._graph, replaced)
        along = _factor_along_weight(emit, fold, original, factor)
        weight = emit.op("Mul", original, along, shape=original.shape, name=fold.weight)
        replaced.replace_all_uses_with(weight)
        return weight

    def _bias(self, fold: TrainingFold, values: BatchNormValues) -> ir.Value:
        """beta - factor * mean, in the shape of the initializer that it replaces."""
        emit = self._emit.at(fold.bias)
        replaced = self._graph.initializers[fold.bias]
        shape = replaced.shape
        replace_initializer(self._graph, replaced)
        shift = emit.op("Mul", values.mean, values.factor, shape=values.beta.shape)
        is_vector = shape is not None and len(shape) == 1
        bias = emit.op(
            "Sub", values.beta, shift, shape=values.beta.shape, name=fold.bias if is_vector else None
        )
        if not is_vector:
            bias = emit.op(
                "Reshape",
                bias,
                emit.constant([] if shape is None else shape.numpy(), np.int64),
                shape=shape,
                name=fold.bias,
            )
        replaced.replace_all_uses_with(bias)
        return bias


def _factor_along_weight(emit: Emitter, fold: TrainingFold, original: ir.Value, factor: ir.Value) -> ir.Value:
    """The factor in a shape that broadcasts along the output channels of the weight."""
    assert original.shape is not None
    weight_shape = original.shape.numpy()
    if fold.group > 1:
        # A grouped ConvTranspose: [C_in, C_out / group, ...]; group g of C_in makes group g of C_out.
        c_in, per_group = weight_shape[:2]
        by_group = [fold.group, 1, per_group]
        expanded = [fold.group, c_in // fold.group, per_group]
        factor = emit.op("Reshape", factor, emit.constant(by_group, np.int64), shape=by_group)
        factor = emit.op("Expand", factor, emit.constant(expanded, np.int64), shape=expanded)
        target = [c_in, per_group, *[1] * (len(weight_shape) - 2)]
    else:
        assert fold.channel_axis is not None
        target = [1] * len(weight_shape)
        target[fold.channel_axis] = weight_shape[fold.channel_axis]
    return emit.op("Reshape", factor, emit.constant(target, np.int64), shape=target)
