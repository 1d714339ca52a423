"""Which batch norms the layer before them can take in, and why others stay. Changes nothing."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter.initializers import float64_array
from rewriter.operators import WeightOperand, is_constant, is_operator, weight_operand

_Float64 = npt.NDArray[np.float64]

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclasses.dataclass(frozen=True)
class Left:
    """A batch norm that stays, with the reason for a person."""

    node: str
    reason: str


@dataclasses.dataclass(frozen=True)
class BatchNormPair:
    """A layer and the batch norm behind it that it can take in."""

    layer: ir.Node
    weight: WeightOperand
    batch_norm: ir.Node

    def factor_and_shift(self) -> tuple[_Float64, _Float64]:
        """What the batch norm does to each channel, shape [channels]."""
        gamma, beta, mean, variance = (float64_array(value) for value in self.batch_norm.inputs[1:5])
        factor = gamma / np.sqrt(variance + self.batch_norm.attributes.get_float("epsilon", 1e-5))
        return factor, beta - factor * mean


def match_batch_norms(model: ir.Model) -> tuple[list[BatchNormPair], list[Left]]:
    """The batch norms that can be folded, and the others with reasons; see `rewriter.fold.batch_norm`."""
    pairs, left = [], []
    for node in model.graph.all_nodes():
        if not is_operator(node, "BatchNormalization"):
            continue
        found = why_not_affine(node, model.graph) or _match_layer(node)
        if isinstance(found, str):
            left.append(Left(node.name or "", found))
        else:
            pairs.append(found)
    return pairs, left


def why_not_affine(node: ir.Node, graph: ir.Graph) -> str | None:
    """Why the batch norm is not an affine function with known constants."""
    if node.graph is not graph:
        return "inside the body of an If, Loop or Scan"
    if node.attributes.get_int("training_mode", 0):
        return "it is in training mode"
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        return "its running statistics are outputs of the model"
    if not all(is_constant(value) for value in node.inputs[1:5]):
        return "its statistics are not constants"
    variance = float64_array(node.inputs[4]) + node.attributes.get_float("epsilon", 1e-5)
    if not (variance > 0).all() or not all(
        np.isfinite(float64_array(value)).all() for value in node.inputs[1:5]
    ):
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
    bias = bias_of(layer)
    if bias is not None and (not is_constant(bias) or bias.dtype != ir.DataType.FLOAT):
        return f"the bias of {layer.op_type} {layer.name!r} is not a float constant"
    if layer.op_type == "MatMul" and not _makes_channels(layer, weight):
        return f"the channels of the batch norm are not those that the weight of MatMul {layer.name!r} makes"
    if _channels(layer, weight) != float64_array(batch_norm.inputs[1]).size:
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


def bias_of(layer: ir.Node) -> ir.Value | None:
    """The bias input of a Conv, ConvTranspose or Gemm."""
    return layer.inputs[2] if len(layer.inputs) > 2 else None
