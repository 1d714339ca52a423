"""Folds inference-mode batch normalization into the layer before it.

    BN(u) = gamma * (u - mean) / sqrt(variance + epsilon) + beta = factor * u + shift      per channel
    BN(layer(x, W) + b) = layer(x, factor * W) + factor * b + shift

Rules:

1. The layer is a Conv, ConvTranspose (grouped too), Gemm or MatMul with a constant weight (and bias) whose
   result goes into the batch norm only. Weight and bias are computed in float64 and stored in float32.
2. A MatMul has no place for the shift: a plain matrix product becomes a Gemm, one with its weight on the left
   gets an Add behind it. Axis 1, the channels of a batch norm, must be the axis that the weight produces.
3. A Mul and an Add by per-channel constants behind a batch norm (Caffe's Scale) become part of its gamma and
   beta first, whether it can be folded or not.
4. Layers that share a weight and have the same factors keep sharing it; otherwise each gets its own.
5. What cannot be folded is left as it is, with the reason.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter.fold.channel_scale import merge_channel_scales
from rewriter.initializers import add_initializer, initializer_array
from rewriter.names import FreeNames
from rewriter.operators import WeightOperand, is_constant, is_operator, weight_operand
from rewriter.quantization import Statistics

_Float64 = npt.NDArray[np.float64]

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclasses.dataclass(frozen=True)
class Folded:
    """A batch norm that became part of a layer: names of the nodes, operator type of the layer."""

    batch_norm: str
    layer: str
    op: str


@dataclasses.dataclass(frozen=True)
class Left:
    """A batch norm that stays, with the reason for a person."""

    node: str
    reason: str


@dataclasses.dataclass(frozen=True)
class FoldReport:
    """What folding did, in graph order.

    Attributes:
        statistics: mean and standard deviation per channel, beta and |gamma|, of what batch norms gave in
            training, folded and left ones; float64, shape [channels], by the name that the tensor has now.
    """

    folded: tuple[Folded, ...] = ()
    left: tuple[Left, ...] = ()
    statistics: Statistics = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class BatchNormPair:
    """A layer and the batch norm behind it that it can take in."""

    layer: ir.Node
    weight: WeightOperand
    batch_norm: ir.Node

    def factor_and_shift(self) -> tuple[_Float64, _Float64]:
        """What the batch norm does to each channel, shape [channels]."""
        gamma, beta, mean, variance = (_float64(value) for value in self.batch_norm.inputs[1:5])
        factor = gamma / np.sqrt(variance + self.batch_norm.attributes.get_float("epsilon", 1e-5))
        return factor, beta - factor * mean


def fold_batch_norms(model: ir.Model) -> FoldReport:
    """Fold every batch norm of a normalized model that can be folded, in place."""
    merge_channel_scales(model)
    pairs, left = match_batch_norms(model)
    folding = _Folding(model)
    statistics = _statistics(model.graph)
    outputs = {pair.batch_norm: folding.fold(pair) for pair in pairs}
    folding.finish()
    return FoldReport(
        folded=tuple(
            Folded(pair.batch_norm.name or "", pair.layer.name or "", pair.layer.op_type) for pair in pairs
        ),
        left=tuple(left),
        statistics={
            outputs.get(node, node.outputs[0]).name or "": known for node, known in statistics.items()
        },
    )


def _statistics(graph: ir.Graph) -> dict[ir.Node, tuple[_Float64, _Float64]]:
    """Beta and |gamma| of every batch norm that is an affine function with known constants."""
    return {
        node: (_float64(node.inputs[2]), np.abs(_float64(node.inputs[1])))
        for node in graph
        if is_operator(node, "BatchNormalization") and _why_not_constant(node, graph) is None
    }


def match_batch_norms(model: ir.Model) -> tuple[list[BatchNormPair], list[Left]]:
    """Find the batch norms that rule 1 and 2 allow to fold, and the others with reasons; changes nothing."""
    pairs, left = [], []
    for node in model.graph.all_nodes():
        if not is_operator(node, "BatchNormalization"):
            continue
        found = _why_not_constant(node, model.graph) or _match_layer(node)
        if isinstance(found, str):
            left.append(Left(node.name or "", found))
        else:
            pairs.append(found)
    return pairs, left


def _why_not_constant(node: ir.Node, graph: ir.Graph) -> str | None:
    """Why the batch norm is not an affine function with known constants."""
    if node.graph is not graph:
        return "inside the body of an If, Loop or Scan"
    if node.attributes.get_int("training_mode", 0):
        return "it is in training mode"
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        return "its running statistics are outputs of the model"
    if not all(is_constant(value) for value in node.inputs[1:5]):
        return "its statistics are not constants"
    variance = _float64(node.inputs[4]) + node.attributes.get_float("epsilon", 1e-5)
    if not (variance > 0).all() or not all(np.isfinite(_float64(value)).all() for value in node.inputs[1:5]):
        return "its variance is not positive, or a statistic is not finite"
    return None


def _match_layer(batch_norm: ir.Node) -> BatchNormPair | str:
    """The layer before the batch norm, or why it cannot take the batch norm in."""
    x = batch_norm.inputs[0]
    layer = None if x is None else x.producer()
    if x is None or layer is None:
        return "its input is an input of the model"
    if not is_operator(layer, *_LAYERS) or layer.graph is not batch_norm.graph:
        return f"the operator before it is {layer.op_type} {layer.name!r}, not a layer"
    if len(x.uses()) != 1 or x.is_graph_output():
        return f"the result of {layer.op_type} {layer.name!r} has other readers"
    weight = weight_operand(layer)
    if weight is None or layer.inputs[weight.index] is not weight.value:
        return f"the weight of {layer.op_type} {layer.name!r} is not a float constant"
    if weight.value.dtype != ir.DataType.FLOAT or weight.value.shape is None:
        return f"the weight of {layer.op_type} {layer.name!r} is not float32"
    bias = _bias(layer)
    if bias is not None and (not is_constant(bias) or bias.dtype != ir.DataType.FLOAT):
        return f"the bias of {layer.op_type} {layer.name!r} is not a float constant"
    if layer.op_type == "MatMul" and not _makes_channels(layer, weight):
        return f"the channels of the batch norm are not those that the weight of MatMul {layer.name!r} makes"
    if _channels(layer, weight) != _float64(batch_norm.inputs[1]).size:
        return f"it has another number of channels than {layer.op_type} {layer.name!r}"
    return BatchNormPair(layer, weight, batch_norm)


def _makes_channels(layer: ir.Node, weight: WeightOperand) -> bool:
    """Whether axis 1 of a MatMul's result is the output axis of its rank-2 weight."""
    shape = layer.outputs[0].shape
    rank = None if shape is None else len(shape)
    return weight.axis is not None and rank == (2 if weight.index == 1 else 3)


def _channels(layer: ir.Node, weight: WeightOperand) -> int:
    assert weight.value.shape is not None
    shape = weight.value.shape.numpy()
    if layer.op_type == "ConvTranspose":
        return shape[1] * layer.attributes.get_int("group", 1)
    assert weight.axis is not None
    return shape[weight.axis]


def _bias(layer: ir.Node) -> ir.Value | None:
    return layer.inputs[2] if len(layer.inputs) > 2 else None


class _Folding:
    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        self._names = FreeNames(model)
        # Rule 4: folded weights by what they are made from.
        self._weights: dict[tuple[object, ...], ir.Value] = {}
        self._replaced: dict[ir.Value, list[ir.Value]] = {}

    def fold(self, pair: BatchNormPair) -> ir.Value:
        """Returns the value that takes the place of the batch norm's result."""
        factor, shift = pair.factor_and_shift()
        layer, batch_norm = pair.layer, pair.batch_norm
        layer.replace_input_with(pair.weight.index, self._folded_weight(pair, factor))
        if layer.op_type != "MatMul":
            self._fold_bias(layer, factor, shift)
        elif pair.weight.index == 1:
            layer = self._as_gemm(layer, shift)
        else:
            layer = self._with_add(layer, shift)
        self._take_over(batch_norm, layer.outputs[0])
        return layer.outputs[0]

    def finish(self) -> None:
        """Drop what nothing reads any more; a weight's only replacement gets its name."""
        for original, folded in self._replaced.items():
            if original.uses() or original.is_graph_output():
                continue
            name = original.name or ""
            self._graph.initializers.pop(name)
            if len(folded) == 1:
                folded[0].name = name

    def _folded_weight(self, pair: BatchNormPair, factor: _Float64) -> ir.Value:
        weight, layer = pair.weight.value, pair.layer
        group = layer.attributes.get_int("group", 1) if layer.op_type == "ConvTranspose" else 1
        key = (weight, pair.weight.axis, group, factor.tobytes())
        if key not in self._weights:
            array = _scaled(_float64(weight), factor, pair.weight.axis, group)
            self._weights[key] = self._initializer(f"{weight.name}_folded", array)
            self._replaced.setdefault(weight, []).append(self._weights[key])
        return self._weights[key]

    def _fold_bias(self, layer: ir.Node, factor: _Float64, shift: _Float64) -> None:
        bias = _bias(layer)
        values = np.zeros_like(shift) if bias is None else _float64(bias)
        if layer.op_type == "Gemm":
            values = values * layer.attributes.get_float("beta", 1.0)
            layer.attributes.pop("beta", None)
        folded = self._initializer(f"{layer.name}_bias", _rows(values * factor + shift))
        if bias is None:
            layer.resize_inputs(3)
        else:
            self._replaced.setdefault(bias, []).append(folded)
        layer.replace_input_with(2, folded)

    def _as_gemm(self, layer: ir.Node, shift: _Float64) -> ir.Node:
        x, weight = layer.inputs
        bias = self._initializer(f"{layer.name}_bias", shift)
        gemm = ir.node("Gemm", [x, weight, bias], name=layer.name)
        old, new = layer.outputs[0], gemm.outputs[0]
        ir.convenience.replace_nodes_and_values(self._graph, layer, [layer], [gemm], [old], [new])
        return gemm

    def _with_add(self, layer: ir.Node, shift: _Float64) -> ir.Node:
        bias = self._initializer(f"{layer.name}_bias", shift[:, np.newaxis])
        x = layer.outputs[0]
        output = ir.Value(name=self._names.take(f"{x.name}_biased"), shape=x.shape, type=x.type)
        add = ir.node("Add", [x, bias], outputs=[output], name=self._names.take(f"{layer.name}_bias_add"))
        self._graph.insert_after(layer, add)
        return add

    def _take_over(self, batch_norm: ir.Node, output: ir.Value) -> None:
        old = batch_norm.outputs[0]
        name = old.name if old.is_graph_output() else output.name
        # The MatMul's Add reads the layer; only the batch norm's own readers move.
        old.replace_all_uses_with(output, replace_graph_outputs=True)
        parameters = batch_norm.inputs[1:5]
        self._graph.remove(batch_norm, safe=True)
        output.name = name
        for value in parameters:
            if value is not None and not value.uses() and not value.is_graph_output():
                self._graph.initializers.pop(value.name or "", None)

    def _initializer(self, name: str, array: _Float64) -> ir.Value:
        return add_initializer(self._graph, self._names.take(name), array.astype(np.float32))


def _scaled(weight: _Float64, factor: _Float64, axis: int | None, group: int) -> _Float64:
    """The weight with each output channel times its factor."""
    if group > 1:
        # A grouped ConvTranspose: [C_in, C_out / group, ...]; group g of C_in makes group g of C_out.
        grouped = weight.reshape(group, -1, *weight.shape[1:])
        factors = factor.reshape(group, 1, -1, *[1] * (weight.ndim - 2))
        product: _Float64 = (grouped * factors).reshape(weight.shape)
        return product
    assert axis is not None
    shape = [1] * weight.ndim
    shape[axis] = -1
    return weight * factor.reshape(shape)


def _rows(bias: _Float64) -> _Float64:
    """A Gemm's bias of shape [1, N] as [N]."""
    return bias[0] if bias.ndim == 2 and bias.shape[0] == 1 else bias


def _float64(value: ir.Value | None) -> _Float64:
    return initializer_array(value).astype(np.float64)
