"""Fake-quantized biases become int32 initializers with scale s_x * s_w and zero point 0.

Where a bias does not fit (training left a channel with tiny weights beside its bias), the channel's weight
scale is raised until it does: the weights then lose precision that the accumulator could not have shown
beside the bias anyway.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from rewriter.fake_quantize import FakeQuantizeBias, is_fake_quantize_bias, read_bias
from rewriter.initializers import add_initializer, initializer_array
from rewriter.names import FreeNames

# Half of int32: the other half is left to the accumulated products.
LARGEST_BIAS = 2**30


@dataclasses.dataclass(frozen=True)
class RaisedScale:
    """A weight scale that was raised on some channels so that a bias fits into int32."""

    scale: str
    channels: int


def quantize_biases(model: ir.Model) -> list[RaisedScale]:
    """Replace every FakeQuantizeBias, in place. Call before the weights become integers."""
    biases = [read_bias(node) for node in model.graph if is_fake_quantize_bias(node)]
    raised = [change for bias in biases if (change := _make_room(bias)) is not None]
    names = FreeNames(model)
    for bias in biases:
        _quantize(bias, model.graph, names)
    return raised


def _make_room(bias: FakeQuantizeBias) -> RaisedScale | None:
    weight_scale = initializer_array(bias.weight_scale)
    magnitude = np.abs(initializer_array(bias.bias)).reshape(-1)
    needed = magnitude / (initializer_array(bias.x_scale) * np.float64(LARGEST_BIAS))
    if weight_scale.ndim == 0:
        needed = needed.max()
    too_small = weight_scale < needed
    if not too_small.any():
        return None
    raised = np.maximum(weight_scale, needed).astype(np.float32)
    bias.weight_scale.const_value = ir.tensor(raised, name=bias.weight_scale.name)
    return RaisedScale(bias.weight_scale.name or "", int(np.count_nonzero(too_small)))


def _quantize(bias: FakeQuantizeBias, graph: ir.Graph, names: FreeNames) -> None:
    # In float32, as the trained model does it, so that ties fall on the same side.
    step = initializer_array(bias.x_scale) * initializer_array(bias.weight_scale)
    values = initializer_array(bias.bias).reshape(-1)
    integers = np.rint(values / step).astype(np.int32)
    stem = names.take(f"{bias.bias.name}_int32")
    inputs = [
        add_initializer(graph, stem, integers),
        add_initializer(graph, names.take(f"{stem}_scale"), step),
        add_initializer(graph, names.take(f"{stem}_zero_point"), np.zeros(step.shape, np.int32)),
    ]
    output = ir.Value(
        name=names.take(f"{stem}_dequantized"),
        shape=ir.Shape(integers.shape),
        type=ir.TensorType(ir.DataType.FLOAT),
    )
    dequantize = ir.node(
        "DequantizeLinear",
        inputs,
        {"axis": 0} if step.ndim else {},
        outputs=[output],
        name=names.take(f"{stem}_DequantizeLinear"),
    )
    ir.convenience.replace_nodes_and_values(
        graph, bias.node, [bias.node], [dequantize], [bias.node.outputs[0]], [output]
    )
    # A Gemm's [1, C] is [C] now.
    output.shape = ir.Shape(integers.shape)
